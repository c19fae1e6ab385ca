"""Who has an address that several users claim. Pure: no I/O."""

from collections.abc import Iterable
from typing import NamedTuple

from db.merge.change import UserChange, Version


class CompetingClaim(NamedTuple):
    """The greatest claim on `address` by a user outside the batch, whose row shows `current` now."""

    address: str
    clerk_id: str
    version: Version
    current: str


def resolve(
    known: Iterable[UserChange], rivals: Iterable[CompetingClaim], contested: frozenset[str]
) -> dict[str, str]:
    """Return the Clerk id that has each contested address: the greatest version, then the greatest id.

    Clerk ids are ASCII, so Python orders them as their bytes. A user without a row, or deleted, has none.
    """
    best: dict[str, tuple[Version, str]] = {}
    for address, rank in (*_claims(known), *((r.address, (r.version, r.clerk_id)) for r in rivals)):
        if address in contested and (address not in best or rank > best[address]):
            best[address] = rank
    return {address: clerk_id for address, (_, clerk_id) in best.items()}


def _claims(known: Iterable[UserChange]) -> list[tuple[str, tuple[Version, str]]]:
    return [
        (change.email.address, (change.email.version, change.clerk_id))
        for change in known
        if change.profile and change.email and change.email.address
    ]

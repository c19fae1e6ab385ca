"""Decides which user has an address that several claim. Pure: no I/O."""

from collections.abc import Iterable
from typing import NamedTuple

from db.merge.change import UserChange, Version


class ClaimRank(NamedTuple):
    """Orders the claims on one address. Clerk ids are ASCII, so Python orders them by their bytes."""

    verified: bool
    version: Version
    clerk_id: str


class CompetingClaim(NamedTuple):
    """The greatest claim on `address` by a user outside the batch, whose row has the address `current`."""

    address: str
    rank: ClaimRank
    current: str


def resolve(
    known: Iterable[UserChange], competing: Iterable[CompetingClaim], contested: frozenset[str]
) -> dict[str, str]:
    """Return the Clerk id that gets each contested address: that of the greatest claim.

    Users who are deleted or have no row get none.
    """
    claims = [
        (claim.address, ClaimRank(claim.verified, claim.version, change.clerk_id))
        for change in known
        if change.profile and (claim := change.email) and claim.address
    ]
    best: dict[str, ClaimRank] = {}
    for address, rank in (*claims, *((claim.address, claim.rank) for claim in competing)):
        if address in contested and (address not in best or rank > best[address]):
            best[address] = rank
    return {address: rank.clerk_id for address, rank in best.items()}

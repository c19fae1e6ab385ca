"""Who has an address that several users claim. Pure: no I/O."""

from collections.abc import Iterable
from typing import NamedTuple

from db.merge.change import UserChange, Version


class ClaimRank(NamedTuple):
    """Orders the claims on one address; Clerk ids are ASCII, so Python orders them as their bytes."""

    verified: bool
    version: Version
    clerk_id: str


class CompetingClaim(NamedTuple):
    """The greatest claim on `address` by a user outside the batch, whose row shows `current` now."""

    address: str
    rank: ClaimRank
    current: str

    @property
    def clerk_id(self) -> str:
        """The user who claims."""
        return self.rank.clerk_id


def resolve(
    known: Iterable[UserChange], competing: Iterable[CompetingClaim], contested: frozenset[str]
) -> dict[str, str]:
    """Return the Clerk id that has each contested address: that of the greatest claim.

    A user without a row, or deleted, has none.
    """
    best: dict[str, ClaimRank] = {}
    for address, rank in (*_claims(known), *((claim.address, claim.rank) for claim in competing)):
        if address in contested and (address not in best or rank > best[address]):
            best[address] = rank
    return {address: rank.clerk_id for address, rank in best.items()}


def _claims(known: Iterable[UserChange]) -> list[tuple[str, ClaimRank]]:
    return [
        (claim.address, ClaimRank(claim.verified, claim.version, change.clerk_id))
        for change in known
        if change.profile and (claim := change.email) and claim.address
    ]

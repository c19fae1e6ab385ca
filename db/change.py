"""What is known of a user, and how two such pieces of knowledge merge. Pure: no I/O, no framework.

A change is never executed, it is merged: whatever the order, the repetition and the batching, the result is
a function of the set of changes. All times are whole milliseconds since the epoch.
"""

from collections.abc import Callable
from typing import NamedTuple

PLACEHOLDER_DOMAIN = "placeholder.invalid"
DELETED_NAME = "Deleted user"
DEFAULT_ROLE = "user"


class Version(NamedTuple):
    """Orders two observations of one user: Clerk's `updated_at`, then when it was observed (both ms)."""

    updated_at: int
    observed_at: int


class Profile(NamedTuple):
    """The columns of a user that travel together.

    Where the application owns `role` or `organization`, every profile holds the default there.
    """

    version: Version
    created_at: int
    name: str
    organization: str | None
    role: str


class EmailClaim(NamedTuple):
    """The address that a user claims, or None for a user without one."""

    version: Version
    address: str | None


class UserChange(NamedTuple):
    """What one or more deliveries say about one user; None where they say nothing.

    `login_at` is the latest sign-in and `deleted_at` the earliest deletion, both ms.
    """

    clerk_id: str
    profile: Profile | None = None
    email: EmailClaim | None = None
    login_at: int | None = None
    deleted_at: int | None = None


def merge(a: UserChange, b: UserChange) -> UserChange:
    """Return what both say together. Associative, commutative and idempotent.

    Raises ValueError when the two are about different users.
    """
    if a.clerk_id != b.clerk_id:
        raise ValueError("changes of two users cannot be merged")
    return UserChange(
        a.clerk_id,
        _newer_profile(a.profile, b.profile),
        _newer_claim(a.email, b.email),
        _present(max, a.login_at, b.login_at),
        _present(min, a.deleted_at, b.deleted_at),
    )


def placeholder_address(clerk_id: str) -> str:
    """Return the address of a user who has none that can be stored (RFC 2606: it goes nowhere)."""
    return f"{clerk_id}@{PLACEHOLDER_DOMAIN}"


def _newer_profile(a: Profile | None, b: Profile | None) -> Profile | None:
    if a is None or b is None:
        return a or b
    return max(a, b, key=_profile_rank)


def _profile_rank(profile: Profile) -> tuple[Version, int, str, tuple[bool, str], str]:
    # created_at stands before the text: it is all that is left to compare once a user is anonymised, and the
    # same profile has to win before and after.
    version, created_at, name, organization, role = profile
    return version, created_at, name, _none_first(organization), role


def _newer_claim(a: EmailClaim | None, b: EmailClaim | None) -> EmailClaim | None:
    if a is None or b is None:
        return a or b
    return max(a, b, key=_claim_rank)


def _claim_rank(claim: EmailClaim) -> tuple[Version, tuple[bool, str]]:
    return claim.version, _none_first(claim.address)


def _none_first(text: str | None) -> tuple[bool, str]:
    return text is not None, text or ""


def _present(choose: Callable[[int, int], int], a: int | None, b: int | None) -> int | None:
    if a is None or b is None:
        return b if a is None else a
    return choose(a, b)

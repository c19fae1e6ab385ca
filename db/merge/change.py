"""What is known of a user, and how two such pieces of knowledge merge. Pure: no I/O, no framework.

A change is never executed, it is merged: whatever the order, the repetition and the batching, the result is
a function of the set of changes. All times are whole milliseconds since the epoch.
"""

import hashlib
import re
from collections.abc import Callable, Collection
from typing import Any, NamedTuple, TypeVar

PLACEHOLDER_DOMAIN = "placeholder.invalid"
DELETED_NAME = "Deleted user"
DEFAULT_ROLE = "user"
CLERK_ID = re.compile("[A-Za-z0-9_-]{1,200}")


class Version(NamedTuple):
    """Orders two observations of one user: Clerk's `updated_at`, then when it was observed (both ms)."""

    updated_at: int
    observed_at: int


class Profile(NamedTuple):
    """The columns of a user that travel together, and PROFILE_FIELDS in canonical JSON.

    Where the application owns `role` or `organization`, every profile holds the default there.
    """

    version: Version
    created_at: int
    name: str
    organization: str | None
    role: str
    fields: str | None = None


class EmailClaim(NamedTuple):
    """The address that a user claims, or None for a user without one; `verified` is Clerk's word for it."""

    version: Version
    address: str | None
    verified: bool = False


class Organization(NamedTuple):
    """What is said of an organization; deleted at `deleted_at`, which is final.

    Name, slug and image travel together, in the newest version that names the organization.
    """

    id: str
    version: Version | None = None
    name: str | None = None
    deleted_at: int | None = None
    slug: str | None = None
    image_url: str | None = None


class Membership(NamedTuple):
    """A user's membership of an organization. Once ended it stays so: a user who joins again gets a new id.

    The role has a version of its own.
    """

    id: str
    organization_id: str
    joined_at: int
    ended_at: int | None = None
    role_version: Version | None = None
    role: str | None = None


class Source(NamedTuple):
    """The Clerk instance that spoke of a user, and when (ms)."""

    seen_at: int
    instance_id: str


def is_foreign(instance_id: str | None, own: str | None) -> bool:
    """Say whether a Clerk instance, None if unknown, is another than `own`, which is None for any."""
    return None not in (instance_id, own) and instance_id != own


class UserChange(NamedTuple):
    """What one or more deliveries say about one user; None where they say nothing.

    `login_at` is the latest sign-in and `deleted_at` the earliest deletion, both ms. `memberships` and the
    `organizations` that they name are ordered by id. `source` is the instance that spoke of the user last.
    """

    clerk_id: str
    profile: Profile | None = None
    email: EmailClaim | None = None
    login_at: int | None = None
    deleted_at: int | None = None
    memberships: tuple[Membership, ...] = ()
    organizations: tuple[Organization, ...] = ()
    source: Source | None = None


_Known = TypeVar("_Known", Organization, Membership)
_Said = TypeVar("_Said", Profile, EmailClaim)


def merge(a: UserChange, b: UserChange) -> UserChange:
    """Return what both say together. Associative, commutative and idempotent.

    Raises ValueError when the two are about different users.
    """
    if a.clerk_id != b.clerk_id:
        raise ValueError("changes of two users cannot be merged")
    return UserChange(
        a.clerk_id,
        _newer(_profile_rank, a.profile, b.profile),
        _newer(_claim_rank, a.email, b.email),
        _present(max, a.login_at, b.login_at),
        _present(min, a.deleted_at, b.deleted_at),
        merge_by_id(merge_memberships, a.memberships, b.memberships),
        merge_by_id(merge_organizations, a.organizations, b.organizations),
        latest_source(a.source, b.source),
    )


def latest_source(a: Source | None, b: Source | None) -> Source | None:
    """Return which of the two spoke last."""
    return max((source for source in (a, b) if source), default=None)


def merge_organizations(a: Organization, b: Organization) -> Organization:
    """Return what both say of one organization together, as `merge` does for users."""
    newest = max(a, b, key=_organization_rank)
    return newest._replace(deleted_at=_present(min, a.deleted_at, b.deleted_at))


def _organization_rank(it: Organization) -> tuple[object, ...]:
    texts = (_none_first(text) for text in (it.name, it.slug, it.image_url))
    return it.version is not None, it.version or (), *texts


def merge_memberships(a: Membership, b: Membership) -> Membership:
    """Return what both say of one membership together, as `merge` does for users."""
    joined = max(a, b, key=lambda it: (it.joined_at, it.organization_id))
    given = max(
        a, b, key=lambda it: (it.role_version is not None, it.role_version or (), _none_first(it.role))
    )
    return joined._replace(
        ended_at=_present(min, a.ended_at, b.ended_at), role_version=given.role_version, role=given.role
    )


def merge_by_id(
    merge_two: Callable[[_Known, _Known], _Known], a: Collection[_Known], b: Collection[_Known]
) -> tuple[_Known, ...]:
    """Return both collections as one, ordered by id; what has the same id in both is merged."""
    if not a and not b:
        return ()
    found = {item.id: item for item in a}
    for item in b:
        found[item.id] = merge_two(found[item.id], item) if item.id in found else item
    return tuple(found[id_] for id_ in sorted(found))


def placeholder_address(clerk_id: str) -> str:
    """Return the address of a user who has none that can be stored (RFC 2606: it goes nowhere).

    A row that the application wrote may have an id that fits into no address: a hash then stands for it,
    behind a sign that no Clerk id contains.
    """
    fits = CLERK_ID.fullmatch(clerk_id)
    local = clerk_id if fits else f"row+{hashlib.sha256(clerk_id.encode()).hexdigest()}"
    return f"{local}@{PLACEHOLDER_DOMAIN}"


def _newer(rank: Callable[[_Said], Any], a: _Said | None, b: _Said | None) -> _Said | None:
    if a is None or b is None:
        return a or b
    return max(a, b, key=rank)


def _profile_rank(profile: Profile) -> tuple[object, ...]:
    # created_at stands before the text: it is all that is left to compare once a user is anonymised, and the
    # same profile has to win before and after.
    version, created_at, name, organization, role, fields = profile
    return version, created_at, name, _none_first(organization), role, _none_first(fields)


def _claim_rank(claim: EmailClaim) -> tuple[Version, tuple[bool, str], bool]:
    return claim.version, _none_first(claim.address), claim.verified


def _none_first(text: str | None) -> tuple[bool, str]:
    return text is not None, text or ""


def _present(choose: Callable[[int, int], int], a: int | None, b: int | None) -> int | None:
    if a is None or b is None:
        return b if a is None else a
    return choose(a, b)

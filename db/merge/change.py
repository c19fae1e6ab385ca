"""Changes of a user, and how two of them merge. Pure: no I/O, no framework.

A change is never executed, it is merged. So the result depends only on the set of changes, whatever their
order, repetition and batching. All times are whole milliseconds since the epoch.
"""

import hashlib
import re
from collections.abc import Callable, Collection
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

PLACEHOLDER_DOMAIN = "placeholder.invalid"
DELETED_NAME = "Deleted user"
DEFAULT_ROLE = "user"
CLERK_ID = re.compile("[A-Za-z0-9_-]{1,200}")


class Version(NamedTuple):
    """Orders observations of one user: by Clerk's `updated_at`, then by the time of observation (both ms)."""

    updated_at: int
    observed_at: int


class Profile(NamedTuple):
    """The columns of a user that travel together, and PROFILE_FIELDS in canonical JSON.

    If the application owns `role` or `organization`, every profile has the default there.
    """

    version: Version
    created_at: int
    name: str
    organization: str | None
    role: str
    fields: str | None = None


class EmailClaim(NamedTuple):
    """The address that a user claims, None for a user without one; `verified` as Clerk says."""

    version: Version
    address: str | None
    verified: bool = False


class Organization(NamedTuple):
    """What one or more deliveries say about an organization. A deletion is final.

    Name, slug and image are taken together from the newest version that has a name.
    """

    id: str
    version: Version | None = None
    name: str | None = None
    deleted_at: int | None = None
    slug: str | None = None
    image_url: str | None = None


class Membership(NamedTuple):
    """A user's membership of an organization. Its end is final: a user who joins again gets a new id.

    The role has its own version.
    """

    id: str
    organization_id: str
    joined_at: int
    ended_at: int | None = None
    role_version: Version | None = None
    role: str | None = None


class Source(NamedTuple):
    """The Clerk instance that reported a user, and when (ms)."""

    seen_at: int
    instance_id: str


def is_foreign(instance_id: str | None, own: str | None) -> bool:
    """Say whether a Clerk instance (None: unknown) differs from `own` (None: every instance is accepted)."""
    return None not in (instance_id, own) and instance_id != own


class UserChange(NamedTuple):
    """What one or more deliveries say about one user; None where they say nothing.

    `login_at` is the latest sign-in and `deleted_at` the earliest deletion, both ms. `memberships` and the
    `organizations` that they name are ordered by id. `source` is the instance that reported the user last.
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
_Part = TypeVar("_Part", Profile, EmailClaim)
_Given = TypeVar("_Given", int, Source)


def merge(a: UserChange, b: UserChange) -> UserChange:
    """Merge two changes. Associative, commutative and idempotent.

    Raises ValueError if they are about different users.
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
    """Return the later of the two."""
    return _present(max, a, b)


def merge_organizations(a: Organization, b: Organization) -> Organization:
    """Merge two states of one organization, as `merge` does for users."""
    newest = max(a, b, key=_organization_rank)
    return newest._replace(deleted_at=_present(min, a.deleted_at, b.deleted_at))


def _organization_rank(organization: Organization) -> tuple[object, ...]:
    version, texts = organization.version, (organization.name, organization.slug, organization.image_url)
    return version is not None, version or (), *map(_none_first, texts)


def merge_memberships(a: Membership, b: Membership) -> Membership:
    """Merge two states of one membership, as `merge` does for users."""
    joined = max(a, b, key=attrgetter("joined_at", "organization_id"))
    newest = max(a, b, key=_role_rank)
    return joined._replace(
        ended_at=_present(min, a.ended_at, b.ended_at), role_version=newest.role_version, role=newest.role
    )


def _role_rank(membership: Membership) -> tuple[object, ...]:
    version = membership.role_version
    return version is not None, version or (), _none_first(membership.role)


def merge_by_id(
    merge_two: Callable[[_Known, _Known], _Known], a: Collection[_Known], b: Collection[_Known]
) -> tuple[_Known, ...]:
    """Return both collections as one, ordered by id; items with the same id are merged."""
    if not a and not b:
        return ()
    found = {item.id: item for item in a}
    for item in b:
        found[item.id] = merge_two(found[item.id], item) if item.id in found else item
    return tuple(found[id_] for id_ in sorted(found))


def placeholder_address(clerk_id: str) -> str:
    """Return the address for a user without one that can be stored. Its domain receives no mail (RFC 2606).

    A row that the application wrote may have an id that fits into no address. Then a hash replaces the id,
    behind a character that no Clerk id contains.
    """
    fits = CLERK_ID.fullmatch(clerk_id)
    local = clerk_id if fits else f"row+{hashlib.sha256(clerk_id.encode()).hexdigest()}"
    return f"{local}@{PLACEHOLDER_DOMAIN}"


def _newer(rank: Callable[[_Part], Any], a: _Part | None, b: _Part | None) -> _Part | None:
    if a is None or b is None:
        return a or b
    return max(a, b, key=rank)


def _profile_rank(profile: Profile) -> tuple[object, ...]:
    # created_at is compared before the text: an anonymised user has nothing else left to compare, and the
    # same profile must win before and after the anonymisation.
    version, created_at, name, organization, role, fields = profile
    return version, created_at, name, _none_first(organization), role, _none_first(fields)


def _claim_rank(claim: EmailClaim) -> tuple[Version, tuple[bool, str], bool]:
    return claim.version, _none_first(claim.address), claim.verified


def _none_first(text: str | None) -> tuple[bool, str]:
    return text is not None, text or ""


def _present(choose: Callable[[_Given, _Given], _Given], a: _Given | None, b: _Given | None) -> _Given | None:
    if a is None or b is None:
        return b if a is None else a
    return choose(a, b)

"""Converts the fact that a delivery states into a change of a user. Pure: no I/O."""

import re

from db.merge.address import storable_address
from db.merge.change import (
    DEFAULT_ROLE,
    EmailClaim,
    Membership,
    Organization,
    Profile,
    UserChange,
    Version,
    merge,
    merge_by_id,
    merge_memberships,
    merge_organizations,
)
from db.merge.fields import clean_text
from worker.clerk.errors import Unreadable
from worker.clerk.payloads import (
    ClerkMember,
    ClerkMembership,
    ClerkOrganization,
    ClerkUser,
    Event,
    MembershipChanged,
    OrganizationChanged,
    SessionChanged,
    UserDeleted,
    UserUpserted,
)

MAX_TEXT = 255
UNNAMED = "Unnamed user"
ROLES = frozenset({"admin", "user"})
# White space, controls, the Braille blank, and Unicode's Default_Ignorable_Code_Point.
INVISIBLE = re.compile(
    r"[\s\0-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    r"\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3"
    r"\U0001d173-\U0001d17a\U000e0000-\U000e0fff]*"
)


def change_of(event: Event, received_at: int) -> UserChange | Organization:
    """Return the change that `event` makes to its user or organization.

    `received_at` (ms) replaces the time of an end if the event has none. Raises Unreadable for a session that
    contains neither the time of the sign-in nor the user.
    """
    fact, happened_at = event.fact, event.happened_at
    ended_at = _first(happened_at, received_at)
    match fact:
        case UserUpserted():
            return user_change(fact.user, happened_at)
        case UserDeleted():
            return UserChange(fact.user_id, deleted_at=ended_at)
        case SessionChanged():
            return _session_change(fact, happened_at)
        case MembershipChanged():
            return member_change(fact.member, happened_at, ended_at if fact.ended else None)
        case OrganizationChanged():
            organization = _organization(fact.organization, happened_at)
            return organization._replace(deleted_at=ended_at if fact.deleted else None)


def user_change(user: ClerkUser, observed_at: int | None) -> UserChange:
    """Return the change for a user observed at `observed_at` (ms; None: when last updated)."""
    version = _version(_first(user.updated_at, observed_at, user.created_at, 0), observed_at)
    profile = Profile(
        version,
        _first(user.created_at, version.updated_at),
        display_name(user),
        None if user.organization is None else storable_text(user.organization),
        user.role if user.role in ROLES else DEFAULT_ROLE,
        user.fields,
    )
    address = _address(user.email)
    verified = address is not None and user.email_verified
    email = EmailClaim(version, address, verified) if user.email_known else None
    memberships = [_membership(it, version.observed_at, None) for it in user.memberships]
    organizations = [_organization(it.organization, version.observed_at) for it in user.memberships]
    return UserChange(
        user.id,
        profile,
        email,
        user.last_sign_in_at,
        memberships=merge_by_id(merge_memberships, (), memberships),
        organizations=merge_by_id(merge_organizations, (), organizations),
    )


def member_change(member: ClerkMember, observed_at: int | None, ended_at: int | None = None) -> UserChange:
    """Return the change for the user of a membership seen at `observed_at` and ended at `ended_at` (ms)."""
    return UserChange(
        member.user_id,
        memberships=(_membership(member.membership, observed_at, ended_at),),
        organizations=(_organization(member.membership.organization, observed_at),),
    )


def display_name(user: ClerkUser) -> str:
    """Return first and last name joined; else the username; else the address up to @; else "Unnamed user"."""
    full_name = " ".join(part for part in (_visible(user.first_name), _visible(user.last_name)) if part)
    local_part = user.email.rpartition("@")[0] if user.email else None
    name = full_name or _visible(user.username) or _visible(local_part) or UNNAMED
    return name[:MAX_TEXT]


def storable_text(text: str) -> str:
    """Return `text` as PostgreSQL can store it: no NUL, lone surrogates as U+FFFD, at most 255 characters."""
    return clean_text(text)[:MAX_TEXT]


def _session_change(session: SessionChanged, happened_at: int | None) -> UserChange:
    login = UserChange(session.user_id, login_at=None if session.impersonated else session.started_at)
    if session.user is None:
        if session.started_at is None and not session.impersonated:
            raise Unreadable("the session's created_at is not a time, and it has no user")
        return login
    observed_at = session.updated_at if happened_at is None else happened_at
    return merge(login, user_change(session.user, observed_at))


def _membership(membership: ClerkMembership, observed_at: int | None, ended_at: int | None) -> Membership:
    joined_at = _first(membership.created_at, observed_at, 0)
    role = _storable(membership.role)
    version = None if role is None else _version(membership.updated_at, observed_at)
    return Membership(membership.id, membership.organization.id, joined_at, ended_at, version, role)


def _organization(organization: ClerkOrganization, observed_at: int | None) -> Organization:
    name = _visible(organization.name)
    if name is None:
        return Organization(organization.id)
    return Organization(
        organization.id,
        _version(organization.updated_at, observed_at),
        name[:MAX_TEXT],
        slug=_storable(organization.slug),
        image_url=_visible(organization.image_url),
    )


def _version(updated_at: int | None, observed_at: int | None) -> Version:
    updated_at = _first(updated_at, observed_at, 0)
    return Version(updated_at, _first(observed_at, updated_at))


def _storable(text: str | None) -> str | None:
    visible = _visible(text)
    return visible and visible[:MAX_TEXT]


def _visible(text: str | None) -> str | None:
    """Return `text` as PostgreSQL can store it, None if it has no visible character."""
    cleaned = clean_text(text) if text else ""
    return None if INVISIBLE.fullmatch(cleaned) else cleaned


def _address(address: str | None) -> str | None:
    return None if address is None else storable_address(clean_text(address))


def _first(*times: int | None) -> int:
    for time in times:
        if time is not None:
            return time
    raise ValueError("one of the times must be known")

"""Clerk's webhook bodies, parsed once into facts. Only this module knows the keys of Clerk's JSON.

Parsing is lenient, because Clerk's schema changes over time: a field that is null, absent or of an unexpected
type is ignored. Only a missing id, which every user needs, makes an event unreadable. Times are ms.
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from config import Settings
from db.merge.change import CLERK_ID
from db.merge.fields import canonical
from worker.clerk.decoding import decode_text
from worker.clerk.errors import NotJson, Unreadable

EARLIEST_IN_MS = 100_000_000_000  # smaller timestamps are in seconds, as in Clerk's own examples
LATEST = 253_402_214_400_000  # a day before the year 10000: a datetime in every time zone


class ClerkOrganization(NamedTuple):
    """An organization in a payload."""

    id: str
    updated_at: int | None
    name: str | None
    slug: str | None
    image_url: str | None


class ClerkMembership(NamedTuple):
    """A user's membership of an organization in a payload."""

    id: str
    created_at: int | None
    updated_at: int | None
    role: str | None
    organization: ClerkOrganization


class ClerkMember(NamedTuple):
    """A membership, with the id of the user who has it."""

    user_id: str
    membership: ClerkMembership

    @property
    def id(self) -> str:
        """The membership's id."""
        return self.membership.id

    @property
    def created_at(self) -> int | None:
        """When the user joined (ms)."""
        return self.membership.created_at


class ClerkUser(NamedTuple):
    """A user in a payload, texts as sent. `email` and `email_verified` are valid only if `email_known`."""

    id: str
    created_at: int | None
    updated_at: int | None
    last_sign_in_at: int | None
    first_name: str | None
    last_name: str | None
    username: str | None
    email_known: bool
    email: str | None
    email_verified: bool
    role: str | None
    organization: str | None
    memberships: tuple[ClerkMembership, ...] = ()
    fields: str | None = None


class UserUpserted(NamedTuple):
    """A user was created or updated."""

    user: ClerkUser


class UserDeleted(NamedTuple):
    """A user was deleted."""

    user_id: str


class SessionChanged(NamedTuple):
    """A session started, changed or ended; `started_at` is when the user signed in.

    `impersonated`: staff signed in as the user. `user` is the profile, which newer payloads contain.
    """

    user_id: str
    started_at: int | None
    updated_at: int | None
    impersonated: bool
    user: ClerkUser | None


class MembershipChanged(NamedTuple):
    """A user joined an organization, is a member of it, or, when `ended`, no longer is."""

    member: ClerkMember
    ended: bool


class OrganizationChanged(NamedTuple):
    """An organization was changed or, when `deleted`, deleted."""

    organization: ClerkOrganization
    deleted: bool


UserFact = UserUpserted | UserDeleted | SessionChanged | MembershipChanged
Fact = UserFact | OrganizationChanged


class Event(NamedTuple):
    """A fact, with the event's type, when it happened, and at which Clerk instance."""

    type: str
    happened_at: int | None
    instance_id: str | None
    fact: Fact


class FieldSources(NamedTuple):
    """Where a user's role and organization come from, and which other fields are kept.

    `role` and `organization` are keys of `public_metadata`, None if the value comes from elsewhere.
    """

    role: str | None = "role"
    organization: str | None = "organization"
    memberships: bool = False
    profile_fields: tuple[str, ...] = ()

    @classmethod
    def of(cls, settings: Settings) -> "FieldSources":
        """Return the sources that the settings name."""
        return cls(
            settings.role_metadata_key if settings.role_source == "metadata" else None,
            settings.organization_metadata_key if settings.organization_source == "metadata" else None,
            settings.organization_source == "membership",
            settings.profile_fields,
        )


class Summary(NamedTuple):
    """What the receiver needs from a body; None for a field that is missing or of the wrong type.

    `is_ignored`: the type is a text, but not handled.
    """

    type: str | None
    is_ignored: bool
    clerk_id: str | None
    instance_id: str | None


def handled_types(settings: Settings) -> tuple[str, ...]:
    """Return the types that are queued; all others are acknowledged and ignored."""
    if settings.organization_source == "membership":
        return ALL_TYPES
    return HANDLED_TYPES


def summarize(envelope: object, types: Collection[str]) -> Summary:
    """Return the summary of a decoded body; `types` are the types to queue."""
    if not isinstance(envelope, dict):
        return Summary(None, False, None, None)
    type_ = _text(envelope, "type")
    data = envelope.get("data")
    is_ignored = type_ is not None and type_ not in types
    clerk_id = None if is_ignored else _subject(type_, data)
    return Summary(type_, is_ignored, clerk_id, _text(envelope, "instance_id"))


def parse(body: str, sources: FieldSources) -> Event:
    """Return the fact that a delivery states. Raises Unreadable with a reason that holds no personal data."""
    try:
        envelope = decode_text(body)
    except NotJson as error:
        raise Unreadable(str(error)) from None
    if not isinstance(envelope, dict):
        raise Unreadable("the event is not a JSON object")
    type_ = envelope.get("type")
    if not isinstance(type_, str):
        raise Unreadable("the event's type is not a string")
    parser = _PARSERS.get(type_)
    if parser is None:
        raise Unreadable("the event's type is not one that is handled")
    data = envelope.get("data")
    if not isinstance(data, dict):
        raise Unreadable("the event's data is not a JSON object")
    return Event(
        type_,
        _envelope_time(envelope.get("timestamp")),
        valid_id(envelope.get("instance_id")),
        parser(type_, data, sources),
    )


def parse_user(data: dict[str, Any], sources: FieldSources) -> ClerkUser:
    """Return the user in Clerk's JSON. Raises Unreadable when the id is missing or no Clerk id."""
    address = _address(data)
    metadata = data.get("public_metadata")
    if not isinstance(metadata, dict):
        metadata = {}
    return ClerkUser(
        _clerk_id(data, "id"),
        _time(data.get("created_at")),
        _time(data.get("updated_at")),
        _time(data.get("last_sign_in_at")),
        _text(data, "first_name"),
        _text(data, "last_name"),
        _text(data, "username"),
        *address,
        _text(metadata, sources.role),
        _text(metadata, sources.organization),
        _memberships(data) if sources.memberships else (),
        _fields(data, sources.profile_fields) if sources.profile_fields else None,
    )


def parse_member(data: dict[str, Any]) -> ClerkMember:
    """Return the membership in Clerk's JSON, with its user. Raises Unreadable if an id is missing."""
    user = data.get("public_user_data")
    user_id = _clerk_id(user if isinstance(user, dict) else {}, "user_id", "data.public_user_data")
    return ClerkMember(user_id, _membership(data))


def _fields(data: dict[str, Any], names: Sequence[str]) -> str:
    return canonical({name: data[name] for name in names if name in data})


def _user_upserted(_type: str, data: dict[str, Any], sources: FieldSources) -> Fact:
    return UserUpserted(parse_user(data, sources))


def _user_deleted(_type: str, data: dict[str, Any], _sources: FieldSources) -> Fact:
    return UserDeleted(_clerk_id(data, "id"))


def _session_changed(_type: str, data: dict[str, Any], sources: FieldSources) -> Fact:
    user_id = _clerk_id(data, "user_id")
    user = data.get("user")
    if not isinstance(user, dict) or user.get("id") != user_id:
        user = None
    return SessionChanged(
        user_id,
        _time(data.get("created_at")),
        _time(data.get("updated_at")),
        data.get("actor") is not None,
        parse_user(user, sources) if user else None,
    )


def _membership_changed(type_: str, data: dict[str, Any], _sources: FieldSources) -> Fact:
    return MembershipChanged(parse_member(data), type_ == "organizationMembership.deleted")


def _organization_changed(type_: str, data: dict[str, Any], _sources: FieldSources) -> Fact:
    return OrganizationChanged(_organization(data, "data"), type_ == "organization.deleted")


def _memberships(user: dict[str, Any]) -> tuple[ClerkMembership, ...]:
    """Return the memberships in a user's JSON that can be read."""
    entries = user.get("organization_memberships")
    found = []
    for entry in entries if isinstance(entries, list) else ():
        with suppress(Unreadable):
            found.append(_membership(entry if isinstance(entry, dict) else {}))
    return tuple(found)


def _membership(data: dict[str, Any]) -> ClerkMembership:
    organization = data.get("organization")
    return ClerkMembership(
        _clerk_id(data, "id"),
        _time(data.get("created_at")),
        _time(data.get("updated_at")),
        _text(data, "role"),
        _organization(organization if isinstance(organization, dict) else {}, "data.organization"),
    )


def _organization(data: dict[str, Any], place: str) -> ClerkOrganization:
    texts = (_text(data, name) for name in ("name", "slug", "image_url"))
    return ClerkOrganization(_clerk_id(data, "id", place), _time(data.get("updated_at")), *texts)


_PARSERS: dict[str, Callable[[str, dict[str, Any], FieldSources], Fact]] = {
    "user.created": _user_upserted,
    "user.updated": _user_upserted,
    "user.deleted": _user_deleted,
    "session.created": _session_changed,
    "session.pending": _session_changed,
    "session.ended": _session_changed,
    "session.removed": _session_changed,
    "session.revoked": _session_changed,
    "organizationMembership.created": _membership_changed,
    "organizationMembership.updated": _membership_changed,
    "organizationMembership.deleted": _membership_changed,
    "organization.updated": _organization_changed,
    "organization.deleted": _organization_changed,
}

HANDLED_TYPES = tuple(type_ for type_ in _PARSERS if not type_.startswith("organization"))
ORGANIZATION_TYPES = tuple(type_ for type_ in _PARSERS if type_.startswith("organization"))
ALL_TYPES = (*HANDLED_TYPES, *ORGANIZATION_TYPES)


class _Address(NamedTuple):
    """Whether the payload shows the address; the address, None for none; whether it is verified."""

    known: bool = False
    text: str | None = None
    verified: bool = False


def _address(data: dict[str, Any]) -> _Address:
    entries = data.get("email_addresses")
    if not isinstance(entries, list):
        return _Address()
    entries = [entry for entry in entries if isinstance(entry, dict)]
    primary_id = data.get("primary_email_address_id")
    if primary_id in (None, ""):
        addresses = (_text(entry, "email_address") for entry in entries if _is_verified(entry))
        address = next((address for address in addresses if address is not None), None)
        return _Address(True, address, address is not None)
    for entry in entries:
        if isinstance(primary_id, str) and entry.get("id") == primary_id:
            return _Address(True, _text(entry, "email_address"), _is_verified(entry))
    return _Address()


def _is_verified(entry: dict[str, Any]) -> bool:
    verification = entry.get("verification")
    return isinstance(verification, dict) and verification.get("status") == "verified"


def _subject(type_: str | None, data: object) -> str | None:
    if type_ is None or not isinstance(data, dict):
        return None
    if type_.startswith("organizationMembership."):
        data = data.get("public_user_data")
        if not isinstance(data, dict):
            return None
    return valid_id(data.get("id" if type_.startswith(("user.", "organization.")) else "user_id"))


def _clerk_id(data: dict[str, Any], key: str, place: str = "data") -> str:
    clerk_id = valid_id(data.get(key))
    if clerk_id is None:
        raise Unreadable(f"the event's {place}.{key} is not a Clerk id")
    return clerk_id


def valid_id(value: object) -> str | None:
    """Return the value if it is a Clerk id, else None."""
    return value if isinstance(value, str) and CLERK_ID.fullmatch(value) else None


def _text(data: dict[str, Any], key: str | None) -> str | None:
    value = None if key is None else data.get(key)
    return value if isinstance(value, str) else None


def _envelope_time(value: object) -> int | None:
    time = _time(value)
    return time * 1000 if time is not None and time < EARLIEST_IN_MS else time


def _time(value: object) -> int | None:
    # A bool is an int in Python, and NaN fails both comparisons.
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LATEST:
        return None
    return int(value)

"""What the tables hold after a set of deliveries, as plainly as it can be said.

Nothing of the sync's own code is used: the set is looked at as a whole, and no order, batch or merge occurs.
Times are ms.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeGuard

from tests.support.payloads import Json

Version = tuple[int, int]
NONE: Mapping[Any, Any] = MappingProxyType({})


class SentEvent(NamedTuple):
    """One delivery: its svix-id, the decoded body, and when it was received."""

    svix_id: str
    event: Json
    received_at: int


class Choices(NamedTuple):
    user_deletion: Literal["delete", "anonymize"] = "delete"
    role_source: Literal["metadata", "none"] = "metadata"
    organization_source: Literal["metadata", "membership", "none"] = "metadata"
    organization_value: Literal["name", "id", "slug"] = "name"
    profile_fields: tuple[str, ...] = ()


class Row(NamedTuple):
    """A row of `users` without its id."""

    clerk_id: str
    email: str
    name: str
    organization: str | None
    role: str
    created_at: int
    last_login_at: int | None


class Stay(NamedTuple):
    """A membership: of which organization, since when, until when; the role, and since which version."""

    organization_id: str
    joined_at: int
    ended_at: int | None
    role_version: Version | None = None
    role: str | None = None


class Company(NamedTuple):
    """An organization: its newest name, slug and image, which version these have, when it was deleted."""

    name: str | None
    version: Version | None
    deleted_at: int | None
    slug: str | None = None
    image_url: str | None = None


class ExpectedTables(NamedTuple):
    """The rows of `users`; when each deleted user was deleted; the latest login of users without a row.

    And where membership decides: the memberships by user and id, and the organizations. And which instance
    spoke of each user last, and when. And the profile's fields, with Clerk's `updated_at`.
    """

    users: dict[str, Row]
    deleted: dict[str, int]
    waiting_logins: dict[str, int]
    memberships: Mapping[tuple[str, str], Stay] = NONE
    organizations: Mapping[str, Company] = NONE
    instances: Mapping[str, tuple[int, str]] = NONE
    profiles: Mapping[str, tuple[str, int]] = NONE


class Snapshot(NamedTuple):
    """A user as one payload shows it, as it would be stored. `claims` tells whether it says the address."""

    version: Version
    created_at: int
    name: str
    organization: str | None
    role: str
    claims: bool
    address: str | None
    verified: bool
    fields: str | None


class ModelClaim(NamedTuple):
    """What a user claims, since which version, and whether it is verified."""

    version: Version
    address: str | None
    verified: bool


class ObservedUser:
    """Everything that was seen of one user, in no order."""

    def __init__(self) -> None:
        self.snapshots: set[Snapshot] = set()
        self.logins: set[int] = set()
        self.deletions: set[int] = set()
        self.instances: set[tuple[int, str]] = set()
        self.stays: dict[str, set[Stay]] = defaultdict(set)


class Heard:
    """Everything that was heard of one organization, in no order."""

    def __init__(self) -> None:
        self.names: set[tuple[Version, str, tuple[bool, str], tuple[bool, str]]] = set()
        self.deletions: set[int] = set()


def tables(deliveries: Iterable[SentEvent], choices: Choices) -> ExpectedTables:
    """Return what the tables hold once all of `deliveries` were applied."""
    deliveries = list(deliveries)
    seen = look_at(deliveries, choices)
    heard = listen_to(deliveries) if choices.organization_source == "membership" else {}
    companies = {id_: company(it) for id_, it in heard.items() if it.names or it.deletions}
    deleted = {clerk_id: min(user.deletions) for clerk_id, user in seen.items() if user.deletions}
    living = {clerk_id: user for clerk_id, user in seen.items() if clerk_id not in deleted}
    holders = holders_of_addresses(living)
    users = {
        clerk_id: living_row(clerk_id, user, holders) for clerk_id, user in living.items() if user.snapshots
    }
    if choices.organization_source == "membership":
        users = {
            clerk_id: row._replace(organization=joined_last(living[clerk_id], companies, choices))
            for clerk_id, row in users.items()
        }
    if choices.user_deletion == "anonymize":
        users |= {
            clerk_id: anonymous_row(clerk_id, seen[clerk_id])
            for clerk_id in deleted
            if seen[clerk_id].snapshots
        }
    waiting = {
        clerk_id: max(user.logins) for clerk_id, user in living.items() if user.logins and not user.snapshots
    }
    memberships = {
        (clerk_id, id_): whole(stays)
        for clerk_id, user in living.items()
        for id_, stays in user.stays.items()
    }
    instances = {clerk_id: max(user.instances) for clerk_id, user in seen.items() if user.instances}
    newest = {clerk_id: newest_snapshot(user) for clerk_id, user in living.items() if user.snapshots}
    profiles = {clerk_id: (it.fields, it.version[0]) for clerk_id, it in newest.items() if it.fields}
    return ExpectedTables(users, deleted, waiting, memberships, companies, instances, profiles)


def look_at(deliveries: Iterable[SentEvent], choices: Choices) -> dict[str, ObservedUser]:
    """Return everything that the deliveries show of each user."""
    seen: dict[str, ObservedUser] = defaultdict(ObservedUser)
    for delivery in deliveries:
        event, data = delivery.event, delivery.event["data"]
        stamp = envelope_time(event)
        if not event["type"].startswith("organization.") and "instance_id" in event:
            seen[subject(event)].instances.add((first(stamp, delivery.received_at), event["instance_id"]))
        if event["type"] == "user.deleted":
            seen[data["id"]].deletions.add(delivery.received_at if stamp is None else stamp)
        elif event["type"].startswith("session.") and data.get("actor") is None:
            seen[data["user_id"]].logins.add(data["created_at"])
        if user := user_in(event):
            look_at_user(seen, user, data["updated_at"] if stamp is None else stamp, choices)
        if choices.organization_source == "membership":
            for shown in memberships_in(delivery):
                seen[shown.clerk_id].stays[shown.membership["id"]].add(stay(shown))
    return seen


def subject(event: Json) -> str:
    """Return the Clerk id that an event is about."""
    data = event["data"]
    return str(data.get("public_user_data", data).get("user_id", data["id"]))


def user_in(event: Json) -> Json | None:
    """Return the user's JSON that an event carries, None when it carries none that counts."""
    data: Json = event["data"]
    if event["type"] in ("user.created", "user.updated"):
        return data
    user: Json | None = data.get("user") if event["type"].startswith("session.") else None
    return user if user and user["id"] == data["user_id"] else None


def look_at_user(seen: dict[str, ObservedUser], user: Json, observed_at: int, choices: Choices) -> None:
    entry = address_entry(user)
    address = entry["email_address"] if isinstance(entry, dict) else entry
    claimed = address if isinstance(address, str) and can_be_stored(address) else None
    metadata = user["public_metadata"]
    role = metadata.get("role") if choices.role_source == "metadata" else None
    organization = metadata.get("organization") if choices.organization_source == "metadata" else None
    snapshot = Snapshot(
        version=(user["updated_at"], observed_at),
        created_at=user["created_at"],
        name=name_of(user, address),
        organization=None if organization is None else as_stored(organization),
        role="admin" if role == "admin" else "user",
        claims=address is not UNKNOWN,
        address=claimed,
        verified=claimed is not None and is_verified(entry),
        fields=fields_of(user, choices.profile_fields) if choices.profile_fields else None,
    )
    seen[user["id"]].snapshots.add(snapshot)
    if user["last_sign_in_at"] is not None:
        seen[user["id"]].logins.add(user["last_sign_in_at"])


def fields_of(user: Json, names: Iterable[str]) -> str:
    """Return those fields of a user as JSON, as PostgreSQL can hold them."""
    return as_json({name: cleaned(user[name]) for name in names if name in user})


def as_json(value: object) -> str:
    """Return a value as JSON, the same for the same value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def cleaned(value: Any) -> Any:
    """Return a value of the histories' without NUL and lone surrogates; numbers have one form."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return int(value) if value == int(value) and -(2**63) <= value < 2**64 else float(value)
    if isinstance(value, str):
        return re.sub("[\ud800-\udfff]", "\ufffd", value.replace("\0", ""))
    if isinstance(value, dict):
        return {cleaned(key): cleaned(value[key]) for key in sorted(value)}
    return [cleaned(item) for item in value] if isinstance(value, list) else value


class Shown(NamedTuple):
    """A membership's JSON, whose it is, when that was seen, and when it ended."""

    clerk_id: str
    membership: Json
    seen_at: int | None
    ended_at: int | None


def memberships_in(delivery: SentEvent) -> list[Shown]:
    event, data = delivery.event, delivery.event["data"]
    stamp = envelope_time(event)
    if event["type"].startswith("organizationMembership."):
        ended_at = first(stamp, delivery.received_at) if event["type"].endswith(".deleted") else None
        return [Shown(data["public_user_data"]["user_id"], data, stamp, ended_at)]
    user = user_in(event) or {}
    shown = user.get("organization_memberships") or []
    return [Shown(user["id"], membership, first(stamp, data["updated_at"]), None) for membership in shown]


def stay(shown: Shown) -> Stay:
    """Return what is said of one membership."""
    joined_at = first(shown.membership.get("created_at"), shown.seen_at, 0)
    role, updated_at = shown.membership.get("role"), shown.membership.get("updated_at")
    if not is_seen(role):
        return Stay(shown.membership["organization"]["id"], joined_at, shown.ended_at)
    updated_at = first(updated_at, shown.seen_at, 0)
    version = (updated_at, first(shown.seen_at, updated_at))
    return Stay(shown.membership["organization"]["id"], joined_at, shown.ended_at, version, as_stored(role))


def whole(stays: set[Stay]) -> Stay:
    """Return what all that was said of one membership comes to."""
    joined_at, organization_id = max((it.joined_at, it.organization_id) for it in stays)
    ends = [it.ended_at for it in stays if it.ended_at is not None]
    roles = [(it.role_version, it.role) for it in stays if it.role_version and it.role]
    version, role = max(roles, default=(None, None))
    return Stay(organization_id, joined_at, min(ends, default=None), version, role)


def listen_to(deliveries: Iterable[SentEvent]) -> dict[str, Heard]:
    """Return everything that the deliveries say of each organization."""
    heard: dict[str, Heard] = defaultdict(Heard)
    for delivery in deliveries:
        event, data = delivery.event, delivery.event["data"]
        stamp = envelope_time(event)
        said = [(shown.membership["organization"], shown.seen_at) for shown in memberships_in(delivery)]
        if event["type"].startswith("organization."):
            said = [(data, stamp)]
        for organization, seen_at in said:
            name, updated_at = organization.get("name"), first(organization.get("updated_at"), seen_at, 0)
            if is_seen(name):
                version = (updated_at, first(seen_at, updated_at))
                slug, image = (maybe_stored(organization.get(key)) for key in ("slug", "image_url"))
                heard[organization["id"]].names.add((version, as_stored(name), slug, image))
        if event["type"] == "organization.deleted":
            heard[data["id"]].deletions.add(first(stamp, delivery.received_at))
    return heard


def company(heard: Heard) -> Company:
    """Return what all that was heard of one organization comes to."""
    deleted_at = min(heard.deletions, default=None)
    if not heard.names:
        return Company(None, None, deleted_at)
    version, name, slug, image = max(heard.names)
    return Company(name, version, deleted_at, slug[1] if slug[0] else None, image[1] if image[0] else None)


def joined_last(user: ObservedUser, companies: Mapping[str, Company], choices: Choices) -> str | None:
    """Return the value of what a user joined last and is in; an organization without one does not count."""
    entered = [
        (it.joined_at, id_.encode(), value)
        for id_, stays in user.stays.items()
        if (it := whole(stays)).ended_at is None
        and it.organization_id in companies
        and companies[it.organization_id].deleted_at is None
        and (value := value_of(it.organization_id, companies[it.organization_id], choices)) is not None
    ]
    return max(entered)[2] if entered else None


def value_of(organization_id: str, company: Company, choices: Choices) -> str | None:
    """Return what the column shows of an organization."""
    return {"name": company.name, "id": organization_id, "slug": company.slug}[choices.organization_value]


def maybe_stored(text: str | None) -> tuple[bool, str]:
    """Return a text in an order where none is the least."""
    return (True, as_stored(text)) if is_seen(text) else (False, "")


def first(*times: int | None) -> int:
    return next(time for time in times if time is not None)


UNKNOWN: Any = object()


def address_entry(user: Json) -> Any:
    """Return the entry of the address that a user's JSON shows, None when there is none, else UNKNOWN."""
    primary, entries = user["primary_email_address_id"], user["email_addresses"]
    if primary is None:
        return next(filter(is_verified, entries), None)
    return next((entry for entry in entries if entry["id"] == primary), UNKNOWN)


def is_verified(entry: Json) -> bool:
    return bool(entry["verification"]) and entry["verification"]["status"] == "verified"


def name_of(user: Json, address: Any) -> str:
    """Return first and last name, else the username, else the part before the @, else a stand-in."""
    full = " ".join(as_stored(part) for part in (user["first_name"], user["last_name"]) if is_seen(part))
    local_part = address.split("@")[0] if isinstance(address, str) and "@" in address else None
    others = (text for text in (user["username"], local_part) if is_seen(text))
    return as_stored(full or next(others, "Unnamed user"))


def is_seen(text: str | None) -> TypeGuard[str]:
    """Say whether a reader sees anything of the histories' `text`."""
    return bool(text) and any(character not in "\0 \u200b\u3164\ufeff" for character in text or "")


def as_stored(text: str) -> str:
    """Return `text` as PostgreSQL holds it."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text.replace("\0", ""))[:255]


def can_be_stored(address: str) -> bool:
    """Say whether the histories' `address` is one that a user can claim."""
    looks_like_one = re.fullmatch(r"[^@\s]+@[^@\s]+\.[^@\s]{2,}", address)
    return bool(looks_like_one) and len(address) <= 255 and not address.endswith("@placeholder.invalid")


def envelope_time(event: Json) -> int | None:
    """Return the envelope's timestamp in ms, None when it has none."""
    timestamp: int | None = event.get("timestamp")
    return timestamp * 1000 if timestamp is not None and timestamp < 1e11 else timestamp


def newest_snapshot(user: ObservedUser) -> Snapshot:
    """Return the newest; of those with one version the greatest as stored, none being the least."""
    return max(
        user.snapshots,
        key=lambda s: (
            s.version,
            s.created_at,
            s.name,
            s.organization is not None,
            s.organization or "",
            s.role,
            s.fields or "",
        ),
    )


def newest_claim(user: ObservedUser) -> ModelClaim | None:
    """Return the newest word on the user's address, None when there is none."""
    claims = [ModelClaim(s.version, s.address, s.verified) for s in user.snapshots if s.claims]
    return max(
        claims, key=lambda c: (c.version, c.address is not None, c.address or "", c.verified), default=None
    )


def holders_of_addresses(living: dict[str, ObservedUser]) -> dict[str, str]:
    """Return who has each address: verified claims first, then the greatest version, then the greatest id."""
    claims = [(clerk_id, claim) for clerk_id, user in living.items() if (claim := newest_claim(user))]
    return {
        claim.address: clerk_id
        for clerk_id, claim in sorted(claims, key=lambda c: (c[1].verified, c[1].version, c[0].encode()))
        if claim.address is not None
    }


def living_row(clerk_id: str, user: ObservedUser, holders: dict[str, str]) -> Row:
    newest, claim = newest_snapshot(user), newest_claim(user)
    address = claim.address if claim else None
    return Row(
        clerk_id=clerk_id,
        email=address if address and holders[address] == clerk_id else f"{clerk_id}@placeholder.invalid",
        name=newest.name,
        organization=newest.organization,
        role=newest.role,
        created_at=newest.created_at,
        last_login_at=max(user.logins, default=None),
    )


def anonymous_row(clerk_id: str, user: ObservedUser) -> Row:
    created_at = newest_snapshot(user).created_at
    return Row(clerk_id, f"{clerk_id}@placeholder.invalid", "Deleted user", None, "user", created_at, None)

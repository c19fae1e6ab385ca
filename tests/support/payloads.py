"""Builders of Clerk's webhook bodies: sensible by default, any field can be overridden or left out.

    user_event("user.updated", user(BEN, email=None, last_name=ABSENT), timestamp=NOW + 5)
    session_event("session.ended", session(BEN, user=user(BEN)))
    deleted_event(BEN, timestamp=ABSENT)
    membership_event("organizationMembership.deleted", membership(BEN, organization(name="Acme")))
    organization_event("organization.deleted", dissolved())

All times are ms. Defaults come from `cli/samples.json`; bodies as Clerk has sent them are in `payloads/`.
"""

import hashlib
import json
import secrets
from functools import cache
from pathlib import Path
from types import EllipsisType
from typing import Any, Final

from cli import samples

Json = dict[str, Any]

PAYLOADS = Path(__file__).parents[1] / "payloads"


class _Absent:
    """Says of a field that it is left out; the same name in every process that collects the tests."""

    def __repr__(self) -> str:
        return "ABSENT"


ABSENT: Final = _Absent()
NOW = 1_767_261_600_000  # 2026-01-01T10:00:00Z
ANN = "user_37RwAqYkLz3TnVbXc8MoHsGpUdE"
BEN = "user_37RwB5tQvKx0WmZcNy9LrGuJsPo"
CAT = "user_37RwCz7HfTb2YkRnXq4MvLsEpAi"
ACME = "org_37RxD4nGwVq8LsTbYk2ZcJhPmUe"
INSTANCE = "ins_36ZkPq8WvTn2LcXyRb5HdGmUsJa"
NAMED = {"first_name": "Marisol", "last_name": "Okonkwo"}
BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def payload(name: str) -> Json:
    """Return the event in `payloads/<name>.json`."""
    event: Json = json.loads(_payload_text(name))
    return event


def user(clerk_id: object = ANN, email: str | EllipsisType | None = ..., **fields: Any) -> Json:
    """Return Clerk's JSON of a user with one verified primary address (`<clerk_id>@example.com`) or none."""
    address = f"{clerk_id}@example.com" if email is ... else email
    entries = [] if address is None else [email_entry(address)]
    defaults = {
        "id": clerk_id,
        "email_addresses": entries,
        "primary_email_address_id": entries[0]["id"] if entries else None,
        "created_at": NOW,
        "updated_at": NOW + 20,
    }
    return _replaced(samples.template("user"), {**NAMED, **defaults, **fields})


def email_entry(address: object, *, verified: bool = True, **fields: Any) -> Json:
    """Return an entry of `email_addresses`; its id is a function of the address (see `email_id`)."""
    entry: Json = samples.template("user")["email_addresses"][0]
    verification = entry["verification"] if verified else None
    defaults = {"id": email_id(address), "email_address": address, "verification": verification}
    return _replaced(entry, {**defaults, **fields})


def email_id(address: object) -> str:
    """Return the id that `email_entry` gives to `address`."""
    return f"idn_{hashlib.sha256(ascii(address).encode()).hexdigest()[:27]}"


def session(clerk_id: object = ANN, **fields: Any) -> Json:
    """Return Clerk's JSON of a session of that user; without `user`, which only newer bodies carry."""
    defaults = {"user_id": clerk_id, "user": ABSENT, "created_at": NOW, "updated_at": NOW + 30}
    return _replaced(samples.template("session"), {**defaults, **fields})


def organization(organization_id: object = ACME, name: object = "Acme", **fields: Any) -> Json:
    """Return Clerk's JSON of an organization with that name."""
    defaults = {"id": organization_id, "name": name, "created_at": NOW, "updated_at": NOW}
    return _replaced(samples.template("organization"), {**defaults, **fields})


def dissolved(organization_id: object = ACME) -> Json:
    """Return what Clerk says of an organization that was deleted."""
    return _replaced(samples.deleted("", "organization"), {"id": organization_id})


def membership(clerk_id: object = ANN, of: Json | None = None, **fields: Any) -> Json:
    """Return Clerk's JSON of that user's membership of `of` (default: `organization()`)."""
    template = samples.template("membership")
    defaults = {
        "organization": organization() if of is None else of,
        "public_user_data": _replaced(template["public_user_data"], {"user_id": clerk_id}),
        "created_at": NOW + 50,
        "updated_at": NOW + 50,
    }
    return _replaced(template, {**defaults, **fields})


def user_event(type_: str = "user.created", data: object = None, **envelope: Any) -> Json:
    """Return an event about `data` (default: `user()`); `envelope` overrides the fields around it."""
    return _event(type_, user() if data is None else data, envelope)


def session_event(type_: str = "session.created", data: object = None, **envelope: Any) -> Json:
    """Return an event about `data` (default: `session()`); `envelope` overrides the fields around it."""
    return _event(type_, session() if data is None else data, envelope)


def membership_event(
    type_: str = "organizationMembership.created", data: object = None, **envelope: Any
) -> Json:
    """Return an event about `data` (default: `membership()`); `envelope` overrides the fields around it."""
    return _event(type_, membership() if data is None else data, envelope)


def organization_event(type_: str = "organization.updated", data: object = None, **envelope: Any) -> Json:
    """Return an event about `data` (default: `organization()`); `envelope` overrides the fields around it."""
    return _event(type_, organization() if data is None else data, envelope)


def deleted_event(clerk_id: object = ANN, **envelope: Any) -> Json:
    """Return the event that tells the deletion of that user; `envelope` overrides the fields around it."""
    data = _replaced(samples.deleted(""), {"id": clerk_id})
    return _event("user.deleted", data, envelope)


def body(event: object) -> bytes:
    """Return `event` as the bytes that are sent: compact JSON in UTF-8, lone surrogates escaped."""
    text = json.dumps(event, separators=(",", ":"), ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace")


def svix_id() -> str:
    """Return a new message id, as Svix makes them."""
    return "msg_" + "".join(secrets.choice(BASE62) for _ in range(27))


def _event(type_: str, data: object, envelope: dict[str, object]) -> Json:
    updated_at = data.get("updated_at") if isinstance(data, dict) else None
    # Clerk stamps the envelope some ms after the change.
    timestamp = updated_at + 15 if isinstance(updated_at, int) else NOW
    defaults = {"type": type_, "data": data, "timestamp": timestamp, "instance_id": INSTANCE}
    return _replaced(samples.template("event"), {**defaults, **envelope})


def _replaced(template: Json, fields: dict[str, object]) -> Json:
    return {key: value for key, value in {**template, **fields}.items() if value is not ABSENT}


@cache
def _payload_text(name: str) -> str:
    return (PAYLOADS / f"{name}.json").read_text(encoding="utf-8")

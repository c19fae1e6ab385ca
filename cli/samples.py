"""Sample deliveries in Clerk's format, for `send` and the demo: bodies, ids and signatures.

`samples.json` has every field of each object. Every address is at example.com. All times are ms.
"""

import hmac
import json
import random
import re
import secrets
import string
from base64 import b64encode
from functools import cache
from importlib.resources import files
from typing import Any
from zlib import crc32

Json = dict[str, Any]

INSTANCE = "ins_36ZkPq8WvTn2LcXyRb5HdGmUsJa"
SIGNED_UP = 1_735_725_600_000  # 2025-01-01: every user of `send`
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
FIRST_NAMES = ("Amara", "Bruno", "Chiara", "Dmitri", "Elif", "Farid", "Greta", "Hana", "Ines", "Jonas")
LAST_NAMES = ("Okafor", "Lindgren", "Moreau", "Tanaka", "Silva", "Novak", "Haddad", "Reyes", "Byrne")


def sample(type_: str, clerk_id: str, now: int, instance_id: str = INSTANCE) -> Json:
    """Return an event about that user, or about the user's organization, that happens at `now`.

    All samples about one user agree: same name, address, creation time and organization.
    """
    data, just_now = _person(clerk_id), now - 15
    match type_.split("."):
        case ["user", "updated"]:
            metadata = {"role": "admin", "organization": "Example Ltd"}
            data |= {"public_metadata": metadata, "updated_at": just_now}
        case ["user", "deleted"]:
            data = deleted(clerk_id)
        case ["session", "created" | "pending" as what]:
            data = session(clerk_id, now - 40, what, user=data)
        case ["session", what]:
            times = {"last_active_at": now - MINUTE, "updated_at": just_now}
            data = session(clerk_id, now - HOUR, what, user=data, **times)
        case ["organizationMembership", what]:
            data = _membership(data)
            if what == "updated":
                data |= {"role": "org:admin", "role_name": "Admin", "updated_at": just_now}
        case ["organization", "updated"]:
            data = _company(clerk_id)
            data |= {"name": data["name"].replace("Ltd", "Group"), "updated_at": just_now}
        case ["organization", "deleted"]:
            data = deleted(_company(clerk_id)["id"], "organization")
    return event(type_, data, now, instance_id)


def event(type_: str, data: Json, timestamp: int, instance_id: str) -> Json:
    """Return `data` in Clerk's envelope; `timestamp` is when it happened."""
    return template("event") | {
        "data": data,
        "instance_id": instance_id,
        "timestamp": timestamp,
        "type": type_,
    }


def template(name: str) -> Json:
    """Return a new copy of the event, user, session, organization or membership in `samples.json`."""
    copy: Json = json.loads(_template(name))
    return copy


def user(clerk_id: str, created_at: int, email: str | None, **fields: Any) -> Json:
    """Return Clerk's JSON of a user with one verified address or none; `fields` are added or replaced."""
    made = template("user")
    (entry,) = made["email_addresses"]
    entry |= {"id": new_id("idn"), "email_address": email, "created_at": created_at}
    # Clerk updates a user once more while creating it.
    made |= {"id": clerk_id, "created_at": created_at, "updated_at": created_at + 24}
    made["primary_email_address_id"] = entry["id"]
    if email is None:
        made |= {"email_addresses": [], "primary_email_address_id": None}
    return made | fields


def session(clerk_id: str, created_at: int, what: str, **fields: Any) -> Json:
    """Return Clerk's JSON of a session that began at `created_at`, in the event `session.<what>`."""
    known = {"id": new_id("sess"), "user_id": clerk_id, "status": "active" if what == "created" else what}
    times = {"created_at": created_at, "updated_at": created_at + 31, "expire_at": created_at + 7 * DAY}
    return template("session") | known | times | fields


def deleted(id_: str, object_: str = "user") -> Json:
    """Return Clerk's JSON of a deleted user or other object."""
    return {"deleted": True, "external_id": None, "id": id_, "object": object_}


def encode(event_: Json) -> bytes:
    """Return an event as the bytes that are sent and signed."""
    return json.dumps(event_, separators=(",", ":"), ensure_ascii=False).encode()


def signed_headers(key: bytes, svix_id: str, timestamp_s: int, body: bytes) -> dict[str, str]:
    """Return the headers that Svix sends with `body`: `timestamp_s` is the time of the attempt, in s.

    Source: docs.svix.com, "Verifying webhooks manually".
    """
    signed = f"{svix_id}.{timestamp_s}.".encode() + body
    signature = b64encode(hmac.digest(key, signed, "sha256")).decode()
    return {
        "content-type": "application/json",
        "svix-id": svix_id,
        "svix-timestamp": str(timestamp_s),
        "svix-signature": f"v1,{signature}",
    }


def new_id(prefix: str) -> str:
    """Return a new id in the form of Clerk's and Svix's."""
    letters = string.ascii_letters + string.digits
    return f"{prefix}_{''.join(secrets.choice(letters) for _ in range(27))}"


@cache
def _template(name: str) -> str:
    return json.dumps(json.loads(files("cli").joinpath("samples.json").read_text(encoding="utf-8"))[name])


def _person(clerk_id: str) -> Json:
    """Return the user at sign-up; everything is derived from the id."""
    chance = random.Random(clerk_id)  # noqa: S311 - picks names, keeps no secret
    first_name, last_name = chance.choice(FIRST_NAMES), chance.choice(LAST_NAMES)
    address = f"{first_name}.{last_name}.{crc32(clerk_id.encode()):08x}@example.com".lower()
    return user(clerk_id, SIGNED_UP, address, first_name=first_name, last_name=last_name)


def _company(clerk_id: str) -> Json:
    """Return the user's organization since sign-up; everything is derived from the user's id."""
    chance = random.Random(f"organization of {clerk_id}")  # noqa: S311 - picks names, keeps no secret
    name = f"{' & '.join(chance.sample(LAST_NAMES, 2))} Ltd"
    slug = re.sub("[^a-z0-9]+", "-", name.lower())
    return template("organization") | {"id": _id_of_theirs("org", clerk_id), "name": name, "slug": slug}


def _membership(person: Json) -> Json:
    made = template("membership") | {
        "id": _id_of_theirs("orgmem", person["id"]),
        "organization": _company(person["id"]),
    }
    made["public_user_data"] |= {
        "first_name": person["first_name"],
        "identifier": person["email_addresses"][0]["email_address"],
        "last_name": person["last_name"],
        "user_id": person["id"],
    }
    return made


def _id_of_theirs(prefix: str, clerk_id: str) -> str:
    return f"{prefix}_{clerk_id.removeprefix('user_')}"

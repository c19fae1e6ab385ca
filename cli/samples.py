"""Made-up deliveries as Clerk sends them, for `send` and the demo: bodies, ids and signatures.

Every address is at example.com and every telephone number one that is kept for fiction. All times are ms.
"""

import hmac
import json
import random
import re
import secrets
from base64 import b64encode
from collections.abc import Callable
from typing import Any, NamedTuple
from zlib import crc32

Json = dict[str, Any]

INSTANCE = "ins_36ZkPq8WvTn2LcXyRb5HdGmUsJa"
BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
KSUID = re.compile(r"[a-z]+_([0-9A-Za-z]{27})")
KSUID_EPOCH_S = 1_400_000_000
LONG_AGO = 1_735_725_600_000  # 2025-01-01, for users whose id does not tell when it was made
SECOND, MINUTE, HOUR, DAY = 1_000, 60_000, 3_600_000, 86_400_000
FIRST_NAMES = ("Amara", "Bruno", "Chiara", "Dmitri", "Elif", "Farid", "Greta", "Hana", "Ines", "Jonas")
LAST_NAMES = ("Okafor", "Lindgren", "Moreau", "Tanaka", "Silva", "Novak", "Haddad", "Reyes", "Byrne")
BROWSER = "Mozilla/5.0 (X11; Linux x86_64; rv:145.0) Gecko/20100101 Firefox/145.0"


class SampleTimes(NamedTuple):
    """The user that a sample is about, and when it is sent (ms)."""

    clerk_id: str
    now: int


def sample(type_: str, clerk_id: str, now: int, instance_id: str = INSTANCE) -> Json:
    """Return an event about that user, or about the organization that they are in, as it would be at `now`.

    Samples about one user fit together: same name, same address, same creation, same organization. Raises
    KeyError for a type that is not in TYPES.
    """
    return event(type_, _SAMPLES[type_](SampleTimes(clerk_id, now)), now, instance_id)


def event(type_: str, data: Json, timestamp: int, instance_id: str = INSTANCE) -> Json:
    """Return `data` in Clerk's envelope; `timestamp` is when it happened."""
    return {
        "data": data,
        "event_attributes": {"http_request": {"client_ip": "203.0.113.57", "user_agent": BROWSER}},
        "instance_id": instance_id,
        "object": "event",
        "timestamp": timestamp,
        "type": type_,
    }


def user(clerk_id: str, created_at: int, email: str | None, **fields: Any) -> Json:
    """Return Clerk's JSON of a user, one verified address or none; `fields` add to it or replace."""
    addresses = [] if email is None else [email_entry(email, created_at)]
    return {
        "backup_code_enabled": False,
        "banned": False,
        "bypass_client_trust": False,
        "create_organization_enabled": True,
        "create_organizations_limit": None,
        "created_at": created_at,
        "delete_self_enabled": True,
        "deprovisioned": False,
        "email_addresses": addresses,
        "enterprise_accounts": [],
        "external_accounts": [],
        "external_id": None,
        "first_name": None,
        "has_image": False,
        "id": clerk_id,
        "image_url": "https://img.clerk.com/eyJ0eXBlIjoiZGVmYXVsdCJ9",
        "last_active_at": created_at,
        "last_name": None,
        "last_sign_in_at": None,
        "legal_accepted_at": None,
        "locale": None,
        "locked": False,
        "lockout_expires_in_seconds": None,
        "mfa_disabled_at": None,
        "mfa_enabled_at": None,
        "object": "user",
        "organization_memberships": None,
        "passkeys": [],
        "password_enabled": True,
        "password_last_updated_at": created_at,
        "phone_numbers": [],
        "primary_email_address_id": addresses[0]["id"] if addresses else None,
        "primary_phone_number_id": None,
        "primary_web3_wallet_id": None,
        "private_metadata": {},
        "public_metadata": {},
        "timezone": None,
        "totp_enabled": False,
        "two_factor_enabled": False,
        "unsafe_metadata": {},
        "updated_at": created_at + 24,  # Clerk touches a user once more while it creates them
        "username": None,
        "verification_attempts_remaining": 100,
        "web3_wallets": [],
        **fields,
    }


def email_entry(address: str, created_at: int) -> Json:
    """Return a verified entry of `email_addresses`."""
    return {
        "created_at": created_at,
        "email_address": address,
        "id": new_id("idn", created_at),
        "linked_to": [],
        "matches_sso_connection": False,
        "object": "email_address",
        "reserved": False,
        "updated_at": created_at + 11,
        "verification": _verification("email_code", created_at),
    }


def phone_entry(number: str, created_at: int) -> Json:
    """Return a verified entry of `phone_numbers`."""
    return {
        "backup_codes": None,
        "created_at": created_at,
        "default_second_factor": False,
        "id": new_id("idn", created_at),
        "linked_to": [],
        "object": "phone_number",
        "phone_number": number,
        "reserved": False,
        "reserved_for_second_factor": False,
        "updated_at": created_at + 11,
        "verification": _verification("phone_code", created_at),
    }


def session(clerk_id: str, created_at: int, **fields: Any) -> Json:
    """Return Clerk's JSON of a session that began at `created_at`; `fields` add to it or replace."""
    return {
        "abandon_at": created_at + 30 * DAY,
        "actor": None,
        "client_id": new_id("client", created_at),
        "created_at": created_at,
        "expire_at": created_at + 7 * DAY,
        "id": new_id("sess", created_at),
        "last_active_at": created_at,
        "last_active_organization_id": None,
        "latest_activity": {
            "browser_name": "Firefox",
            "browser_version": "145.0",
            "city": "Porto",
            "country": "PT",
            "device_type": "Linux",
            "id": new_id("sess_activity", created_at),
            "ip_address": "203.0.113.57",
            "is_mobile": False,
            "object": "session_activity",
        },
        "object": "session",
        "status": "active",
        "updated_at": created_at + 31,
        "user": None,
        "user_id": clerk_id,
        **fields,
    }


def organization(organization_id: str, created_at: int, name: str, **fields: Any) -> Json:
    """Return Clerk's JSON of an organization; `fields` add to it or replace."""
    return {
        "admin_delete_enabled": True,
        "created_at": created_at,
        "has_image": False,
        "id": organization_id,
        "image_url": "https://img.clerk.com/eyJ0eXBlIjoiZGVmYXVsdCJ9",
        "max_allowed_memberships": 5,
        "name": name,
        "object": "organization",
        "private_metadata": {},
        "public_metadata": {},
        "slug": re.sub("[^a-z0-9]+", "-", name.lower()),
        "updated_at": created_at,
        **fields,
    }


def membership(id_: str, user_: Json, organization_: Json, created_at: int, **fields: Any) -> Json:
    """Return Clerk's JSON of a membership that began at `created_at`; `fields` add to it or replace."""
    return {
        "created_at": created_at,
        "id": id_,
        "object": "organization_membership",
        "organization": organization_,
        "permissions": [],
        "private_metadata": {},
        "public_metadata": {},
        "public_user_data": {
            "first_name": user_["first_name"],
            "has_image": user_["has_image"],
            "identifier": user_["email_addresses"][0]["email_address"],
            "image_url": user_["image_url"],
            "last_name": user_["last_name"],
            "user_id": user_["id"],
            "username": user_["username"],
        },
        "role": "org:member",
        "role_name": "Member",
        "updated_at": created_at,
        **fields,
    }


def deleted(id_: str, object_: str = "user") -> Json:
    """Return what Clerk says of a user who was deleted, or of another object."""
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


def new_id(prefix: str, made_at_: int) -> str:
    """Return a fresh id of Clerk's and Svix's form: a prefix and a KSUID, which begins with its time."""
    number = (made_at_ // SECOND - KSUID_EPOCH_S) << 128 | secrets.randbits(128)
    digits = ""
    for _ in range(27):
        number, digit = divmod(number, 62)
        digits = BASE62[digit] + digits
    return f"{prefix}_{digits}"


def new_clerk_id(type_: str, now: int) -> str:
    """Return a fresh id of a user for such an event; only `user.created` is about a new one."""
    return new_id("user", now if type_ == "user.created" else now - DAY)


def made_at(id_: str, now: int) -> int:
    """Return when an id was made, to the second; for one that does not tell, a fixed time."""
    found = KSUID.fullmatch(id_)
    if not found:
        return LONG_AGO
    number = 0
    for digit in found[1]:
        number = number * 62 + BASE62.index(digit)
    at = ((number >> 128) + KSUID_EPOCH_S) * SECOND
    return at if at <= now else LONG_AGO


def _verification(strategy: str, at: int) -> Json:
    return {
        "attempts": 1,
        "channel": None,
        "error": None,
        "expire_at": at + 10 * MINUTE,
        "object": "verification_otp",
        "status": "verified",
        "strategy": strategy,
    }


def _person(moment: SampleTimes, **fields: Any) -> Json:
    """Return the user as they signed up; the id decides everything."""
    created_at = made_at(moment.clerk_id, moment.now)
    chance = random.Random(moment.clerk_id)  # noqa: S311 - picks names, keeps no secret
    first_name, last_name = chance.choice(FIRST_NAMES), chance.choice(LAST_NAMES)
    mark = f"{crc32(moment.clerk_id.encode()):08x}"
    return user(
        moment.clerk_id,
        created_at,
        f"{first_name}.{last_name}.{mark}@example.com".lower(),
        first_name=first_name,
        last_name=last_name,
        **fields,
    )


def _promoted(moment: SampleTimes) -> Json:
    return _person(
        moment,
        public_metadata={"role": "admin", "organization": "Example Ltd"},
        updated_at=moment.now - 15,
    )


def _deleted(moment: SampleTimes) -> Json:
    return deleted(moment.clerk_id)


def _company(moment: SampleTimes, **fields: Any) -> Json:
    """Return the organization that the user has been in since they signed up; the user's id decides all."""
    chance = random.Random(f"organization of {moment.clerk_id}")  # noqa: S311 - picks names, keeps no secret
    name = " & ".join(chance.sample(LAST_NAMES, 2))
    created_at = made_at(moment.clerk_id, moment.now)
    return organization(_id_of_theirs("org", moment), created_at, f"{name} Ltd", **fields)


def _joined(moment: SampleTimes, **fields: Any) -> Json:
    person, company = _person(moment), _company(moment)
    return membership(_id_of_theirs("orgmem", moment), person, company, person["created_at"], **fields)


def _promoted_member(moment: SampleTimes) -> Json:
    return _joined(moment, role="org:admin", role_name="Admin", updated_at=moment.now - 15)


def _renamed_company(moment: SampleTimes) -> Json:
    company = _company(moment, updated_at=moment.now - 15)
    return {**company, "name": company["name"].replace("Ltd", "Group")}


def _deleted_company(moment: SampleTimes) -> Json:
    return deleted(_id_of_theirs("org", moment), "organization")


def _id_of_theirs(prefix: str, moment: SampleTimes) -> str:
    return f"{prefix}_{moment.clerk_id.removeprefix('user_')}"


def _new_session(status: str) -> Callable[[SampleTimes], Json]:
    def build(moment: SampleTimes) -> Json:
        return session(moment.clerk_id, moment.now - 40, status=status, user=_person(moment))

    return build


def _old_session(status: str) -> Callable[[SampleTimes], Json]:
    def build(moment: SampleTimes) -> Json:
        return session(
            moment.clerk_id,
            moment.now - HOUR,
            last_active_at=moment.now - MINUTE,
            status=status,
            updated_at=moment.now - 15,
            user=_person(moment),
        )

    return build


_SAMPLES: dict[str, Callable[[SampleTimes], Json]] = {
    "user.created": _person,
    "user.updated": _promoted,
    "user.deleted": _deleted,
    "session.created": _new_session("active"),
    "session.pending": _new_session("pending"),
    "session.ended": _old_session("ended"),
    "session.removed": _old_session("removed"),
    "session.revoked": _old_session("revoked"),
    "organizationMembership.created": _joined,
    "organizationMembership.updated": _promoted_member,
    "organizationMembership.deleted": _joined,
    "organization.updated": _renamed_company,
    "organization.deleted": _deleted_company,
}

TYPES = tuple(_SAMPLES)

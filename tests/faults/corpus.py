"""A corpus of every known shape of Clerk's bodies, and strategies to corrupt them."""

import copy
import json
from functools import cache
from typing import Any

from hypothesis import strategies as st

from tests.support.payloads import (
    ABSENT,
    ANN,
    BEN,
    NOW,
    PAYLOADS,
    Json,
    body,
    deleted_event,
    email_entry,
    session,
    session_event,
    user,
    user_event,
)

BOM = b"\xef\xbb\xbf"
ENTRY = email_entry("ann@example.com")
UNVERIFIED = email_entry("old@example.com", verified=False)
CODE = {"object": "email", "id": "ema_1", "body": "Your code is 123456", "data": {"otp_code": "123456"}}
DEEP: Any = json.loads("[" * 500 + "]" * 500)


@cache
def corpus() -> tuple[Json, ...]:
    """Return an event of every shape."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(PAYLOADS.rglob("*.json"))]
    return (*files, *map(user_event, USER_TYPES, USERS), *SESSIONS, *DELETIONS, *ENVELOPES, *OTHERS)


USERS = (
    user(first_name=None, last_name=None, username=None),
    user(first_name="", last_name="", username=""),
    user(email=None, phone_numbers=[{"phone_number": "+15555550100"}]),
    user(email=None, web3_wallets=[{"web3_wallet": "0x0"}]),
    user(email_addresses=[UNVERIFIED, ENTRY], primary_email_address_id=ENTRY["id"]),
    user(email_addresses=[UNVERIFIED, ENTRY], primary_email_address_id=None),
    user(email_addresses=[UNVERIFIED], primary_email_address_id="idn_unlisted"),
    user(email_addresses=[], primary_email_address_id=ENTRY["id"]),
    user(public_metadata={"role": "admin", "organization": "Acme"}, unsafe_metadata={"role": "admin"}),
    user(public_metadata={"role": ["admin"], "organization": {"name": "\0"}}, private_metadata=None),
    user(public_metadata={"organization": "\0\ud800" + "o" * 400, "deep": DEEP}),
    user(last_sign_in_at=NOW, last_active_at=NOW, banned=True, locked=True, lockout_expires_in_seconds=3),
    user(first_name="n" * 100_000, profile_image_url="\ud800", external_id="\0"),
    user(created_at=0, updated_at=253_402_214_399_999),
)
USER_TYPES = tuple("user.created" if i % 2 else "user.updated" for i in range(len(USERS)))
SESSIONS = (
    *(session_event(f"session.{what}") for what in ("created", "pending", "ended", "removed", "revoked")),
    session_event(data=session(user=None)),
    session_event(data=session(user=user())),
    session_event(data=session(ANN, user=user(BEN))),
    session_event(data=session(actor={"sub": "user_staff", "iss": "https://clerk.example"})),
    session_event(data=session(actor=ABSENT, latest_activity=None)),
)
DELETIONS = (
    deleted_event(),
    deleted_event(timestamp=ABSENT),
    deleted_event(ABSENT),
    user_event("user.deleted", {"id": ANN, "object": "user", "deleted": True, "external_id": "ours-1"}),
)
ENVELOPES = (
    user_event(timestamp=NOW // 1000),
    user_event(timestamp=ABSENT, instance_id=ABSENT, event_attributes=ABSENT),
    *(
        user_event(event_attributes={"http_request": {"client_ip": ip, "user_agent": ""}})
        for ip in ("", "203.0.113.7", "2001:db8::1")
    ),
)
OTHERS = (
    {"object": "event", "type": "email.created", "data": CODE},
    {"object": "event", "type": "sms.created", "data": CODE},
    {"object": "event", "type": "user.banned", "data": user()},
    {"object": "event", "type": "session.expired", "data": session()},
)

leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 2**31, 2**53, 2**63, 10**400, 253_402_300_800_000, 0.5, -0.0, 1e300])
    | st.floats(allow_nan=True, allow_infinity=True)
    | st.text(max_size=20)
    | st.sampled_from(["", "\0", "\ud800", "\udc00\ud800", "a" * 300, "user_" * 60, "\U0001f600", "1e5", ANN])
)
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def corrupted_events(draw: st.DrawFn) -> Any:
    """Draw an event of the corpus with up to three corrupted values."""
    event = copy.deepcopy(draw(st.sampled_from(corpus())))
    for _ in range(draw(st.integers(0, 3))):
        _corrupt(draw, event)
    return event


def _corrupt(draw: st.DrawFn, node: Any) -> None:
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = draw(st.sampled_from(keys))
        if not isinstance(node[key], dict | list) or draw(st.integers(0, 4)) == 0:
            break
        node = node[key]
    if draw(st.integers(0, 3)) == 0:
        del node[key]
    else:
        node[key] = draw(values)


def bodies() -> st.SearchStrategy[bytes]:
    """Draw a body: mostly a corrupted event, in one of the ways to write it."""
    events = corrupted_events()
    written = events.map(body)
    return st.one_of(
        written,
        written,
        events.map(lambda event: json.dumps(event, indent=2).encode()),
        events.map(lambda event: BOM + body(event)),
        st.builds(_with_a_second, written, values),
        st.builds(lambda content, length: content[:length], written, st.integers(0, 400)),
        values.map(lambda value: json.dumps(value).encode()),
        st.binary(max_size=200),
    )


def _with_a_second(content: bytes, data: object) -> bytes:
    return content[:-1] + b',"type":"user.created","data":' + json.dumps(data).encode() + b"}"

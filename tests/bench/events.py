"""The traffic of the measurements: a made-up company's users signing up, changing and signing in."""

import json
import random
from collections.abc import Iterator
from typing import NamedTuple

from tests.support import payloads

HOUR_MS = 3_600_000


class SampleEvent(NamedTuple):
    """One delivery's svix-id, body, and the description its job gets."""

    svix_id: str
    body: str
    description: str


def traffic(count: int, *, seed: int, existing: int = 0) -> Iterator[SampleEvent]:
    """Yield `count` events. Of ten, two are sign-ups, three changes, five sign-ins (two with the user).

    They concern users who sign up in them, and the `existing` users that big_table.py adds. The same seed
    gives the same events; a greater seed gives other svix-ids, other new users, and later times.
    """
    draw = random.Random(seed)
    began = payloads.NOW + seed * HOUR_MS
    users = existing
    for i in range(count):
        kind = draw.random()
        number = draw.randrange(users) if users else 0
        if users == 0 or kind < 0.2:
            event = payloads.user_event("user.created", _user(users, seed, existing, began + i))
            users += 1
        elif kind < 0.5:
            event = payloads.user_event("user.updated", _user(number, seed, existing, began + i))
        else:
            session = _session(number, seed, existing, began + i, with_user=kind < 0.7)
            event = payloads.session_event("session.created", session)
        subject = event["data"].get("user_id") or event["data"]["id"]
        body = json.dumps(event, separators=(",", ":"))
        yield SampleEvent(svix_id(seed, i), body, f"{event['type']} {subject}")


def svix_id(seed: int, index: int) -> str:
    """Return the svix-id of one of the events of a seed."""
    return f"msg_{seed:03}{index:024}"


def _user(number: int, seed: int, existing: int, updated_at: int) -> payloads.Json:
    company = seed if number >= existing else 0  # as in big_table.py
    return payloads.user(
        f"user_bench{company:03}{number:018}",
        f"bench{company}.{number}@example.com",
        created_at=payloads.NOW,
        updated_at=updated_at,
        last_name=f"No {number}",
    )


def _session(number: int, seed: int, existing: int, at: int, *, with_user: bool) -> payloads.Json:
    user = _user(number, seed, existing, payloads.NOW)
    fields = {"user": user} if with_user else {}
    return payloads.session(user["id"], created_at=at, updated_at=at, **fields)

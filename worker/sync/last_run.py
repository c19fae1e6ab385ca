"""What the last reconciliation that a worker ran by itself did: the key `clerk-sync:reconcile` in Redis.

A JSON object, for health, metrics and console:

    started_at, finished_at   ISO 8601, UTC
    error                     the line that says why it failed, null when it did not
    backfill                  seen, created, updated, unchanged, invalid, refused, memberships: numbers, null
                              when it failed
    drift                     listed, local, missing, stale, ghost, claims, tombstone: numbers, of those who
                              differ still; merged: how many differed and do not any more; refusal: the line
                              that says why the listing proves nothing, or null; null when it failed
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, cast

from redis import Redis

KEY = "clerk-sync:reconcile"
KINDS = ("missing", "stale", "ghost", "claims", "tombstone")
WAYS = ("created", "updated", "merged")  # the last: found to differ when all were compared, and read by id
INTERVALS_LATE = 2  # a run that is due for longer is reported as overdue


class Result(StrEnum):
    """How a reconciliation ended."""

    OK = "ok"
    REFUSED = "refused"  # the listing proves nothing, or too many would have to be deleted
    FAILED = "failed"


def load(redis: Redis) -> dict[str, Any] | None:
    """Return what the last reconciliation did, None when there was none. Raises RedisError."""
    return parse(cast("bytes | None", redis.get(KEY)))


def parse(kept: bytes | None) -> dict[str, Any] | None:
    """Return the stored reconciliation, None if it is malformed."""
    try:
        found = json.loads(kept or b"null")
        for name in ("started_at", "finished_at"):
            datetime.fromisoformat(found[name])
        drift = found["drift"]
        known = drift is None or {"refusal", *KINDS} <= drift.keys()
        return found if known and {"error", "backfill"} <= found.keys() else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def keep(redis: Redis, result: dict[str, Any]) -> None:
    """Keep the result of a reconciliation in place of the last one's. Raises RedisError."""
    redis.set(KEY, json.dumps(result))


def summary(last: Mapping[str, Any] | None, every_s: float, since: datetime) -> dict[str, Any]:
    """Return the summary of the last reconciliation, one of which runs every `every_s`.

    `synced` is how many users it changed; `differing` is how many it found to differ all the same; `overdue`
    says that none has ended for so long, since the last one or, where there was none, since then.
    """
    finished_at = datetime.fromisoformat(last["finished_at"]) if last else since
    late_s = (datetime.now(UTC) - finished_at).total_seconds() - every_s
    drift = last["drift"] if last else None
    return {
        "every_s": every_s,
        "finished_at": last["finished_at"] if last else None,
        "seconds": seconds(last) if last else None,
        "result": result(last) if last else None,
        "reason": (last["error"] or (drift and drift["refusal"])) if last else None,
        "synced": synced(last) if last else None,
        "drift": drift and {kind: drift[kind] for kind in KINDS},
        "differing": drift and sum(drift[kind] for kind in KINDS),
        "overdue": late_s > INTERVALS_LATE * every_s,
    }


def result(last: Mapping[str, Any]) -> Result:
    """Return how it ended."""
    if last["error"] is not None or last["drift"] is None:
        return Result.FAILED
    return Result.OK if last["drift"]["refusal"] is None else Result.REFUSED


def synced(last: Mapping[str, Any]) -> dict[str, int] | None:
    """Return how many users it changed, by WAYS; None when it failed before that was known."""
    if last["backfill"] is None:
        return None
    numbers = {**last["backfill"], **(last["drift"] or {})}
    return {way: numbers.get(way, 0) for way in WAYS}


def seconds(last: Mapping[str, Any]) -> float:
    """Return how long it took."""
    began, ended = (datetime.fromisoformat(last[name]) for name in ("started_at", "finished_at"))
    return round((ended - began).total_seconds(), 3)

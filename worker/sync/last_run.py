"""The result of the last scheduled reconciliation: the key `clerk-sync:reconcile` in Redis.

A JSON object, for health, metrics and console:

    started_at, finished_at   ISO 8601, UTC
    error                     the line that says why it failed, null if it did not
    backfill                  seen, created, updated, unchanged, invalid, refused, memberships: numbers, null
                              when it failed
    drift                     listed, local, missing, stale, ghost, claims, tombstone: numbers of users who
                              still differ; merged: how many differed before, but no more; refusal: the line
                              that says why the listing proves nothing, or null; null if it failed
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, cast

from redis import Redis

KEY = "clerk-sync:reconcile"
KINDS = ("missing", "stale", "ghost", "claims", "tombstone")
WAYS = ("created", "updated", "merged")  # merged: differed in the comparison, read by id
INTERVALS_LATE = 2  # a run that has been due for longer is reported as overdue


class Result(StrEnum):
    """How a reconciliation ended."""

    OK = "ok"
    REFUSED = "refused"  # the listing proves nothing, or too many would have to be deleted
    FAILED = "failed"


def load(redis: Redis) -> dict[str, Any] | None:
    """Return the stored last reconciliation, None if there was none. Raises RedisError."""
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
    """Store the result of a reconciliation in place of the last one. Raises RedisError."""
    redis.set(KEY, json.dumps(result))


def summary(last: Mapping[str, Any] | None, every_s: float, since: datetime) -> dict[str, Any]:
    """Return the summary of the last reconciliation; one runs every `every_s`.

    `synced` is the number of users that it changed, `differing` of those who still differ. `overdue`: none
    has ended for three intervals since the last one or, without any, since the given time.
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
    """Return how the reconciliation ended."""
    if last["error"] is not None or last["drift"] is None:
        return Result.FAILED
    return Result.OK if last["drift"]["refusal"] is None else Result.REFUSED


def synced(last: Mapping[str, Any]) -> dict[str, int] | None:
    """Return the number of users that it changed, by WAYS; None if it failed before."""
    if last["backfill"] is None:
        return None
    numbers = {**last["backfill"], **(last["drift"] or {})}
    return {way: numbers.get(way, 0) for way in WAYS}


def seconds(last: Mapping[str, Any]) -> float:
    """Return how long it took."""
    began, ended = (datetime.fromisoformat(last[name]) for name in ("started_at", "finished_at"))
    return round((ended - began).total_seconds(), 3)

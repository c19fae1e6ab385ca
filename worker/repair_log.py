"""What the last repair that a worker ran by itself did: the key `clerk-sync:repair` in Redis.

A JSON object, for health, metrics and console:

    started_at, finished_at   ISO 8601, UTC
    error                     the line that says why it failed, null when it did not
    backfill                  seen, created, updated, unchanged, unread, refused: numbers, null when it failed
    drift                     listed, here, missing, stale, ghost, claims, tombstone: numbers; refusal: the
                              line that says why the listing proves nothing, or null; null when it failed
"""

import json
from typing import Any, cast

from redis import Redis

KEY = "clerk-sync:repair"


def last_repair(redis: Redis) -> dict[str, Any] | None:
    """Return what the last repair did, None when there was none. Raises RedisError."""
    kept = cast("bytes | None", redis.get(KEY))
    try:
        result = json.loads(kept or b"null")
    except ValueError:  # somebody else's
        return None
    return result if isinstance(result, dict) else None


def keep(redis: Redis, result: dict[str, Any]) -> None:
    """Keep the result of a repair in place of the last one's. Raises RedisError."""
    redis.set(KEY, json.dumps(result))

"""What receivers refused and accepted in the last minutes: a hash in Redis for each minute of its clock."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from redis import Redis

KEY_PREFIX = "clerk-sync:recent:"
MINUTE_S = 60
WINDOW_MINUTES = 15
GENUINE, MISMATCH, STALE, FOREIGN = KINDS = ("genuine", "mismatch", "stale", "foreign")
QUIET_MINUTES = 2  # so long genuine deliveries alone, and what was refused before is over


class Recent(NamedTuple):
    """Deliveries of the last WINDOW_MINUTES: verified ones, refused ones by reason, another instance's.

    `is_over` says that genuine deliveries alone have come of late.
    """

    genuine: int
    mismatch: int
    stale: int
    foreign: int
    is_over: bool


def add(redis: Redis, counts: Mapping[str, float]) -> None:
    """Add to the counts of this minute, by KINDS. Raises RedisError."""
    if not counts:
        return
    now: Any = redis.time()
    key = f"{KEY_PREFIX}{now[0] // MINUTE_S}"
    with redis.pipeline(transaction=False) as pipeline:
        for kind, count in counts.items():
            pipeline.hincrby(key, kind, int(count))
        pipeline.expire(key, (WINDOW_MINUTES + 1) * MINUTE_S)
        pipeline.execute()


def read(redis: Redis, now_s: int) -> Recent:
    """Return the counts up to `now_s`, the time of Redis. Raises RedisError."""
    last = now_s // MINUTE_S
    minutes = range(last - WINDOW_MINUTES, last + 1)
    with redis.pipeline(transaction=False) as pipeline:
        for minute in minutes:
            pipeline.hmget(f"{KEY_PREFIX}{minute}", KINDS)
        rows = [dict(zip(KINDS, map(_count, values), strict=True)) for values in pipeline.execute()]
    total: Counter[str] = Counter()
    for row in rows:
        total.update(row)
    genuine_at = max((i for i, row in enumerate(rows) if row[GENUINE]), default=-1)
    refused_at = max((i for i, row in enumerate(rows) if row[MISMATCH] or row[STALE]), default=-1)
    is_over = genuine_at - refused_at >= QUIET_MINUTES
    return Recent(total[GENUINE], total[MISMATCH], total[STALE], total[FOREIGN], is_over)


def _count(value: bytes | None) -> int:
    return int(value) if value is not None and value.isdigit() else 0

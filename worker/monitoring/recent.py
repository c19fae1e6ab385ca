"""The deliveries refused and accepted in the last minutes: a hash in Redis for each minute of its clock."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from redis import Redis

from worker.queue.rq_format import read_count

KEY_PREFIX = "clerk-sync:recent:"
GENUINE_AT_KEY = "clerk-sync:genuine-at"  # when the last verified delivery arrived, in s of Redis's clock
MINUTE_S = 60
WINDOW_MINUTES = 15
GENUINE, MISMATCH, STALE, FOREIGN = KINDS = ("genuine", "mismatch", "stale", "foreign")
QUIET_MINUTES = 2  # after so many minutes with only genuine deliveries, earlier refusals are over


class Recent(NamedTuple):
    """Deliveries of the last WINDOW_MINUTES: verified ones, refused ones by reason, other instances' ones.

    `is_over`: only genuine deliveries arrived in the last QUIET_MINUTES. `genuine_age_s`: how long ago the
    newest genuine one arrived, None if none did. `since_genuine`: the refused ones since that minute, by
    reason.
    """

    genuine: int
    mismatch: int
    stale: int
    foreign: int
    is_over: bool
    since_genuine: Mapping[str, int]
    genuine_age_s: float | None


def add(redis: Redis, counts: Mapping[str, float]) -> None:
    """Add to the counts of this minute, by KINDS. Raises RedisError."""
    if not counts:
        return
    now: Any = redis.time()
    key = f"{KEY_PREFIX}{now[0] // MINUTE_S}"
    with redis.pipeline(transaction=False) as pipeline:
        for kind, count in counts.items():
            pipeline.hincrby(key, kind, int(count))
        if counts.get(GENUINE):
            pipeline.set(GENUINE_AT_KEY, now[0], ex=(WINDOW_MINUTES + 1) * MINUTE_S)
        pipeline.expire(key, (WINDOW_MINUTES + 1) * MINUTE_S)
        pipeline.execute()


def read(redis: Redis, now_s: int) -> Recent:
    """Return the counts up to `now_s`, the time of Redis. Raises RedisError."""
    last = now_s // MINUTE_S
    minutes = range(last - WINDOW_MINUTES, last + 1)
    with redis.pipeline(transaction=False) as pipeline:
        for minute in minutes:
            pipeline.hmget(f"{KEY_PREFIX}{minute}", KINDS)
        pipeline.get(GENUINE_AT_KEY)
        *hashes, genuine_s = pipeline.execute()
    rows = [dict(zip(KINDS, (read_count(it or b"") for it in values), strict=True)) for values in hashes]
    total: Counter[str] = Counter()
    for row in rows:
        total.update(row)
    genuine_at = max((i for i, row in enumerate(rows) if row[GENUINE]), default=-1)
    refused_at = max((i for i, row in enumerate(rows) if row[MISMATCH] or row[STALE]), default=-1)
    is_over = genuine_at - refused_at >= QUIET_MINUTES
    return Recent(
        total[GENUINE],
        total[MISMATCH],
        total[STALE],
        total[FOREIGN],
        is_over,
        {kind: sum(row[kind] for row in rows[max(genuine_at, 0) :]) for kind in (MISMATCH, STALE)},
        None if genuine_s is None else now_s - read_count(genuine_s),
    )

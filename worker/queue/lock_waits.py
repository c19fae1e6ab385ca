"""The deliveries that wait for a lock of another transaction on their rows, and since when."""

from datetime import UTC, datetime
from typing import Any, NamedTuple

from redis import Redis

from worker.queue import rq_format as rq

KEY = "clerk-sync:lock-waits"  # a sorted set of job ids, by the time since when they wait (s)
WAITED = "has_waited"  # in a job's `meta`
DEFER_S = 5  # until the job is tried again
OPEN = (b"scheduled", b"queued", b"started")
LOOK_AT = 1000


class LockWaits(NamedTuple):
    """How many jobs wait for a lock, since when the first one waits (None if none waits), and how long."""

    jobs: int
    since: datetime | None
    longest_s: float


def lock_waits(redis: Redis) -> LockWaits:
    """Return the jobs that wait now. Raises redis.RedisError.

    Jobs that RQ's own tools have finished or deleted meanwhile do not count, and are removed from the set.
    """
    found: Any = redis.zrange(KEY, 0, LOOK_AT - 1, withscores=True)
    if not found:
        return LockWaits(0, None, 0)
    ids = [id_ for id_, _ in found]
    statuses = rq.job_fields(redis, ids, "status")
    past = {id_ for id_, (status,) in zip(ids, statuses, strict=True) if status not in OPEN}
    if past:
        redis.zrem(KEY, *past)
    since = [at for id_, at in found if id_ not in past]
    if not since:
        return LockWaits(0, None, 0)
    seconds, us = redis.time()
    return LockWaits(len(since), datetime.fromtimestamp(since[0], UTC), seconds + us / 1e6 - since[0])

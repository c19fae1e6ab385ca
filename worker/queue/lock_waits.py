"""Which deliveries wait for a lock that another transaction holds on their rows, and since when."""

from datetime import UTC, datetime
from typing import Any, NamedTuple

from redis import Redis

from worker.queue import rq_format as rq

KEY = "clerk-sync:lock-waits"  # a sorted set: a job's id by the time (s) since which it waits
SINCE = "waiting_since"  # in a job's `meta`
DEFER_S = 5  # until it is tried again
OPEN = (b"scheduled", b"queued", b"started")
LOOK_AT = 1000


class LockWaits(NamedTuple):
    """How many jobs wait for a lock, and the time since which the first does; None when none waits."""

    jobs: int
    since: datetime | None


def lock_waits(redis: Redis) -> LockWaits:
    """Return what waits now. Raises redis.RedisError.

    A job that RQ's own tools finished or deleted meanwhile does not count, and is forgotten.
    """
    found: Any = redis.zrange(KEY, 0, LOOK_AT - 1, withscores=True)
    if not found:
        return LockWaits(0, None)
    with redis.pipeline(transaction=False) as pipeline:
        for id_, _ in found:
            pipeline.hget(rq.JOB_PREFIX.encode() + id_, "status")
        statuses = pipeline.execute(raise_on_error=False)
    past = [id_ for (id_, _), status in zip(found, statuses, strict=True) if status not in OPEN]
    if past:
        redis.zrem(KEY, *past)
    since = [at for id_, at in found if id_ not in past]
    return LockWaits(len(since), datetime.fromtimestamp(since[0], UTC) if since else None)

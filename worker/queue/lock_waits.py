"""Which deliveries wait for a lock that another transaction holds on their rows, and since when."""

from collections.abc import Sequence
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
    open_ = _open(redis, [id_ for id_, _ in found])
    past = [id_ for id_, _ in found if id_ not in open_]
    if past:
        redis.zrem(KEY, *past)
    since = [at for id_, at in found if id_ in open_]
    return LockWaits(len(since), datetime.fromtimestamp(since[0], UTC) if since else None)


def _open(redis: Redis, ids: Sequence[bytes]) -> set[bytes]:
    with redis.pipeline(transaction=False) as pipeline:
        for id_ in ids:
            pipeline.hget(rq.JOB_PREFIX.encode() + id_, "status")
        statuses = pipeline.execute(raise_on_error=False)
    return {id_ for id_, status in zip(ids, statuses, strict=True) if status in OPEN}

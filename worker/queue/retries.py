"""The deliveries that the database refused more than once and that wait for another attempt."""

from typing import Any, NamedTuple

from redis import Redis

from worker.queue import rq_format as rq
from worker.queue.description import subject

LOOK_AT = 50  # those that are due last, because they were refused most often
AT_LEAST = 2  # attempts: a temporary problem is over at the first retry, after ten seconds


class Retries(NamedTuple):
    """How many jobs wait for another attempt (at most LOOK_AT), and the reason of one of them."""

    jobs: int
    reason: str | None


def retries(redis: Redis) -> Retries:
    """Return the jobs that wait now. Raises redis.RedisError."""
    ids: Any = redis.zrange(rq.SCHEDULED_KEY, 0, LOOK_AT - 1, desc=True)
    jobs = rq.job_fields(redis, ids, "description", "meta")
    reasons = [reason for fields in jobs if (reason := _reason(*fields))]
    return Retries(len(reasons), reasons[0] if reasons else None)


def _reason(description: bytes | None, meta: bytes | None) -> str | None:
    """Return why a job of ours was refused; another program's reason may quote anything."""
    found = rq.read_json(meta or b"", dict)
    attempts, reason = found.get("attempts"), found.get("reason")
    if subject(description)[0] is None:
        return None
    return reason if isinstance(reason, str) and isinstance(attempts, int) and attempts >= AT_LEAST else None

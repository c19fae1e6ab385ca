"""The unfinished jobs about one user: waiting, reserved, scheduled or failed."""

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

from redis import Redis

from worker.queue import rq_format as rq
from worker.queue.consumer import RESERVED_PREFIX
from worker.queue.description import subject
from worker.queue.failed_jobs import PAGE, FailedJobFilter, FailedJobs
from worker.threads import chunks

LOOK_AT = 20_000  # waiting jobs


class UserJob(NamedTuple):
    """A job: `state` is waiting, reserved, scheduled or failed; `reason` is that of the last failure."""

    id: str
    type: str | None
    state: str
    reason: str | None = None


class UserJobs(NamedTuple):
    """The jobs found; `is_complete` is False if more than LOOK_AT jobs wait."""

    jobs: list[UserJob]
    is_complete: bool


def user_jobs(redis: Redis, clerk_id: str) -> UserJobs:
    """Return the jobs about a user. Raises redis.RedisError, QueueUnavailable."""
    places: list[tuple[str, Any]] = [("waiting", redis.lrange(rq.QUEUE_KEY, 0, LOOK_AT))]
    places += [("reserved", redis.lrange(key, 0, -1)) for key in redis.scan_iter(f"{RESERVED_PREFIX}*")]
    places += [("scheduled", redis.zrange(rq.SCHEDULED_KEY, 0, LOOK_AT))]
    entries = [(state, id_) for state, ids in places for id_ in ids]
    found = list(_about(redis, islice(entries, LOOK_AT), clerk_id))
    failed = FailedJobs(redis).newest(FailedJobFilter(clerk_id=clerk_id))
    found += [UserJob(job.id, job.type, "failed", job.reason) for job in failed]
    return UserJobs(found, len(entries) <= LOOK_AT)


def _about(redis: Redis, entries: Iterator[tuple[str, bytes]], clerk_id: str) -> Iterator[UserJob]:
    for page in chunks(entries, PAGE):
        descriptions = rq.job_fields(redis, (id_ for _, id_ in page), "description")
        for (state, id_), (description,) in zip(page, descriptions, strict=True):
            type_, about = subject(description)
            if about == clerk_id:
                yield UserJob(id_.decode(errors="replace"), type_, state)

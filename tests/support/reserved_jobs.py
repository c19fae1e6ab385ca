"""What a consumer of the queue does with jobs, in one line each."""

import time
from collections.abc import Callable
from typing import Any

from redis import Redis

from tests.support.queue import enqueue
from worker.queue.consumer import CONSUMERS_KEY, DEAD_AFTER_S, Failed, Finished, ReservedJobs, TakenJob

MakeConsumer = Callable[[str], ReservedJobs]


def fill(redis: Redis, count: int) -> list[str]:
    """Enqueue that many deliveries and return their ids, in order."""
    return [enqueue(redis) for _ in range(count)]


def take(reserved: ReservedJobs, limit: int = 100) -> list[TakenJob]:
    jobs = reserved.settle_and_take([], limit)
    assert jobs is not None
    return jobs


def ids(jobs: list[TakenJob] | None) -> list[str]:
    assert jobs is not None
    return [job.id for job in jobs]


def settle(reserved: ReservedJobs, *done: Finished | Failed) -> None:
    reserved.settle_and_take(done, 0)


def failure(job: TakenJob, *, retryable: bool = False) -> Failed:
    return Failed(job, "Unreadable: the event is not a JSON object", "Traceback\nUnreadable", retryable)


def fail_for_good(reserved: ReservedJobs) -> str:
    """Bring one new job into the failed registry and return its id."""
    id_ = enqueue(reserved.redis)
    settle(reserved, *(failure(job) for job in take(reserved)))
    return id_


def fall_silent(redis: Redis, worker: str) -> None:
    """Let the worker not have been heard of for too long."""
    redis.zadd(CONSUMERS_KEY, {worker: time.time() - DEAD_AFTER_S - 1})


def scores(redis: Redis, key: str) -> dict[str, float]:
    found: Any = redis.zrange(key, 0, -1, withscores=True)
    return {member.decode(): score for member, score in found}

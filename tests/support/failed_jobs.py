"""Ways in which a job comes into the failed registry."""

import json
from collections.abc import Callable

from redis import Redis
from rq import Queue, Retry
from rq.worker import SimpleWorker

from tests.support.payloads import Json
from tests.support.queue import delivery, put
from worker.queue.consumer import Failed, ReservedJobs

REASON = "Unreadable: the event's data.id is not a Clerk id"


def fail(
    redis: Redis, event: Json | None = None, *, id_: str | None = None, reason: str = REASON, times: int = 1
) -> str:
    """Enqueue a delivery, let a worker of ours fail it that many times, and return its id."""
    reserved = ReservedJobs(redis, "failing")
    given = delivery(event, id_=id_)
    for _ in range(times):
        put(redis, given)
        jobs = reserved.settle_and_take([], 100) or []
        traceback = f'Traceback (most recent call last):\n  File "worker/clerk/payloads.py", line 1\n{reason}'
        reserved.settle_and_take([Failed(job, reason, traceback, retryable=False) for job in jobs], 0)
    return given.svix_id


def fail_in_another_worker(redis: Redis, work: Callable[..., object], *arguments: object) -> str:
    """Let RQ's own worker fail a function that this service never enqueues; return the job's id."""
    queue = Queue("clerk", connection=redis, serializer="json")
    job = queue.enqueue(work, *arguments, retry=Retry(max=1))
    SimpleWorker([queue], connection=redis, serializer="json").work(burst=True)
    assert job.id
    return job.id


def forget(redis: Redis, id_: str) -> None:
    """Let a failed job expire, before the registry knows."""
    redis.delete(f"rq:job:{id_}")


def raise_personal(email: str) -> None:
    """Fail as an application's code might, with what it was given in the message."""
    raise LookupError(
        f"no user {email}\nDETAIL:  Key (email)=({email}) is not present\n" + json.dumps([email])
    )

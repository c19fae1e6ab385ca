"""A worker's heartbeat: one script that also releases the jobs of dead workers and queues due retries."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from redis import Redis

from worker.queue import rq_format as rq
from worker.queue import scripts
from worker.queue.consumer import CONSUMERS_KEY, DEAD_AFTER_S, RESERVED_PREFIX

FORGET_AFTER_S = 24 * 3600
RETRIED_AT_ONCE = 1000
WORKER_HASH_TTL_S = 90  # RQ's value for a worker_ttl of 30 s


class Beat(NamedTuple):
    """The result of one heartbeat.

    `released` counts jobs of dead workers, `retried` retries that were due. `is_known` is False if Redis did
    not have this worker's consumers or hash, because they are new or lost. In `wait_s` there may be more to
    do.
    """

    released: int
    retried: int
    is_known: bool
    wait_s: int


class Heartbeat:
    """The heartbeat of a worker and its consumers."""

    def __init__(self, redis: Redis, worker: str, consumer_ids: Sequence[str]) -> None:
        self._consumer_ids = consumer_ids
        self._script = redis.register_script(scripts.load("heartbeat"))
        own = (rq.QUEUES_KEY, rq.SCHEDULER_LOCK_KEY, rq.WORKER_PREFIX + worker)
        self._keys = (CONSUMERS_KEY, rq.QUEUE_KEY, rq.STARTED_KEY, rq.SCHEDULED_KEY, *own)

    def beat(self, fields: Mapping[str, str]) -> Beat:
        """Run the script once, and write `fields` into the worker's hash. Raises redis.RedisError."""
        pairs = [part for field in fields.items() for part in field]
        args: list[str | int] = [DEAD_AFTER_S, FORGET_AFTER_S, rq.JOB_PREFIX, RESERVED_PREFIX]
        args += [RETRIED_AT_ONCE, rq.now(), WORKER_HASH_TTL_S, len(self._consumer_ids), *self._consumer_ids]
        released, retried, is_known, wait_s = self._script(self._keys, [*args, *pairs])
        return Beat(released, retried, bool(is_known), wait_s)

"""RQ's maintenance without its imports, calls and requests, and the search for jobs whose list was lost.

RQ's own maintenance (`rq.registry.clean_registries`, `IntermediateQueue.cleanup`) loads abandoned jobs, calls
the callbacks and sends the webhooks that their hashes name. So anyone with write access to Redis could make a
worker call any function. This module only moves ids, and loads no job.
"""

from datetime import UTC, datetime, timedelta
from typing import Any, cast

import structlog
from rq import Queue
from rq.registry import FailedJobRegistry, FinishedJobRegistry
from rq.worker_registration import clean_worker_registry

from worker.queue import rq_format as rq
from worker.queue import scripts
from worker.queue.consumer import CONSUMERS_KEY, RESERVED_PREFIX

log = structlog.get_logger("worker.queue.maintenance")

STUCK_AFTER_S = 60  # as in RQ
MOVED_AT_ONCE = 1000
SEEN_KEY = "clerk-sync:intermediate-seen"
SEARCH_KEY = "clerk-sync:lost-jobs-search"  # set by the worker that searches: one at a time
SEARCH_EVERY_S = 50  # less than the interval of maintenance, so that one worker searches each minute
SETTLED_AFTER_S = 30  # a job that was queued or started more recently may be about to be moved
KEYS_AT_ONCE = 1000
STEPS_AT_ONCE = 500


class QueueMaintenance:
    """Keeps RQ's registries in order. Any number of workers may do it at the same time."""

    def __init__(self, queue: Queue, stuck_after_s: int = STUCK_AFTER_S) -> None:
        self._queue = queue
        self._redis = queue.connection
        self._stuck_after_s = stuck_after_s
        self._requeue = self._redis.register_script(scripts.load("requeue_abandoned"))
        self._recover = self._redis.register_script(scripts.load("recover_lost"))
        self._cursor = 0

    def run(self) -> None:
        """Remove expired jobs and workers; queue again lost jobs and those that plain RQ workers abandoned.

        Raises redis.RedisError.
        """
        keys = [rq.STARTED_KEY, rq.QUEUE_KEY, rq.INTERMEDIATE_KEY, SEEN_KEY]
        args: list[str | int] = [rq.JOB_PREFIX, self._stuck_after_s, MOVED_AT_ONCE]
        count = self._requeue(keys, args)
        if count:
            log.warning("queued again what a plain rq worker had abandoned", jobs=count)
        FinishedJobRegistry(queue=self._queue).cleanup()
        FailedJobRegistry(queue=self._queue).cleanup()
        clean_worker_registry(self._queue)
        if self._redis.set(SEARCH_KEY, "1", nx=True, ex=SEARCH_EVERY_S):
            self.recover_lost()

    def recover_lost(self) -> int:
        """Queue again the jobs that are in no list or registry, because Redis lost it; return their number.

        One call scans at most STEPS_AT_ONCE * KEYS_AT_ONCE keys, KEYS_AT_ONCE at a time; the next call
        continues where it stopped. Raises redis.RedisError.
        """
        count = 0
        for _ in range(STEPS_AT_ONCE):
            page: Any = self._redis.scan(self._cursor, match=f"{rq.JOB_PREFIX}*", count=KEYS_AT_ONCE)
            self._cursor, keys = page
            if keys:
                count += self._recover_page([key.removeprefix(rq.JOB_PREFIX.encode()) for key in keys])
            if self._cursor == 0:
                break
        if count:
            log.warning("queued lost jobs again: Redis may have evicted keys", jobs=count)
        return count

    def _recover_page(self, ids: list[bytes]) -> int:
        now = datetime.now(UTC)
        moments = (now, now - timedelta(seconds=SETTLED_AFTER_S))
        keys = [rq.QUEUE_KEY, rq.INTERMEDIATE_KEY, rq.STARTED_KEY, rq.SCHEDULED_KEY, rq.FAILED_KEY]
        args: list[str | bytes] = [rq.JOB_PREFIX, RESERVED_PREFIX, rq.QUEUE, *map(rq.timestamp, moments)]
        return cast("int", self._recover([*keys, CONSUMERS_KEY, rq.QUEUES_KEY], [*args, *ids]))

"""RQ's maintenance, without what it imports, calls and fetches.

RQ's own (`rq.registry.clean_registries`, `IntermediateQueue.cleanup`) loads the jobs that were abandoned,
calls the callbacks and sends the webhooks that their hashes name. So whoever can write to Redis could make a
worker run or call anything. Here ids are moved, and no job is loaded.
"""

from typing import cast

import structlog
from rq import Queue
from rq.registry import FailedJobRegistry, FinishedJobRegistry
from rq.worker_registration import clean_worker_registry

from worker.queue import rq_format as rq
from worker.queue import scripts

log = structlog.get_logger("worker.queue.maintenance")

STUCK_AFTER_S = 60  # as RQ has it
MOVED_AT_ONCE = 1000
SEEN_KEY = "clerk-sync:intermediate-seen"


class QueueMaintenance:
    """Keeps RQ's registries in order. Any number of workers may do it at the same time."""

    def __init__(self, queue: Queue, stuck_after_s: int = STUCK_AFTER_S) -> None:
        self._queue = queue
        self._stuck_after_s = stuck_after_s
        self._requeue = queue.connection.register_script(scripts.load("requeue_abandoned"))

    def run(self) -> None:
        """Forget jobs and workers that have expired, and put back what plain RQ workers have abandoned.

        Raises redis.RedisError.
        """
        count = self._requeue_abandoned()
        if count:
            log.warning("took back what a plain rq worker had abandoned", jobs=count)
        FinishedJobRegistry(queue=self._queue).cleanup()
        FailedJobRegistry(queue=self._queue).cleanup()
        clean_worker_registry(self._queue)

    def _requeue_abandoned(self) -> int:
        return cast(
            "int",
            self._requeue(
                keys=[rq.STARTED_KEY, rq.QUEUE_KEY, rq.INTERMEDIATE_KEY, SEEN_KEY],
                args=[rq.JOB_PREFIX, self._stuck_after_s, MOVED_AT_ONCE],
            ),
        )

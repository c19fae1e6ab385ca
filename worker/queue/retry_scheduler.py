"""RQ's scheduler without a process of its own: moves the retries that are due back to the queue.

RQ's lock is used, so that no scheduler of RQ's does the same at the same time. Its way of moving is not: that
loads the jobs, and one that somebody wrote badly keeps all others from being retried.
"""

from datetime import UTC, datetime

from rq import Queue
from rq.scheduler import RQScheduler

from worker.queue import rq_format, scripts

MOVED_AT_ONCE = 1000


class RetryScheduler:
    """Does what RQ's scheduler does, in one worker at a time: whoever has RQ's scheduler lock."""

    def __init__(self, queue: Queue) -> None:
        self._scheduler = RQScheduler(
            [queue], connection=queue.connection, serializer=queue.serializer, logging_level="WARNING"
        )
        self._enqueue = queue.connection.register_script(scripts.load("enqueue_due"))

    def enqueue_due(self) -> None:
        """Enqueue what is due, if this worker has the lock or can get it."""
        if not self._scheduler.acquired_locks:
            self._scheduler.acquire_locks()
            if self._scheduler.acquired_locks:
                self._scheduler.register_birth()
        if self._scheduler.acquired_locks:
            self._scheduler.heartbeat()
            self._move()

    def _move(self) -> None:
        now = datetime.now(UTC)
        self._enqueue(
            keys=[rq_format.SCHEDULED_KEY, rq_format.QUEUE_KEY, rq_format.QUEUES_KEY],
            args=[rq_format.JOB_PREFIX, int(now.timestamp()), rq_format.timestamp(now), MOVED_AT_ONCE],
        )

    def stop(self) -> None:
        """Release the lock, so that another worker need not wait for it to expire."""
        if self._scheduler.acquired_locks:
            self._scheduler.stop()

"""RQ's scheduler without a process of its own: moves the retries that are due back to the queue."""

from rq import Queue
from rq.scheduler import RQScheduler


class DueRetries:
    """Does what RQ's scheduler does, in one worker at a time: whoever has RQ's scheduler lock."""

    def __init__(self, queue: Queue) -> None:
        self._scheduler = RQScheduler(
            [queue], connection=queue.connection, serializer=queue.serializer, logging_level="WARNING"
        )

    def enqueue_due(self) -> None:
        """Enqueue what is due, if this worker has the lock or can get it."""
        if not self._scheduler.acquired_locks:
            self._scheduler.acquire_locks()
            if self._scheduler.acquired_locks:
                self._scheduler.register_birth()
        if self._scheduler.acquired_locks:
            self._scheduler.heartbeat()
            self._scheduler.enqueue_scheduled_jobs()

    def stop(self) -> None:
        """Release the lock, so that another worker need not wait for it to expire."""
        if self._scheduler.acquired_locks:
            self._scheduler.stop()

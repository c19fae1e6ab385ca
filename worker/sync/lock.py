"""The lock that one worker at a time holds while it reconciles."""

import time
from contextlib import suppress

import structlog
from redis import Redis
from redis.exceptions import LockError

from worker.periodic import PeriodicRunner, PeriodicTask
from worker.shutdown import StopSignal
from worker.sync import last_run

LOCK_KEY = f"{last_run.KEY}:lock"
LOCK_S = 60.0  # after a worker was killed, another one can start after that time
RENEWALS = 6  # in that time
LOST = "another worker holds the reconciliation lock, so this one stops"

log = structlog.get_logger("worker.sync.lock")


class ReconciliationLock:
    """The lock that one worker at a time holds while it reconciles.

    `stopping` ends the reconciliation: requested with the process's own signal, or once the lock is lost. A
    thread renews the lock until `release`. If it was not renewed for `lock_s` by this machine's clock,
    because Redis does not answer or the process was suspended, it counts as lost: another worker may hold it.
    """

    def __init__(self, redis: Redis, stopping: StopSignal, lock_s: float) -> None:
        self.stopping = StopSignal(also=lambda: stopping.requested or time.monotonic() >= self._held_until)
        self._lock = redis.lock(LOCK_KEY, timeout=lock_s, thread_local=False)
        self._lock_s = lock_s
        self._held_until = 0.0
        self._renewal = PeriodicRunner(PeriodicTask("renew lock", lock_s / RENEWALS, self.renew))

    def acquire(self) -> bool:
        """Take the lock unless another worker has it, and renew it until `release`. Raises RedisError."""
        asked_at = time.monotonic()
        if not self._lock.acquire(blocking=False):
            return False
        self._held_until = asked_at + self._lock_s
        self._renewal.start()
        return True

    def renew(self) -> None:
        """Renew the lock. Raises LockError if it is not this worker's any more, and RedisError."""
        asked_at = time.monotonic()
        try:
            self._lock.reacquire()
        except LockError:
            if self._held_until:  # later attempts are about the same loss
                log.warning(LOST)
            self._held_until = 0.0
            raise
        self._held_until = asked_at + self._lock_s

    def release(self) -> None:
        """Release the lock."""
        self._renewal.stop(self._lock_s)
        with suppress(LockError):
            self._lock.release()

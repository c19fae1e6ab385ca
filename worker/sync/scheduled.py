"""The scheduled reconciliation, every RECONCILE_EVERY: reads missed changes, then looks for drift.

1. Each worker checks whether it is due; one of them gets the lock and runs it.
2. It reads the users that Clerk updated since the last time, the first time all, and merges them.
3. It compares all users. Those who are missing or still differ are read by id and merged, unless the listing
   is refused: then it reports that and changes nothing.
4. It reports the users who differ even then. Only an operator deletes users who are gone in Clerk
   (`reconcile --fix`).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import structlog
from redis import Redis
from redis.exceptions import LockError, RedisError

from config import ServiceError, Settings
from db import progress
from db.connection.engine import Database
from worker.log import fault
from worker.periodic import PeriodicRunner, PeriodicTask
from worker.shutdown import Stopped, StopSignal
from worker.sync import last_run
from worker.sync.backfill import COUNTED, Backfill, BackfillStats, fingerprint
from worker.sync.context import SyncContext, sync_context
from worker.sync.lock import LOCK_S, ReconciliationLock
from worker.sync.reconcile import SETTLE_S, Reconcile

TASK = "incremental"
LOOK_EVERY_S = 1.0
RETRY_S = 300.0  # after a failure, unless the interval is shorter
STOP_TIMEOUT_S = 3.0

log = structlog.get_logger("worker.sync.scheduled")


class ScheduledReconciliation:
    """Runs a reconciliation when one is due and no other worker runs it. Tests use shorter times."""

    def __init__(  # noqa: PLR0913 - two of them for tests
        self,
        settings: Settings,
        redis: Redis,
        database: Database,
        stopping: StopSignal,
        *,
        lock_s: float = LOCK_S,
        settle_s: float = SETTLE_S,
    ) -> None:
        self._settings = settings
        self._redis = redis
        self._database = database
        self._stopping = stopping
        self._lock_s = lock_s
        self._settle_s = settle_s

    def run_if_due(self) -> None:
        """Run a reconciliation if one is due, and store its result. Raises RedisError."""
        if not self._is_due():
            return
        lock = ReconciliationLock(self._redis, self._stopping, self._lock_s)
        if not lock.acquire():
            return
        try:
            if self._is_due():
                self._run(lock)
        finally:
            lock.release()

    def _is_due(self) -> bool:
        last = last_run.load(self._redis)
        if last is None:
            return True
        every_s = self._settings.reconcile_every or 0.0
        pause_s = min(every_s, RETRY_S) if last["error"] else every_s
        finished_at = datetime.fromisoformat(last["finished_at"]).timestamp()
        if 0 <= time.time() - finished_at < pause_s:
            return False
        return not 0 <= self._now().timestamp() - finished_at < pause_s  # this machine's clock may be wrong

    def _now(self) -> datetime:
        """Return the time by Redis's clock, which all workers share."""
        seconds, microseconds = self._redis.time()
        return datetime.fromtimestamp(seconds, UTC).replace(microsecond=microseconds)

    def _run(self, lock: ReconciliationLock) -> None:
        try:
            result = self._result(lock)
            lock.renew()
        except (Stopped, LockError):
            return  # another worker runs it
        last_run.keep(self._redis, result)
        (log.warning if result["error"] else log.info)("reconciled", **result)

    def _result(self, lock: ReconciliationLock) -> dict[str, Any]:
        """Reconcile; return what is to be kept of it. Raises Stopped, RedisError."""
        started_at = self._now()
        result: dict[str, Any] = {"error": None, "backfill": None, "drift": None}
        try:
            with sync_context(self._settings, self._database, lock.stopping) as context:
                done = self._fetch(context, lock)
                result["backfill"] = {name: getattr(done, name) for name in COUNTED}
                result["drift"] = _refreshed(Reconcile(context, settle_s=self._settle_s))
        except (Stopped, LockError, RedisError):
            raise
        except ServiceError as error:
            result["error"] = str(error)
        except Exception as error:  # /health must show it, and the next attempt wait for RETRY_S
            result["error"] = f"{fault(error)}: a fault of clerk-sync, report it"
        moments = {"started_at": started_at, "finished_at": self._now()}
        return result | {name: moment.isoformat() for name, moment in moments.items()}

    def _fetch(self, context: SyncContext, lock: ReconciliationLock) -> BackfillStats:
        """Read the users updated since the last run; in the first run, all users.

        The next run starts at the last update in this one's listing, or earlier, if the database refused a
        user: then at that user's update. If the listing was cut short, the start does not move.
        """
        backfill = Backfill(context)
        source = fingerprint(self._settings)
        state = progress.load(self._database, TASK)
        since = state["since"] if state is not None and state["source"] == source else None
        done = backfill.everything() if since is None else backfill.since(since)
        if not done.is_cut_short:
            lock.renew()
            reached = max(since or 0, backfill.reach.since)
            progress.save(self._database, TASK, {"source": source, "since": reached})
        return done


@contextmanager
def reconciling(settings: Settings, redis: Redis, database: Database, stopping: StopSignal) -> Iterator[None]:
    """Run due reconciliations in a thread during the block."""
    task = ScheduledReconciliation(settings, redis, database, stopping)
    runner = PeriodicRunner(PeriodicTask("reconcile", LOOK_EVERY_S, task.run_if_due))
    runner.start()
    try:
        yield
    finally:
        runner.stop(STOP_TIMEOUT_S)


def _refreshed(task: Reconcile) -> dict[str, Any]:
    """Merge the users who are missing or stale; return their number, and the report of what still differs."""
    found = task.report()
    left = found if found.refusal is not None else task.refresh(found)
    return {
        "listed": left.listed,
        "local": left.local,
        **{name: len(getattr(left, name)) for name in last_run.KINDS},
        "refusal": left.refusal,
        "merged": found.differing - left.differing,
    }

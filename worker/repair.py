"""Repair that a worker runs by itself, every RECONCILE_EVERY: fetch what was missed, then look for drift.

All workers ask whether it is time; one of them gets the lock and does it. It mends nothing that a backfill
does not: whether users who are gone in Clerk are deleted here is for a person to say (`reconcile --fix`).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Any

import structlog
from redis import Redis
from redis.exceptions import LockError
from redis.lock import Lock

from config import Settings
from db import progress
from db.engine import Database
from db.errors import DatabaseError
from worker import repair_log
from worker.backfill import Backfill, Done, fingerprint
from worker.bridge import Bridge, bridge
from worker.clerk_api import ClerkApiError, Stopped
from worker.keeper import Duty, Keeper
from worker.reconcile import Reconcile, Report
from worker.stop import StopSignal

TASK = "incremental"
LOCK_KEY = f"{repair_log.KEY}:lock"
LOCK_S = 120.0  # longer than one page may take with all its retries
LOOK_EVERY_S = 1.0
RETRY_S = 300.0  # after a failure, unless the interval is shorter
OVERLAP_MS = 600_000  # two clocks, Clerk's and ours, may differ by as much
STOP_TIMEOUT_S = 3.0

log = structlog.get_logger("worker.repair")


class Repair:
    """Runs a repair when it is time and no other worker is at it."""

    def __init__(self, settings: Settings, redis: Redis, database: Database, stopping: StopSignal) -> None:
        self._settings = settings
        self._redis = redis
        self._database = database
        self._stopping = stopping

    def turn(self) -> None:
        """Run a repair if one is due, and keep its result. Raises RedisError."""
        if not self._is_due():
            return
        lock = self._redis.lock(LOCK_KEY, timeout=LOCK_S, thread_local=False)
        if not lock.acquire(blocking=False):
            return
        try:
            if self._is_due():
                self._run(lock)
        finally:
            with suppress(LockError):
                lock.release()

    def _is_due(self) -> bool:
        last = repair_log.last_repair(self._redis)
        if last is None:
            return True
        every_s = self._settings.reconcile_every or 0.0
        pause_s = min(every_s, RETRY_S) if last["error"] else every_s
        return datetime.fromisoformat(last["finished_at"]).timestamp() + pause_s <= time.time()

    def _run(self, lock: Lock) -> None:
        started_at = datetime.now(UTC)
        result: dict[str, Any] = {"error": None, "backfill": None, "drift": None}
        try:
            with bridge(self._settings, self._database, self._stopping) as both:
                result["backfill"] = _numbers(self._fetch(both, lock, started_at))
                report = Reconcile(both, on_progress=lambda *_: lock.reacquire()).report()
                result["drift"] = _sizes(report)
        except (Stopped, LockError):
            return  # another worker goes on
        except (ClerkApiError, DatabaseError) as error:
            result["error"] = str(error)
        moments = {"started_at": started_at, "finished_at": datetime.now(UTC)}
        result |= {name: moment.isoformat() for name, moment in moments.items()}
        repair_log.keep(self._redis, result)
        (log.warning if result["error"] else log.info)("repair", **result)

    def _fetch(self, both: Bridge, lock: Lock, started_at: datetime) -> Done:
        """Read what was updated since the last time, the first time everything."""
        backfill = Backfill(both, on_progress=lambda _: lock.reacquire())
        source = fingerprint(self._settings)
        state = progress.load(self._database, TASK)
        if state is not None and state["source"] == source:
            done = backfill.since(state["since"])
        else:
            done = backfill.everything()
        since = int(started_at.timestamp() * 1000) - OVERLAP_MS
        if not done.is_cut_short:
            progress.save(self._database, TASK, {"source": source, "since": since})
        return done


@contextmanager
def repairing(settings: Settings, redis: Redis, database: Database, stopping: StopSignal) -> Iterator[None]:
    """Look after repairs in a thread of its own for the length of the block."""
    repair = Repair(settings, redis, database, stopping)
    keeper = Keeper([Duty("repair", LOOK_EVERY_S, repair.turn)])
    keeper.start()
    try:
        yield
    finally:
        keeper.stop(STOP_TIMEOUT_S)


def _numbers(done: Done) -> dict[str, int]:
    numbers = done._asdict()
    for name in ("troubles", "expected", "memberships_expected"):
        del numbers[name]
    return numbers


def _sizes(report: Report) -> dict[str, Any]:
    return {
        "listed": report.listed,
        "here": report.here,
        **{name: len(getattr(report, name)) for name in repair_log.KINDS},
        "refusal": report.refusal,
    }

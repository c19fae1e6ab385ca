"""The loop of a worker: finish the last batch and take the next, apply it, repeat.

A worker has several consumer threads. While one waits for PostgreSQL or Redis, another parses and merges. All
but the first work only during a backlog: they sleep until a batch was full, so an idle worker needs one
connection to each server.

The first delivery after a pause is taken immediately. Under load, takes are some time apart so that batches
fill (see `pace_s`): a transaction of two events costs little more than one of one event.

A large batch costs less per event, but holds its locks longer. So BATCH_SIZE is large, and the next batch is
half as large after one that took longer than SLOW_BATCH_S (for example because of a slow trigger) or that the
server refused.
"""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import structlog
from redis.exceptions import RedisError

from db import schema
from db.connection.engine import Database
from db.connection.errors import DatabaseError, DatabaseUnavailable
from worker.queue.consumer import ReservedJobs, Settled, TakenJob, is_full
from worker.redis_causes import explain
from worker.shutdown import SLICE_S, StopSignal

log = structlog.get_logger("worker")

WAIT_S = 20  # the longest wait for a job, in one command to Redis
PACE_S = 0.01
PACE_PER_JOB_S = 0.001
MAX_PACE_S = 0.1
SUSPENDED_PAUSE_S = 1
FIRST_PAUSE_S = 0.25
MAX_PAUSE_S = 10.0
ISOLATION_BATCH = 20
SLOW_BATCH_S = 1.0  # far below the limits of a transaction in db.connection.session

Process = Callable[[list[TakenJob]], list[Settled]]


class SharedState(NamedTuple):
    """The state that the consumer threads of a worker share.

    `process` raises DatabaseUnavailable if the database cannot accept changes now; `backlog` is set while
    there may be work for more than one thread.
    """

    process: Process
    batch_size: int
    database: Database
    stopping: StopSignal
    backlog: threading.Event


class ConsumerThread:
    """Takes jobs under its own consumer id, processes them, and settles them with its next take."""

    def __init__(self, reserved: ReservedJobs, shared: SharedState) -> None:
        self.reserved = reserved
        self.is_busy = False
        self.waiting_for: str | None = None
        self.reason: str | None = None
        self._took_at: float | None = None
        self._is_idle = True
        self._process, self._batch_size, self._database, self._stopping, self._backlog = shared
        self._unsettled: list[Settled] = []
        self._limit = self._batch_size
        self._was_full = False
        self._next_take_s = 0.0  # on the monotonic clock
        self._pause_s = FIRST_PAUSE_S

    def run_primary(self) -> None:
        """Work until the stop signal. Waits while a server is unavailable."""
        self._await_database()
        while not self._stopping.requested:
            try:
                taken = self._take_and_process()
                if taken is None:
                    self._stopping.wait(SUSPENDED_PAUSE_S)
                elif taken == 0:
                    self._await_job()
            except DatabaseUnavailable as error:
                self._release()
                self.pause("database", str(error))
                self._await_database()
            except RedisError as error:
                self.pause_for_redis(error)

    def run_helper(self) -> None:
        """Work during a backlog, until the stop signal. Only the primary thread waits for the database."""
        while not self._stopping.requested:
            if self._is_idle and not self._backlog.wait(SLICE_S):
                continue
            self._is_idle = False
            try:
                taken = self._take_and_process()
                if not self._was_full:
                    self._settle()
                    # While suspended it may have reserved jobs, if an earlier answer was lost.
                    if taken is not None or self._release():
                        self._go_idle()
            except DatabaseUnavailable:
                if self._release():
                    self._go_idle()
            except RedisError as error:  # it may have reserved jobs, so it does not go idle
                self.pause_for_redis(error)

    def in_hand_s(self) -> float:
        """Return how long the current batch has been processed, in s; 0 if there is none."""
        took_at = self._took_at
        return 0.0 if took_at is None else round(time.monotonic() - took_at, 1)

    def leave(self) -> None:
        """Settle the last batch and release the reserved jobs. Raises RedisError."""
        self._settle()
        self.reserved.leave()

    def pause_for_redis(self, error: RedisError) -> None:
        """Wait for Redis, and reconnect: the address may lead to another primary by then."""
        self.reserved.redis.connection_pool.disconnect(inuse_connections=False)
        self.pause("Redis", explain(error))

    def pause(self, what: str, reason: str) -> None:
        """Wait, longer each consecutive time, and log the reason."""
        self.waiting_for, self.reason = what, reason
        log.warning("waiting", what=what, reason=reason, pause_s=self._pause_s)
        self._stopping.wait(self._pause_s)
        self._pause_s = min(self._pause_s * 2, MAX_PAUSE_S)

    def _take_and_process(self) -> int | None:
        """Settle the last batch, take the next and process it; return its size, None if suspended."""
        time.sleep(max(0.0, self._next_take_s - time.monotonic()))
        jobs = self.reserved.settle_and_take(self._unsettled, self._limit)
        self._unsettled = []
        self._was_full = jobs is not None and is_full(jobs, self._limit)
        wait_s = pace_s(len(jobs)) if jobs and not self._was_full else 0.0
        self._next_take_s = time.monotonic() + wait_s
        if self.waiting_for == "Redis":
            self.waiting_for = self.reason = None
        if jobs:
            self.is_busy = True
            if self._was_full:
                self._backlog.set()
            began = self._took_at = time.monotonic()
            fewer = max(1, self._limit // 2)
            try:
                self._unsettled = self._process(jobs)
            except DatabaseUnavailable as error:
                # One job alone does not show whether it or the deployment is at fault: more are taken along.
                more = max(self._batch_size, ISOLATION_BATCH)
                self._limit = more if error.may_concern_one_row else fewer
                raise
            finally:
                self._took_at = None
            is_slow = time.monotonic() - began > SLOW_BATCH_S
            self._limit = fewer if is_slow else min(2 * self._limit, self._batch_size)
        self.waiting_for = self.reason = None
        self._pause_s = FIRST_PAUSE_S
        return None if jobs is None else len(jobs)

    def _await_job(self) -> None:
        self.is_busy = False
        while not self._stopping.requested and not self.reserved.wait(WAIT_S, self._stopping):
            pass

    def _settle(self) -> None:
        """Settle the last batch without taking another."""
        if self._unsettled:
            self.reserved.settle_and_take(self._unsettled, 0)
            self._unsettled = []

    def _go_idle(self) -> None:
        """Sleep until there is a backlog. No job is reserved meanwhile."""
        self._is_idle = True
        self.is_busy = False
        self._backlog.clear()

    def _release(self) -> bool:
        """Release the batch, because no event is at fault; return whether this succeeded."""
        try:
            self.reserved.release()
        except RedisError:
            # The batch stays reserved, and the next take returns it first.
            log.warning("batch not released", worker=self.reserved.worker)
            return False
        return True

    def _await_database(self) -> None:
        while not self._stopping.requested:
            reason = database_trouble(self._database)
            if reason is None:
                return
            self.pause("database", reason)


def pace_s(jobs: int) -> float:
    """Return the time from a take of that many jobs to the next take, in s.

    It grows with the batch: from some 1,000 deliveries/s on, the batches grow until the time is MAX_PACE_S.
    Then a delivery costs the worker a third less CPU time, and PostgreSQL half as much
    (docs/decisions/008-why-several-consumer-threads.md).
    """
    return min(max(PACE_S, jobs * PACE_PER_JOB_S), MAX_PACE_S)


def database_trouble(database: Database) -> str | None:
    """Return why the database cannot accept changes now, with what to do; None if it can.

    A newer schema is accepted: the old version continues while a new one is deployed.
    """
    try:
        database.ping()  # one attempt: the caller asks again soon, and checks for a stop request in between
        state = schema.state(database)
    except DatabaseError as error:
        return str(error)
    if state is schema.SchemaState.NEWER:
        log.warning(state.trouble)
        return None
    return state.trouble

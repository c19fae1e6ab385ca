"""The loop of a worker: settle what the last batch did and take the next, apply it, and so on.

A worker has two lanes. While one waits for PostgreSQL or Redis, the other has Python to itself: far from
both servers that is most of the time. The second only helps with a backlog: it sleeps until a batch was full,
and a quiet worker needs one connection to each server.
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
from worker.queue.consumer import Failed, Finished, ReservedJobs, TakenJob
from worker.redis_causes import explain
from worker.shutdown import SLICE_S, StopSignal

log = structlog.get_logger("worker")

WAIT_S = 1  # for a job; a stop signal is seen after that long at the latest
SUSPENDED_PAUSE_S = 1
FIRST_PAUSE_S = 0.25
MAX_PAUSE_S = 10.0

Process = Callable[[list[TakenJob]], list[Finished | Failed]]


class SharedState(NamedTuple):
    """What the lanes of a worker share.

    `process` raises DatabaseUnavailable when the database cannot take the jobs now; `backlog` is set while
    there may be more than one lane's work.
    """

    process: Process
    batch_size: int
    database: Database
    stopping: StopSignal
    backlog: threading.Event


class ConsumerThread:
    """Takes jobs under its own part of the worker's name, has them processed, and settles them."""

    def __init__(self, reserved: ReservedJobs, shared: SharedState) -> None:
        self.reserved = reserved
        self.is_busy = False
        self.waiting_for: str | None = None
        self.reason: str | None = None
        self._took_at: float | None = None
        self._is_idle = True
        self._process, self._batch_size, self._database, self._stopping, self._backlog = shared
        self._done: list[Finished | Failed] = []
        self._pause_s = FIRST_PAUSE_S

    def run_primary(self) -> None:
        """Work until told to stop. Trouble with either server is waited out."""
        self._await_database()
        while not self._stopping.requested:
            try:
                taken = self._take_and_process()
                if taken is None:
                    self._stopping.wait(SUSPENDED_PAUSE_S)
                elif taken == 0:
                    self.is_busy = False
                    self.reserved.wait(WAIT_S)
            except DatabaseUnavailable as error:
                self._release()
                self.pause("database", str(error))
                self._await_database()
            except RedisError as error:
                self.pause_for_redis(error)

    def run_helper(self) -> None:
        """Work while it is crowded, until told to stop. The lane that leads waits for the database."""
        while not self._stopping.requested:
            if self._is_idle and not self._backlog.wait(SLICE_S):
                continue
            self._is_idle = False
            try:
                taken = self._take_and_process()
                if taken is None or taken < self._batch_size:
                    self._settle()
                    # Suspended, it may hold jobs all the same: the answer to an earlier take was lost.
                    if taken is not None or self._release():
                        self._go_idle()
            except DatabaseUnavailable:
                if self._release():
                    self._go_idle()
            except RedisError as error:  # it may hold jobs, so it does not rest before it knows
                self.pause_for_redis(error)

    def in_hand_s(self) -> float:
        """Return for how long the batch that is being processed has been in hand; 0 when there is none."""
        took_at = self._took_at
        return 0.0 if took_at is None else round(time.monotonic() - took_at, 1)

    def leave(self) -> None:
        """Settle what is done and give back what is held. Raises RedisError."""
        self._settle()
        self.reserved.leave()

    def pause_for_redis(self, error: RedisError) -> None:
        """Wait a while for Redis, and connect anew: another may lead at the same address by then."""
        self.reserved.redis.connection_pool.disconnect(inuse_connections=False)
        self.pause("Redis", explain(error))

    def pause(self, what: str, reason: str) -> None:
        """Wait a while, longer each time in a row, and say what for."""
        self.waiting_for, self.reason = what, reason
        log.warning("waiting", what=what, reason=reason, pause_s=self._pause_s)
        self._stopping.wait(self._pause_s)
        self._pause_s = min(self._pause_s * 2, MAX_PAUSE_S)

    def _take_and_process(self) -> int | None:
        """Settle the last batch, take the next and process it; return its size, None while suspended."""
        jobs = self.reserved.settle_and_take(self._done, self._batch_size)
        self._done = []
        self.waiting_for = self.reason = None
        if jobs:
            self.is_busy = True
            if len(jobs) == self._batch_size:
                self._backlog.set()
            self._took_at = time.monotonic()
            try:
                self._done = self._process(jobs)
            finally:
                self._took_at = None
        self._pause_s = FIRST_PAUSE_S
        return None if jobs is None else len(jobs)

    def _settle(self) -> None:
        if self._done:
            self.reserved.settle_and_take(self._done, 0)
            self._done = []

    def _go_idle(self) -> None:
        """Sleep until it is crowded again. Nothing is in hand."""
        self._is_idle = True
        self.is_busy = False
        self._backlog.clear()

    def _release(self) -> bool:
        """Give the batch back, as no event is at fault; say whether that worked."""
        try:
            self.reserved.release()
        except RedisError:
            # It stays under this worker's name, and the next take begins with it.
            log.warning("batch not given back", worker=self.reserved.worker)
            return False
        return True

    def _await_database(self) -> None:
        while not self._stopping.requested:
            reason = database_trouble(self._database)
            if reason is None:
                return
            self.pause("database", reason)


def database_trouble(database: Database) -> str | None:
    """Return why the database cannot take changes now, as a line that says what to do; None when it can.

    A schema newer than this code is no trouble: while a new version is being deployed, the old one goes on.
    """
    try:
        database.ping()  # once: whoever waits asks again soon, and looks in between whether it is to stop
        state = schema.state(database)
    except DatabaseError as error:
        return str(error)
    if state in {schema.SchemaState.MISSING, schema.SchemaState.OLD}:
        return f"the schema is {state.value}: run clerk-sync db upgrade"
    if state is schema.SchemaState.NEWER:
        log.warning("the schema is newer than this version: deploy the version that made it")
    return None

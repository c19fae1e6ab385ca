"""Runs small tasks in a thread, each at its own interval."""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import structlog
from redis.exceptions import RedisError

from db.connection.errors import DatabaseError

log = structlog.get_logger("worker.periodic")

TICK_S = 0.5


class PeriodicTask(NamedTuple):
    """A function that is called at an interval."""

    name: str
    every_s: float
    do: Callable[[], object]


class PeriodicRunner:
    """Runs tasks in a thread of its own, from `start` until `stop`.

    A task that fails because Redis or the database is unavailable runs again at its next interval.
    """

    def __init__(self, *tasks: PeriodicTask) -> None:
        self._tasks = tasks
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="periodic", daemon=True)

    def start(self) -> None:
        """Start the thread, which runs every task immediately."""
        self._thread.start()

    def stop(self, timeout_s: float = 5) -> None:
        """End the thread after the running task."""
        self._stopped.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        due = [time.monotonic()] * len(self._tasks)
        while not self._stopped.is_set():
            for i, task in enumerate(self._tasks):
                if time.monotonic() >= due[i]:
                    _do(task)
                    due[i] = time.monotonic() + task.every_s
            self._stopped.wait(min(TICK_S, *(task.every_s for task in self._tasks)))


def _do(task: PeriodicTask) -> None:
    try:
        task.do()
    except (RedisError, DatabaseError) as error:
        log.debug("task postponed", task=task.name, error=type(error).__name__)
    except Exception as error:  # an error in one task must not end the heartbeat
        log.error("task failed", task=task.name, error=type(error).__name__)

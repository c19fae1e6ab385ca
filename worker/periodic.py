"""A thread that runs small tasks beside a loop, each at its own interval."""

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
    """What to do every so many seconds."""

    name: str
    every_s: float
    do: Callable[[], object]


class PeriodicRunner:
    """Runs tasks in a thread of its own, from `start` until `stop`.

    A task that fails because Redis or the database is unavailable runs again at its next turn.
    """

    def __init__(self, *tasks: PeriodicTask) -> None:
        self._tasks = tasks
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="periodic", daemon=True)

    def start(self) -> None:
        """Begin, with every task at once."""
        self._thread.start()

    def stop(self, timeout_s: float = 5) -> None:
        """End after the task that is running."""
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
    except Exception as error:  # a fault in one task must not end the heartbeat
        log.error("task failed", task=task.name, error=type(error).__name__)

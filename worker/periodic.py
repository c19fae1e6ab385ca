"""A thread beside a loop that does small things, each at its own interval, whatever the loop is at."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import structlog
from redis.exceptions import RedisError

from db.connection.errors import DatabaseError

log = structlog.get_logger("worker.periodic")

TICK_S = 0.5


class PeriodicTask(NamedTuple):
    """What is to be done every so many seconds."""

    name: str
    every_s: float
    do: Callable[[], object]


class PeriodicRunner:
    """Does its duties in a thread of its own, from `start` until `stop`.

    One that fails because Redis or the database is away is tried again at its next turn.
    """

    def __init__(self, tasks: Sequence[PeriodicTask]) -> None:
        self._periodic_tasks = tasks
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def start(self) -> None:
        """Begin, with every duty at once."""
        self._thread.start()

    def stop(self, timeout_s: float = 5) -> None:
        """End after the duty that is being done."""
        self._stopped.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        due = [time.monotonic()] * len(self._periodic_tasks)
        while not self._stopped.is_set():
            for i, task in enumerate(self._periodic_tasks):
                if time.monotonic() >= due[i]:
                    self._do(task)
                    due[i] = time.monotonic() + task.every_s
            self._stopped.wait(TICK_S)

    def _do(self, task: PeriodicTask) -> None:
        try:
            task.do()
        except (RedisError, DatabaseError) as error:
            log.debug("duty put off", task=task.name, error=type(error).__name__)
        except Exception as error:  # a fault in one duty must not end the heartbeat
            log.error("duty failed", task=task.name, error=type(error).__name__)

"""A worker that is struck by a signal at one step of a batch, its third. Only tests run it.

    python -m tests.faults.crashing_worker "in transaction" KILL

By then there are batches that it has settled, and others in its hand where it applies several at a time.
What the worker works with is wrapped here, in this process: the worker itself knows of no such thing.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any
from unittest.mock import patch

from redis.connection import Connection

from config import load
from db.apply import users
from worker import log
from worker.queue.consumer import ReservedJobs, Settled, TakenJob
from worker.runner import batch_worker

BATCH = 3
STEPS = ("taken", "loaded", "parsed", "in transaction", "committed", "finishing", "finished")


class Crash:
    """Strikes this process when it comes to a step, the third time and no more."""

    def __init__(self, step: str, number: signal.Signals) -> None:
        assert step in STEPS
        self._step = step
        self._number = number
        self._times = count(1)
        self.settles = threading.local()  # `now` while this thread tells Redis what is done

    def at(self, step: str) -> None:
        """Strike, if this is the step and the time has come."""
        if step == self._step and next(self._times) == BATCH:
            os.kill(os.getpid(), self._number)


def crashing_jobs(crash: Crash) -> type[ReservedJobs]:
    """Return a HeldJobs that is struck on its way to Redis and back."""

    class CrashingJobs(ReservedJobs):
        def settle_and_take(self, done: Sequence[Settled], limit: int) -> list[TakenJob] | None:
            jobs = super().settle_and_take(done, limit)
            if jobs:
                crash.at("loaded")
            return jobs

        def _send_and_take(self, done: Sequence[Settled], limit: int) -> Any:
            crash.settles.now = bool(done)
            taken = super()._send_and_take(done, limit)
            if done:
                crash.at("finished")
            if taken:
                crash.at("taken")
            return taken

    return CrashingJobs


def before_reading(crash: Crash, read: Callable[..., Any]) -> Callable[..., Any]:
    """Return `read` so that the process is struck when it has sent what is done, and has heard no answer."""

    def read_response(*args: Any, **kwargs: Any) -> Any:
        if getattr(crash.settles, "now", False):
            crash.settles.now = False
            crash.at("finishing")
        return read(*args, **kwargs)

    return read_response


def around(crash: Crash, before: str, function: Callable[..., Any], after: str) -> Callable[..., Any]:
    """Return `function` so that the process is struck before or after it."""

    def struck(*args: Any, **kwargs: Any) -> Any:
        crash.at(before)
        answer = function(*args, **kwargs)
        crash.at(after)
        return answer

    return struck


def main() -> None:
    """Run the worker."""
    crash = Crash(sys.argv[1], signal.Signals[f"SIG{sys.argv[2]}"])
    settings = load("redis_url", "database_url")
    log.configure(settings)
    with (
        patch.object(batch_worker, "ReservedJobs", crashing_jobs(crash)),
        patch.object(Connection, "read_response", before_reading(crash, Connection.read_response)),
        patch.object(users, "apply", around(crash, "parsed", users.apply, "committed")),
        patch.object(users, "_decide", around(crash, "in transaction", users._decide, "")),
    ):
        batch_worker.run(settings)


if __name__ == "__main__":
    main()

"""A worker that sends itself a signal at one step of its third batch. Only tests run it.

    python -m tests.faults.crashing_worker "in transaction" KILL

By the third batch it has settled others, and it may hold several. The functions that the worker calls are
patched in this process; the worker's own code has no hook.
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
    """Sends the signal to this process when it reaches a step for the third time."""

    def __init__(self, step: str, number: signal.Signals) -> None:
        assert step in STEPS
        self._step = step
        self._number = number
        self._times = count(1)
        self.settles = threading.local()  # `now` is true while this thread settles jobs in Redis

    def at(self, step: str) -> None:
        """Send the signal if this is the step, for the third time."""
        if step == self._step and next(self._times) == BATCH:
            os.kill(os.getpid(), self._number)


def crashing_jobs(crash: Crash) -> type[ReservedJobs]:
    """Return a ReservedJobs that crashes before and after its calls of Redis."""

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
    """Return a `read` that crashes when the settled jobs are sent and the answer has not been read."""

    def read_response(*args: Any, **kwargs: Any) -> Any:
        if getattr(crash.settles, "now", False):
            crash.settles.now = False
            crash.at("finishing")
        return read(*args, **kwargs)

    return read_response


def around(crash: Crash, before: str, function: Callable[..., Any], after: str) -> Callable[..., Any]:
    """Return a `function` that crashes before or after its work."""

    def crashing(*args: Any, **kwargs: Any) -> Any:
        crash.at(before)
        answer = function(*args, **kwargs)
        crash.at(after)
        return answer

    return crashing


def main() -> None:
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

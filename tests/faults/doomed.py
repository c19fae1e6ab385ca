"""A worker that is struck by a signal at one step of its first batch. Only tests run it.

    python -m tests.faults.doomed "in transaction" KILL

What the worker works with is wrapped here, in this process: the worker itself knows of no such thing.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

from redis.connection import Connection

from config import load
from db import users
from worker import log, process
from worker.queue import Failed, Finished, HeldJobs, TakenJob

STEPS = ("taken", "loaded", "parsed", "in transaction", "committed", "finishing", "finished")


class Doom:
    """Strikes this process when it comes to a step, once."""

    def __init__(self, step: str, number: signal.Signals) -> None:
        assert step in STEPS
        self._step: str | None = step
        self._number = number

    def awaits(self, step: str) -> bool:
        """Say whether this is the step."""
        return step == self._step

    def at(self, step: str) -> None:
        """Strike, if this is the step."""
        if self.awaits(step):
            self._step = None
            os.kill(os.getpid(), self._number)


def doomed_jobs(doom: Doom) -> type[HeldJobs]:
    """Return a HeldJobs that is struck on its way to Redis and back."""

    class DoomedJobs(HeldJobs):
        def finish_and_take(self, done: Sequence[Finished | Failed], limit: int) -> list[TakenJob] | None:
            jobs = super().finish_and_take(done, limit)
            if jobs:
                doom.at("loaded")
            return jobs

        def _settle_and_take(self, done: Sequence[Finished | Failed], limit: int) -> Any:
            if done and doom.awaits("finishing"):
                with patch.object(Connection, "read_response", lambda *_a, **_k: doom.at("finishing")):
                    return super()._settle_and_take(done, limit)  # sent, and the answer is never read
            taken = super()._settle_and_take(done, limit)
            doom.at("finished" if done else "taken" if taken else "")
            return taken

    return DoomedJobs


def around(doom: Doom, before: str, function: Callable[..., Any], after: str) -> Callable[..., Any]:
    """Return `function` so that the process is struck before or after it."""

    def struck(*args: Any, **kwargs: Any) -> Any:
        doom.at(before)
        answer = function(*args, **kwargs)
        doom.at(after)
        return answer

    return struck


def main() -> None:
    """Run the worker."""
    doom = Doom(sys.argv[1], signal.Signals[f"SIG{sys.argv[2]}"])
    settings = load("redis_url", "database_url")
    log.configure(settings)
    with (
        patch.object(process, "HeldJobs", doomed_jobs(doom)),
        patch.object(users, "apply", around(doom, "parsed", users.apply, "committed")),
        patch.object(users, "_decide", around(doom, "in transaction", users._decide, "")),
    ):
        process.run(settings)


if __name__ == "__main__":
    main()

"""A worker whose pauses are 150 times shorter, so that ten minutes of waiting fit into a test.

Only tests run it.
"""

from unittest.mock import patch

from config import load
from worker import log
from worker.runner import batch_worker
from worker.shutdown import StopSignal

FASTER = 150


class ShortWaits(StopSignal):
    def wait(self, seconds: float) -> None:
        super().wait(seconds / FASTER)


def main() -> None:
    settings = load("redis_url", "database_url")
    log.configure(settings)
    with patch.object(batch_worker, "StopSignal", ShortWaits):
        batch_worker.run(settings)


if __name__ == "__main__":
    main()

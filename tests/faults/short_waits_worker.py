"""A worker that is less patient, so that ten minutes of waiting fit into a test. Only tests run it.

It pauses as often as in ten minutes, and a hundred and fiftieth as long.
"""

from unittest.mock import patch

from config import load
from worker import log
from worker.runner import batch_worker
from worker.shutdown import StopSignal

FASTER = 150


class ShortWaits(StopSignal):
    """Sleeps for less than the given time."""

    def wait(self, seconds: float) -> None:
        """Sleep for so much less, or until a signal comes."""
        super().wait(seconds / FASTER)


def main() -> None:
    """Run the worker."""
    settings = load("redis_url", "database_url")
    log.configure(settings)
    with patch.object(batch_worker, "StopSignal", ShortWaits):
        batch_worker.run(settings)


if __name__ == "__main__":
    main()

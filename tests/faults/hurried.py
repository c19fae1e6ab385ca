"""A worker that is less patient, so that ten minutes of waiting fit into a test. Only tests run it.

It pauses as often as in ten minutes, and a fortieth as long.
"""

from unittest.mock import patch

from config import load
from worker import log, process

FASTER = 40


def main() -> None:
    """Run the worker."""
    settings = load("redis_url", "database_url")
    log.configure(settings)
    with patch.object(process, "MAX_PAUSE_S", process.MAX_PAUSE_S / FASTER):
        process.run(settings)


if __name__ == "__main__":
    main()

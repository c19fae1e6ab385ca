"""Waits that have a deadline."""

import time
from collections.abc import Callable

from cli.dev.process import POLL


def wait_until(holds: Callable[[], object], timeout: float, explain: Callable[[], str] = str) -> None:
    """Wait until `holds()` is true, `timeout` seconds at most."""
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, explain()
        time.sleep(POLL)

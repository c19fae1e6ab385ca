"""Waits that have a deadline."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FIRST_PAUSE_S, MAX_PAUSE_S = 0.01, 0.1  # what is looked at may cost more than the wait


def wait_until(holds: Callable[[], object], timeout: float, explain: Callable[[], str] = str) -> None:
    """Wait until `holds()` is true, `timeout` seconds at most."""
    deadline = time.monotonic() + timeout
    pause_s = FIRST_PAUSE_S
    while not holds():
        assert time.monotonic() < deadline, explain()
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, MAX_PAUSE_S)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail when the block takes that long."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds

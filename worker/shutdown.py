"""Stop requests to a process."""

import signal
import time
from collections.abc import Callable

from config import ServiceError

SLICE_S = 0.2


class Stopped(ServiceError):
    """The process was asked to stop; finished work is kept."""


class StopSignal:
    """Becomes `requested` on SIGTERM or SIGINT; work in progress is finished first.

    With `also`, a stop is requested as well while `also()` is true. It uses a plain number, because a
    threading.Event can deadlock if its `set` interrupts its own `wait`.
    """

    def __init__(self, also: Callable[[], bool] = lambda: False) -> None:
        self._requested_at: float | None = None
        self._also = also

    @property
    def requested(self) -> bool:
        """Whether to stop."""
        return self._requested_at is not None or self._also()

    def since_s(self) -> float:
        """Return how long ago the stop was requested, in s; 0 if it was not."""
        return 0.0 if self._requested_at is None else time.monotonic() - self._requested_at

    def request(self) -> None:
        """Request a stop."""
        if self._requested_at is None:
            self._requested_at = time.monotonic()

    def listen(self) -> None:
        """Handle SIGTERM and SIGINT. Must be called in the main thread."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, lambda *_: self.request())

    def wait(self, seconds: float) -> None:
        """Sleep for `seconds`, or until a stop is requested."""
        deadline = time.monotonic() + seconds
        while not self.requested and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, SLICE_S))

    def pause(self, seconds: float) -> None:
        """Sleep for `seconds`. Raises Stopped once a stop is requested."""
        self.wait(seconds)
        if self.requested:
            raise Stopped("stopped")

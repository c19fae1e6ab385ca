"""How a process is told to stop."""

import signal
import time
from types import FrameType

SLICE_S = 0.2


class StopSignal:
    """Becomes `requested` on SIGTERM or SIGINT; what is in hand is finished first.

    A plain flag: a threading.Event can deadlock when its `set` interrupts its own `wait`.
    """

    def __init__(self) -> None:
        self.requested = False

    def listen(self) -> None:
        """Take the signals over. To be called in the main thread."""
        signal.signal(signal.SIGTERM, self._request)
        signal.signal(signal.SIGINT, self._request)

    def wait(self, seconds: float) -> None:
        """Sleep for `seconds`, or until a signal comes."""
        deadline = time.monotonic() + seconds
        while not self.requested and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, SLICE_S))

    def _request(self, _signum: int, _frame: FrameType | None) -> None:
        self.requested = True

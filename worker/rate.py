"""A limit on requests, kept from our own side."""

import threading
import time

SHARE = 0.9  # of the limit is spread evenly, the rest may come at once


class RateLimit:
    """Hands out turns so that any `period_s` seconds see at most `limit` of them. Shared by threads."""

    def __init__(self, limit: int, period_s: float) -> None:
        self._interval_s = period_s / (limit * SHARE)
        self._burst_s = self._interval_s * limit * (1 - SHARE)
        self._next_at = 0.0
        self._lock = threading.Lock()

    def delay(self) -> float:
        """Take the next turn; return how many seconds to wait for it."""
        with self._lock:
            now = time.monotonic()
            turn_at = max(self._next_at, now - self._burst_s)
            self._next_at = turn_at + self._interval_s
            return max(0.0, turn_at - now)

    def pause(self, seconds: float) -> None:
        """Hand out no turn for that long."""
        with self._lock:
            self._next_at = max(self._next_at, time.monotonic() + seconds)

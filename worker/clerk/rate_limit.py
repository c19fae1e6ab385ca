"""Keeps the requests of one process within a rate limit."""

import math
import threading
import time

SHARE = 0.9  # of the limit is spread evenly, the rest may be used at once


class RateLimit:
    """Hands out turns so that any `period_s` seconds see at most `limit` of them. Shared by threads."""

    def __init__(self, limit: int, period_s: float) -> None:
        self._interval_s = period_s / (limit * SHARE)
        self._burst_s = self._interval_s * limit * (1 - SHARE)
        self._next_at = 0.0
        self._lock = threading.Lock()

    def away_s(self) -> float:
        """Return how many seconds the next turn is away."""
        return max(0.0, self._next_at - time.monotonic())

    def delay(self, at_most_s: float = math.inf) -> float:
        """Return how many seconds the next turn is away, and take it unless that is more than `at_most_s`."""
        with self._lock:
            now = time.monotonic()
            turn_at = max(self._next_at, now - self._burst_s)
            if turn_at - now <= at_most_s:
                self._next_at = turn_at + self._interval_s
            return max(0.0, turn_at - now)

    def pause(self, seconds: float) -> None:
        """Hand out no turn for that long."""
        with self._lock:
            self._next_at = max(self._next_at, time.monotonic() + seconds)

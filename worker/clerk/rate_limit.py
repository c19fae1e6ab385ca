"""Limits on requests, kept from our own side: one for a process, and one for all that share a Redis."""

import math
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from redis import Redis
from redis.exceptions import RedisError

from worker.queue import scripts

LONGEST_S = 60.0  # that a request may wait and be under way; one whose process died counts for so long
SHARE = 0.9  # of the limit is spread evenly, the rest may come at once


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


class NoTurn(Exception):
    """As many requests are made as may be. Waiting helps."""


class SharedLimit:
    """At most `limit` requests in any `period_s` seconds, by all processes and threads that use the same key.

    Whoever answers may count a request at any moment while it is under way. So it counts here from before it
    is sent until `period_s` after it was answered.
    """

    def __init__(self, redis: Redis, key: str, limit: int, period_s: float) -> None:
        self._take_turn = redis.register_script(scripts.TAKE_TURN)
        self._key = key
        self._limit = limit
        self._period_ms = int(period_s * 1000)
        self._longest_ms = self._period_ms + int(LONGEST_S * 1000)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Count the request that is made meanwhile. Raises NoTurn, redis.RedisError."""
        turn = uuid.uuid4().hex
        if not self._take(turn, self._longest_ms):
            raise NoTurn
        try:
            yield
        finally:
            with suppress(RedisError):  # then it counts for too long
                self._take(turn, self._period_ms)

    def _take(self, turn: str, counts_ms: int) -> bool:
        """Take a turn, or say how long one that was taken counts from now on."""
        answer = self._take_turn([self._key], [turn, self._limit, counts_ms, self._longest_ms])
        return bool(answer == 1)

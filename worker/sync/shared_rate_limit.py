"""A limit on requests that all processes which share a Redis keep together."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from redis import Redis
from redis.exceptions import RedisError

from worker.queue import scripts

LONGEST_S = 60.0  # that a request may wait and be under way; one whose process died counts for so long


class NoTurn(Exception):
    """As many requests are made as may be. Waiting helps."""


class SharedLimit:
    """At most `limit` requests in any `period_s` seconds, by all processes and threads that use the same key.

    The server may count a request at any time while it is under way. So a request counts here from before
    it is sent until `period_s` after its answer.
    """

    def __init__(self, redis: Redis, key: str, limit: int, period_s: float) -> None:
        self._take_turn = redis.register_script(scripts.load("take_turn"))
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

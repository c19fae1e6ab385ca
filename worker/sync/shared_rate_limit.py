"""A rate limit for all processes that share a Redis."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from redis import Redis
from redis.exceptions import RedisError

from worker.queue import scripts

LONGEST_S = 60.0  # the longest duration of a request; a request of a killed process counts for that long


class NoTurn(Exception):
    """The limit is reached. Waiting helps."""


class SharedLimit:
    """At most `limit` requests in any `period_s` seconds, by all processes and threads that use the same key.

    The server may count a request at any time between sending and answer. So a request counts here from
    before it is sent until `period_s` after its answer.
    """

    def __init__(self, redis: Redis, key: str, limit: int, period_s: float) -> None:
        self._take_turn = redis.register_script(scripts.load("take_turn"))
        self._key = key
        self._limit = limit
        self._period_ms = int(period_s * 1000)
        self._longest_ms = self._period_ms + int(LONGEST_S * 1000)

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Count the request that is made in the block. Raises NoTurn, redis.RedisError."""
        turn = uuid.uuid4().hex
        if not self._take(turn, self._longest_ms):
            raise NoTurn
        try:
            yield
        finally:
            with suppress(RedisError):  # on an error the request counts for LONGEST_S
                self._take(turn, self._period_ms)

    def _take(self, turn: str, counts_ms: int) -> bool:
        """Take a turn, or set how long a turn that was taken still counts."""
        answer = self._take_turn([self._key], [turn, self._limit, counts_ms, self._longest_ms])
        return bool(answer == 1)

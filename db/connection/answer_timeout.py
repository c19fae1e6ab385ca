"""A psycopg connection with a limit on the wait for an answer."""

import time
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen

# PostgreSQL's own limits (TRANSACTION_LIMITS) are shorter, and end the wait while PostgreSQL is reachable.
ANSWER_LIMIT_S = 45.0
LOOK_EVERY_S = 0.1  # as in psycopg: how long Ctrl-C may go unnoticed

T = TypeVar("T")


class TimeoutConnection(psycopg.Connection[Any]):
    """A connection that is closed if an answer takes longer than `answer_limit_s`; None: no limit.

    A pooler that hangs, a load balancer or a suspended machine may still acknowledge each packet of a
    connection that it no longer serves. Then neither keepalives nor tcp_user_timeout end the wait.
    """

    answer_limit_s: float | None = ANSWER_LIMIT_S

    # Every wait in psycopg 3.3 calls this method.
    def wait(self, gen: PQGen[T], interval: float = LOOK_EVERY_S, timeout: float | None = None) -> T:
        """Wait as psycopg does. After `answer_limit_s` close the connection and raise OperationalError."""
        limit_s = self.answer_limit_s if timeout is None else timeout
        began = time.monotonic()
        try:
            return super().wait(gen, interval, limit_s)
        except psycopg.OperationalError:
            if limit_s is not None and time.monotonic() - began >= limit_s:
                self.close()
            raise

"""psycopg's connection, made to wait for no answer for ever."""

import time
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen

# PostgreSQL's own limits (TRANSACTION_LIMITS) come before it, where PostgreSQL can still speak.
ANSWER_LIMIT_S = 45.0
LOOK_EVERY_S = 0.1  # as psycopg has it: Ctrl-C is seen after that long

T = TypeVar("T")


class TimeoutConnection(psycopg.Connection[Any]):
    """A connection that is closed when an answer has not come within `answer_limit_s`; None waits for ever.

    What is between may have forgotten the connection and still acknowledge each packet, and then neither
    keepalives nor tcp_user_timeout end the wait: a pooler that hangs, a load balancer, a suspended machine.
    """

    answer_limit_s: float | None = ANSWER_LIMIT_S

    # Every wait of psycopg's goes through this method, as in 3.3.
    def wait(self, gen: PQGen[T], interval: float = LOOK_EVERY_S, timeout: float | None = None) -> T:
        """Do as psycopg does. Raises OperationalError, and is closed, when it takes too long."""
        limit_s = self.answer_limit_s if timeout is None else timeout
        began = time.monotonic()
        try:
            return super().wait(gen, interval, limit_s)
        except psycopg.OperationalError:
            if limit_s is not None and time.monotonic() - began >= limit_s:
                self.close()
            raise

"""psycopg, changed in two places: it limits the wait for an answer, and reads every timestamp."""

import time
from datetime import UTC, datetime
from typing import Any, TypeVar

import psycopg
from psycopg.abc import Buffer, PQGen
from psycopg.adapt import Loader

from db.times import EARLIEST, LATEST

# PostgreSQL's own limits (see `session`) are shorter, and end the wait while PostgreSQL is reachable.
ANSWER_LIMIT_S = 45.0
LOOK_EVERY_S = 0.1  # as in psycopg: how long Ctrl-C may go unnoticed
BEFORE_PYTHON = ("-infinity", "0000")

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


class BoundedTimestamptzLoader(Loader):
    """Reads ISO timestamps in UTC, as each transaction sets them (see `session`), whatever the default is.

    psycopg's own loader asks for the DateStyle that the server reported last, and a server reports what a
    pipeline sets only at its end. `infinity`, BC and years from 10000 on are read as the latest or earliest
    moment: an application may have written them, and one such row must not stop the others. A `timestamp`
    is in UTC: some applications' ORMs change the columns' type to it.
    """

    def load(self, data: Buffer) -> datetime:
        """Return the moment."""
        text = bytes(data).decode()
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:
            return EARLIEST if text.startswith(BEFORE_PYTHON) or text.endswith("BC") else LATEST
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)

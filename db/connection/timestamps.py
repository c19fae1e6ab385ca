"""Reads timestamps, also those outside the range of Python's datetime."""

from datetime import datetime

from psycopg.abc import Buffer
from psycopg.adapt import Loader

from db.times import EARLIEST, LATEST

BEFORE_PYTHON = ("-infinity", "0000")


class BoundedTimestamptzLoader(Loader):
    """Reads ISO timestamps in UTC, as each transaction sets them (see `session`), whatever the default is.

    psycopg's own loader uses the DateStyle that the server reported last, and during a pipeline the server
    reports a new value only at the end. `infinity`, BC and years from 10000 on are read as the latest or
    earliest moment: an application may have written them, and one such row must not block the others.
    """

    def load(self, data: Buffer) -> datetime:
        """Return the moment."""
        text = bytes(data).decode()
        try:
            return datetime.fromisoformat(text)
        except ValueError:
            return EARLIEST if text.startswith(BEFORE_PYTHON) or text.endswith("BC") else LATEST

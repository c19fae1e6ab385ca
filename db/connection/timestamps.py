"""How timestamps are read that Python's calendar does not have."""

from datetime import datetime
from typing import cast

import psycopg
from psycopg.abc import AdaptContext, Buffer
from psycopg.adapt import Loader
from psycopg.pq import Format

from db.times import EARLIEST, LATEST

TIMESTAMPTZ_OID = psycopg.adapters.types["timestamptz"].oid
LOADER = cast("type[Loader]", psycopg.adapters.get_loader(TIMESTAMPTZ_OID, Format.TEXT))
BEFORE_PYTHON = (b"-infinity", b"0001")  # the second in a time zone where UTC still has the year before


class BoundedTimestamptzLoader(Loader):
    """Reads `infinity`, BC and years from 10000 on as the latest or earliest moment, where psycopg raises.

    An application may have written them, and one such row must not stop the others.
    """

    def __init__(self, oid: int, context: AdaptContext | None = None) -> None:
        super().__init__(oid, context)
        self._loader = LOADER(oid, context)

    def load(self, data: Buffer) -> datetime:
        """Return the moment."""
        try:
            moment: datetime = self._loader.load(data)
        except psycopg.DataError:
            text = bytes(data)
            return EARLIEST if text.startswith(BEFORE_PYTHON) or text.endswith(b"BC") else LATEST
        return moment

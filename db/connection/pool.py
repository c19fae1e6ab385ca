"""A pool that leaves no connection open when it is replaced while some are in use."""

from threading import Lock
from typing import Any

from sqlalchemy.pool import ConnectionPoolEntry, QueuePool


class ReplaceablePool(QueuePool):
    """A QueuePool that closes connections that are returned after it was disposed of.

    SQLAlchemy leaves that to the garbage collector; until then they occupy connections of the server.
    https://docs.sqlalchemy.org/en/21/core/connections.html#engine-disposal
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._lock = Lock()
        self._disposed = False

    def dispose(self) -> None:
        """Close every idle connection, and from now on each one that is returned."""
        with self._lock:
            self._disposed = True
        super().dispose()

    # A private method of SQLAlchemy 2.1 (tests/test_private_names.py lists all such names).
    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        with self._lock:
            if not self._disposed:
                super()._do_return_conn(record)
                return
        record.close()
        super()._do_return_conn(record)  # a waiting caller reconnects it

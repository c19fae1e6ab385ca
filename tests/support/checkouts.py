"""Counts how often a connection is taken from a pool: once for each attempt at a transaction."""

from collections.abc import Callable

from sqlalchemy import event

from db.connection.engine import Database


def count_checkouts(database: Database) -> Callable[[], int]:
    """Return a function that returns the number of checkouts since this call."""
    taken: list[object] = []
    event.listen(database.engine, "checkout", lambda *_: taken.append(None))
    return lambda: len(taken)

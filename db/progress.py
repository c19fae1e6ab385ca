"""The progress of long tasks: one small JSON object for each."""

from datetime import timedelta
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert

from db.connection.engine import Database
from db.models import SyncProgress


def load(database: Database, task: str, younger_than: timedelta | None = None) -> dict[str, Any] | None:
    """Return the state saved for `task`; None if there is none, or it is too old."""
    query = select(SyncProgress.state).where(SyncProgress.task == task)
    if younger_than is not None:
        query = query.where(SyncProgress.saved_at > func.now() - younger_than)
    return database.run(lambda connection: connection.scalar(query))


def save(database: Database, task: str, state: dict[str, Any]) -> None:
    """Save `state` for `task` in place of an earlier one."""
    values = {"state": state, "saved_at": func.now()}
    statement = insert(SyncProgress).values(task=task, **values)
    statement = statement.on_conflict_do_update(index_elements=["task"], set_=values)
    database.run(lambda connection: connection.execute(statement))


def clear(database: Database, task: str) -> None:
    """Delete the state saved for `task`."""
    database.run(lambda connection: connection.execute(delete(SyncProgress).where(SyncProgress.task == task)))

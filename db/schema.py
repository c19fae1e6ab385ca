"""The schema's revision: which one the database is at, and the way up and down."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, Inspector, inspect

import migrations
from db.connection.engine import Database
from db.models import Base


class SchemaState(StrEnum):
    """How the database's schema stands to this code."""

    CURRENT = "current"
    MISSING = "missing"  # no migration has run
    OLD = "old"
    NEWER = "newer"  # a revision that this code does not know


class MigrationError(Exception):
    """There is no such way up or down, or something stands in it; the message says what."""

    retryable = False


def upgrade(database: Database, revision: str = "head") -> None:
    """Run every migration up to `revision`. Of two at once the second waits and then does nothing.

    Raises MigrationError, also when a table of that name is there already, which is somebody else's.
    """
    conflicting = _conflicting_tables(database)
    if conflicting:
        name = conflicting[0]
        raise MigrationError(
            f"a table {name} is there already, and not by this service: give the service a database of its"
            f" own, or move that table away: CREATE SCHEMA before; ALTER TABLE {name} SET SCHEMA before"
            " (docs/operations.md tells how to keep its rows)"
        )
    _migrate(database, command.upgrade, revision)


def downgrade(database: Database, revision: str) -> None:
    """Take migrations back, down to `revision`; `base` is before the first. Raises MigrationError."""
    _migrate(database, command.downgrade, revision)


def _migrate(database: Database, move: Callable[[Config, str], None], revision: str) -> None:
    try:
        database.run(lambda connection: move(_config(connection), revision))
    except CommandError as error:
        raise MigrationError(str(error)) from None


def revision(database: Database) -> str | None:
    """Return the revision that the database is at; None when no migration has run."""
    return database.run(lambda connection: MigrationContext.configure(connection).get_current_revision())


def head() -> str:
    """Return the newest revision that this code knows."""
    return str(_script().get_current_head())


def tables() -> list[str]:
    """Return the names of the tables that the migrations make."""
    return list(Base.metadata.tables)


def state(database: Database) -> SchemaState:
    """Compare the database with this code."""
    found = revision(database)
    if found is None:
        return SchemaState.MISSING
    if found == head():
        return SchemaState.CURRENT
    known = {script.revision for script in _script().walk_revisions()}
    return SchemaState.OLD if found in known else SchemaState.NEWER


def _conflicting_tables(database: Database) -> list[str]:
    """Return which tables have the name of one of ours, where no migration has run."""
    there = database.run(lambda connection: _names(inspect(connection)))
    found = [name for name in tables() if name in there]
    return found if revision(database) is None else []


def _names(inspector: Inspector) -> list[str]:
    return [*inspector.get_table_names(), *inspector.get_view_names()]


def _script() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    config.attributes["connection"] = connection
    return config

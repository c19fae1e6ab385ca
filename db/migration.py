"""Runs the migrations, up and down, and reports what prevents them."""

from collections.abc import Callable
from typing import cast

import psycopg
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.script.revision import RevisionError
from alembic.util import CommandError
from sqlalchemy import Connection, func, inspect, select
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.schema import CreateSchema

from config import ServiceError
from db.connection.engine import Database, schema_of
from db.connection.errors import DatabaseUnavailable, sqlstate
from db.schema import TABLES, SchemaState, current_revision, relations, state

DEPENDENT_OBJECTS = "2BP01"
DUPLICATES = ("42P07", "42710")  # of a table, view or index; of a type
# For a statement that waits to change a table: meanwhile every reader of the table waits too.
LOCK_TIMEOUT = "10s"


class MigrationError(ServiceError):
    """The migrations cannot run; the message says why and what to do."""


def upgrade(database: Database, revision: str = "head") -> None:
    """Run every migration up to `revision`. If two run at once, the second waits and then does nothing.

    Raises MigrationError, also when another owner's table has the name of one of ours.
    """
    _migrate(database, command.upgrade, revision)


def downgrade(database: Database, revision: str) -> None:
    """Undo migrations down to `revision`; `base` undoes all of them. Raises MigrationError."""
    _migrate(database, command.downgrade, revision)


def _migrate(database: Database, move: Callable[[Config, str], None], revision: str) -> None:
    def run(connection: Connection) -> None:
        try:
            move(_config(connection), revision)
        except ProgrammingError as error:
            if sqlstate(error) not in DUPLICATES:
                raise
            # The text contains only the name.
            found = cast("psycopg.Error", error.orig).diag.message_primary
            raise MigrationError(
                f"{found} and is not this service's: rename it, or set DATABASE_SCHEMA to a schema of its own"
                " (docs/operations.md, Moving the tables into a schema)"
            ) from None

    try:
        database.run(run)
    except CommandError as error:
        raise _impossible(database, str(error)) from None
    except DatabaseUnavailable as error:
        if error.state != DEPENDENT_OBJECTS:
            raise
        raise MigrationError(
            "foreign keys or views of the application depend on the tables: drop them first"
        ) from None


def steps_down(database: Database, revision: str) -> list[str]:
    """Return the migrations that a downgrade to `revision` undoes, newest first: number and subject.

    Raises MigrationError if the schema cannot be downgraded to it.
    """
    found = current_revision(database)
    script = ScriptDirectory.from_config(_config())
    try:
        steps = script.iterate_revisions(found, revision, select_for_downgrade=True)
        return [f"{step.revision}  {step.doc}" for step in steps]
    except RevisionError:
        raise _impossible(database, f"no migration leads from {found or 'base'} down to {revision}") from None


def _impossible(database: Database, reason: str) -> MigrationError:
    """Return the error of a migration that is impossible: a newer version made the schema, else `reason`."""
    found = state(database)
    return MigrationError(str(found.trouble) if found is SchemaState.NEWER else reason)


def prepare(connection: Connection) -> None:
    """Create the schema for the first migration, unless it exists.

    Raises MigrationError when the role may not create the tables there, or one of that name exists.
    """
    schema = schema_of(connection)
    # CREATE SCHEMA IF NOT EXISTS requires the right to create schemas even if the schema exists.
    if schema is not None and not inspect(connection).has_schema(schema):
        if not connection.scalar(select(func.has_database_privilege(func.current_database(), "CREATE"))):
            raise MigrationError(
                "the role has no right to create the schema DATABASE_SCHEMA: as the database's owner"
                f' CREATE SCHEMA "{schema}" AUTHORIZATION …, then run this again'
            )
        connection.execute(CreateSchema(schema))
    where = schema or func.current_schema()
    may_create = connection.scalar(select(func.has_schema_privilege(where, "CREATE")))
    if may_create is None:
        raise MigrationError(
            "the role's search_path names no schema that exists and that it may use: correct it, or set"
            " DATABASE_SCHEMA to a schema of its own (docs/neon-setup.md)"
        )
    if not may_create:
        raise MigrationError(
            "the role has no right to create tables: GRANT CREATE, USAGE ON SCHEMA … TO …, or set"
            " DATABASE_SCHEMA to a schema of its own (docs/neon-setup.md)"
        )
    existing = relations(connection)
    conflicting = [name for name in TABLES if name in existing]
    if conflicting:
        raise MigrationError(
            f"a table {conflicting[0]} already exists and is not this service's: set DATABASE_SCHEMA to a"
            " schema of its own (docs/operations.md explains how to keep the rows)"
        )


def enter(connection: Connection) -> None:
    """Make DATABASE_SCHEMA the only schema of the search_path, and limit the wait for a lock."""
    connection.execute(select(func.set_config("lock_timeout", LOCK_TIMEOUT, True)))
    schema = schema_of(connection)
    if schema is not None:
        quoted = connection.dialect.identifier_preparer.quote_identifier(schema)
        connection.execute(select(func.set_config("search_path", quoted, True)))


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", "migrations:")
    config.attributes["connection"] = connection
    return config

"""The schema of the database: its revision, migrations up and down, and what stands in their way."""

from collections.abc import Callable
from enum import StrEnum
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.script.revision import RevisionError
from alembic.util import CommandError
from sqlalchemy import Connection, any_, column, func, inspect, select, table
from sqlalchemy.schema import CreateSchema

from db.connection.causes import Cause
from db.connection.engine import Database, schema_of
from db.connection.errors import DatabaseUnavailable, unavailable
from db.models import VIEWS, Base, OrganizationSync, User

VERSION_TABLE = "clerk_sync_version"  # an application's `alembic_version` may stand beside it

DEPENDENT_OBJECTS = "2BP01"
# Of a statement that waits to change a table: whatever wants to read the table waits behind it.
LOCK_TIMEOUT = "10s"

NAMESPACES = table("pg_namespace", column("oid"), column("nspname"), schema="pg_catalog")
RELATIONS = table("pg_class", column("oid"), column("relname"), column("relnamespace"), schema="pg_catalog")


class SchemaState(StrEnum):
    """The database's revision compared with this code's."""

    CURRENT = "current"
    MISSING = "missing"  # no migration has run
    OLD = "old"
    NEWER = "newer"  # a revision that this code does not know

    @property
    def trouble(self) -> str | None:
        """What is wrong and what to do, None when nothing is."""
        if self is SchemaState.NEWER:
            return "the schema is newer than this version: deploy the version that made it"
        if self is SchemaState.CURRENT:
            return None
        return f"the schema is {self.value}: run clerk-sync db upgrade"


class MigrationError(Exception):
    """The migrations cannot run; the message says why and what to do."""

    retryable = False


def upgrade(database: Database, revision: str = "head") -> None:
    """Run every migration up to `revision`. Of two at once the second waits and then does nothing.

    Raises MigrationError, also when another owner's table has the name of one of ours.
    """
    _migrate(database, command.upgrade, revision)


def downgrade(database: Database, revision: str) -> None:
    """Undo migrations down to `revision`; `base` undoes all of them. Raises MigrationError."""
    _migrate(database, command.downgrade, revision)


def _migrate(database: Database, move: Callable[[Config, str], None], revision: str) -> None:
    try:
        database.run(lambda connection: move(_config(connection), revision))
    except CommandError as error:
        raise MigrationError(str(error)) from None
    except DatabaseUnavailable as error:
        if error.state != DEPENDENT_OBJECTS:
            raise
        raise MigrationError(
            "foreign keys or views of the application depend on the tables: drop them first"
        ) from None


def steps_down(database: Database, revision: str) -> list[str]:
    """Return what a downgrade to `revision` takes back, newest first: each migration's number and subject.

    Raises MigrationError when there is no such way down.
    """
    found = current_revision(database)
    try:
        steps = _script().iterate_revisions(found, revision, select_for_downgrade=True)
        return [f"{step.revision}  {step.doc}" for step in steps]
    except RevisionError:
        raise MigrationError(f"no migration leads from {found or 'base'} down to {revision}") from None


def count_users(database: Database) -> int:
    """Return the number of rows of `users`; 0 without the table."""
    if current_revision(database) is None:
        return 0
    return database.run(lambda connection: connection.scalars(select(func.count()).select_from(User)).one())


def current_revision(database: Database) -> str | None:
    """Return the revision that the database is at; None when no migration has run.

    Raises DatabaseUnavailable when the role may not look into the schema.
    """
    return database.run(_revision)


def _revision(connection: Connection) -> str | None:
    _require_usage(connection)
    context = MigrationContext.configure(connection, opts=migration_options(connection))
    return context.get_current_revision()


def _require_usage(connection: Connection) -> None:
    """Without the right, PostgreSQL shows the tables of the search_path as if they were not there."""
    schema = schema_of(connection)
    path = func.string_to_array(func.translate(func.current_setting("search_path"), '" ', ""), ",")
    is_one = NAMESPACES.c.nspname == (any_(path) if schema is None else schema)
    usable = func.bool_and(func.has_schema_privilege(NAMESPACES.c.nspname, "USAGE"))
    if connection.scalar(select(usable).where(is_one)) is False:
        raise unavailable("the database cannot take changes now", Cause.SCHEMA_USAGE)


def head() -> str:
    """Return the newest revision that this code knows."""
    return str(_script().get_current_head())


def tables() -> list[str]:
    """Return the names of the tables that the migrations create."""
    return list(Base.metadata.tables)


def state(database: Database) -> SchemaState:
    """Return whether the database's revision is the one of this code."""
    found = current_revision(database)
    if found is None:
        return SchemaState.MISSING
    if found == head():
        return SchemaState.CURRENT
    known = {script.revision for script in _script().walk_revisions()}
    return SchemaState.OLD if found in known else SchemaState.NEWER


def migration_options(connection: Connection) -> dict[str, Any]:
    """Return what Alembic is configured with, by the migrations and by whatever compares with the models."""
    return {
        "target_metadata": Base.metadata,
        "version_table": VERSION_TABLE,
        "version_table_schema": schema_of(connection),
    }


def prepare(connection: Connection) -> None:
    """Create the schema for the first migration, unless it is there.

    Raises MigrationError when the role may not create the tables there, or one of that name exists.
    """
    schema = schema_of(connection)
    # CREATE SCHEMA IF NOT EXISTS wants the right to create one even where it exists.
    if schema is not None and not inspect(connection).has_schema(schema):
        if not connection.scalar(select(func.has_database_privilege(func.current_database(), "CREATE"))):
            raise MigrationError(
                "the role has no right to create the schema DATABASE_SCHEMA: as the database's owner"
                f' CREATE SCHEMA "{schema}" AUTHORIZATION …, then run this again'
            )
        connection.execute(CreateSchema(schema))
    if not connection.scalar(select(func.has_schema_privilege(schema or func.current_schema(), "CREATE"))):
        raise MigrationError(
            "the role has no right to create tables: GRANT CREATE, USAGE ON SCHEMA … TO …, or set"
            " DATABASE_SCHEMA to a schema of its own (docs/neon-setup.md)"
        )
    there = _relations(connection)
    conflicting = [name for name in tables() if name in there]
    if conflicting:
        raise MigrationError(
            f"a table {conflicting[0]} already exists and is not this service's: set DATABASE_SCHEMA to a"
            " schema of its own (docs/operations.md explains how to keep the rows)"
        )


def missing_views(database: Database) -> list[str]:
    """Return which of VIEWS the migrations left out, as the application has a table or view of that name."""
    found = database.run(_relations)
    return [name for name in VIEWS if OrganizationSync.__tablename__ not in found.get(name, "")]


def enter(connection: Connection) -> None:
    """Make DATABASE_SCHEMA the only schema of the search_path, and limit the wait for a lock."""
    connection.execute(select(func.set_config("lock_timeout", LOCK_TIMEOUT, True)))
    schema = schema_of(connection)
    if schema is not None:
        quoted = connection.dialect.identifier_preparer.quote_identifier(schema)
        connection.execute(select(func.set_config("search_path", quoted, True)))


def _relations(connection: Connection) -> dict[str, str]:
    """Return what has the name of one of our tables and views: a view's definition, "" for anything else."""
    definition = func.coalesce(func.pg_get_viewdef(RELATIONS.c.oid), "").label("definition")
    found = (
        select(RELATIONS.c.relname, definition)
        .join(NAMESPACES, NAMESPACES.c.oid == RELATIONS.c.relnamespace)
        .where(
            NAMESPACES.c.nspname == (schema_of(connection) or func.current_schema()),
            RELATIONS.c.relname.in_([*tables(), *VIEWS]),
        )
    )
    return {row.relname: row.definition for row in connection.execute(found)}


def _script() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _config(connection: Connection | None = None) -> Config:
    config = Config()
    config.set_main_option("script_location", "migrations:")
    config.attributes["connection"] = connection
    return config

"""The schema of the database: its revision, compared with this code's.

`db.migration` changes it. Receivers and workers only read it, so they need not import Alembic, which takes 3
MB in each process.
"""

from enum import StrEnum
from importlib.resources import files

from sqlalchemy import Connection, String, any_, column, func, inspect, select, table

from db.connection.causes import Cause
from db.connection.engine import Database, schema_of
from db.connection.errors import unavailable
from db.models import VIEWS, Base, OrganizationSync, User

FIRST = "0001"  # the revision that creates `users`
TABLES = list(Base.metadata.tables)  # that the migrations create
VERSION_TABLE = "clerk_sync_version"  # an application's `alembic_version` may stand beside it

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
        """What is wrong and what to do, None if nothing is."""
        if self is SchemaState.NEWER:
            return "the schema is newer than this version: deploy the version that made it"
        if self is SchemaState.CURRENT:
            return None
        return f"the schema is {self.value}: run clerk-sync db upgrade"


def count_users(database: Database) -> int:
    """Return the number of rows of `users`; 0 without the table."""
    if current_revision(database) is None:
        return 0
    return database.run(lambda connection: connection.scalars(select(func.count()).select_from(User)).one())


def current_revision(database: Database) -> str | None:
    """Return the revision of the database; None if no migration has run.

    Raises DatabaseUnavailable if the role has no USAGE on the schema.
    """
    return database.run(_revision)


def _revision(connection: Connection) -> str | None:
    schema = schema_of(connection)
    if not inspect(connection).has_table(VERSION_TABLE, schema):
        _require_usage(connection)
        return None
    versions = table(VERSION_TABLE, column("version_num", String), schema=schema)
    return connection.scalar(select(versions.c.version_num))


def _require_usage(connection: Connection) -> None:
    """Raise DatabaseUnavailable without USAGE: PostgreSQL reports the tables as missing."""
    schema = schema_of(connection)
    path = func.string_to_array(func.translate(func.current_setting("search_path"), '" ', ""), ",")
    is_one = NAMESPACES.c.nspname == (any_(path) if schema is None else schema)
    usable = func.bool_and(func.has_schema_privilege(NAMESPACES.c.nspname, "USAGE"))
    if connection.scalar(select(usable).where(is_one)) is False:
        raise unavailable("the database cannot take changes now", Cause.SCHEMA_USAGE)


def head() -> str:
    """Return the newest revision that this code knows."""
    return revisions()[-1]


def revisions() -> list[str]:
    """Return the revisions that this code knows, oldest first: the migrations' file names begin with them."""
    names = (file.name for file in files("migrations.versions").iterdir())
    return sorted(name[:4] for name in names if name[:4].isdigit())


def state(database: Database) -> SchemaState:
    """Return whether the database's revision is the one of this code."""
    found = current_revision(database)
    if found is None:
        return SchemaState.MISSING
    if found == head():
        return SchemaState.CURRENT
    return SchemaState.OLD if found in revisions() else SchemaState.NEWER


def missing_views(database: Database) -> list[str]:
    """Return the VIEWS that were not created because the application has a table or view of that name."""
    found = database.run(relations)
    return [name for name in VIEWS if OrganizationSync.__tablename__ not in found.get(name, "")]


def relations(connection: Connection) -> dict[str, str]:
    """Return the relations named like one of these tables and views: a view's definition, else ""."""
    definition = func.coalesce(func.pg_get_viewdef(RELATIONS.c.oid), "").label("definition")
    found = (
        select(RELATIONS.c.relname, definition)
        .join(NAMESPACES, NAMESPACES.c.oid == RELATIONS.c.relnamespace)
        .where(
            NAMESPACES.c.nspname == (schema_of(connection) or func.current_schema()),
            RELATIONS.c.relname.in_([*TABLES, *VIEWS]),
        )
    )
    return {row.relname: row.definition for row in connection.execute(found)}

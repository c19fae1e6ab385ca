"""Runs the migrations on the connection that `db.migration` passes.

For Alembic's own command, which passes none, it opens one to DATABASE_URL_UNPOOLED.

Migrations do not name DATABASE_SCHEMA. SQLAlchemy adds it to the names of tables where it can. For the other
statements (`op.add_column`, `op.execute`) it is the only schema in the transaction's search_path.
"""

from alembic import context
from sqlalchemy import Connection, func, select

from config import load
from db import migration
from db.connection.engine import Database, schema_of
from db.models import Base
from db.schema import VERSION_TABLE

# Held until the end of the transaction: a second process waits for the first, then finds nothing to do.
MIGRATION_LOCK = 0x6D696772


def migrate(connection: Connection) -> None:
    """Run the migrations on `connection`, in one transaction behind a lock."""
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        version_table=VERSION_TABLE,
        version_table_schema=schema_of(connection),
    )
    with context.begin_transaction():
        connection.execute(select(func.pg_advisory_xact_lock(MIGRATION_LOCK)))
        if context.get_context().get_current_revision() is None:
            migration.prepare(connection)
        migration.enter(connection)
        context.run_migrations()


given: Connection | None = context.config.attributes.get("connection")
if given is not None:
    migrate(given)
else:
    Database(load("database_url"), unpooled=True).run(migrate)

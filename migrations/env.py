"""Runs the migrations, over the unpooled URL when Alembic's own command calls."""

from alembic import context
from sqlalchemy import Connection, text

from config import load
from db.connection.engine import Database
from db.models import Base

# Held for the whole upgrade: of two processes that upgrade at once, the second waits and finds nothing to do.
MIGRATION_LOCK = 0x6D696772


def migrate(connection: Connection) -> None:
    """Run the migrations on `connection`, in one transaction behind a lock."""
    context.configure(connection=connection, target_metadata=Base.metadata)
    with context.begin_transaction():
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
        context.run_migrations()


given: Connection | None = context.config.attributes.get("connection")
if given is not None:
    migrate(given)
else:
    Database(load("database_url"), unpooled=True).run(migrate)

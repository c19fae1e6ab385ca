"""The migrations, as a test runs them."""

import config
from db import migration
from db.connection.engine import Database


def migrate(settings: config.Settings, revision: str = "head") -> None:
    """Bring the database to a revision."""
    database = Database(settings)
    try:
        migration.upgrade(database, revision)
    finally:
        database.dispose()

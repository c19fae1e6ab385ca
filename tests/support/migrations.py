"""The migrations, as a test runs them."""

import config
from db import schema
from db.connection.engine import Database


def migrate(settings: config.Settings, revision: str = "head") -> None:
    """Bring the database to a revision."""
    database = Database(settings)
    try:
        schema.upgrade(database, revision)
    finally:
        database.dispose()

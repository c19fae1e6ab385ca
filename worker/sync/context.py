"""The two ends of every repair: Clerk's API and the tables."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from config import Settings
from db.connection.engine import Database
from db.merge.policy import Policy
from worker.clerk.api import ClerkApi
from worker.shutdown import StopSignal
from worker.sync.writer import ChangeWriter


class SyncContext(NamedTuple):
    """What a repair reads from and writes to, and the signal that ends it."""

    settings: Settings
    api: ClerkApi
    store: ChangeWriter
    stopping: StopSignal

    @property
    def database(self) -> Database:
        """The database behind the store."""
        return self.store.database


@contextmanager
def bridge(settings: Settings, database: Database, stopping: StopSignal) -> Iterator[SyncContext]:
    """Give a bridge between the API that the settings name and `database`. Raises SettingsError."""
    api = ClerkApi(settings, stopping=stopping)
    try:
        yield SyncContext(settings, api, ChangeWriter(database, Policy.of(settings), stopping), stopping)
    finally:
        api.close()

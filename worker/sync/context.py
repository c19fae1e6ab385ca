"""The context of every sync from Clerk's API: the API and the tables."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from config import Settings
from db import instances
from db.connection.engine import Database
from db.drift.users import IDS_AT_A_TIME
from db.merge.policy import Policy
from worker.clerk.api import ClerkApi
from worker.shutdown import StopSignal
from worker.sync.writer import ChangeWriter
from worker.threads import chunks

ALWAYS_ALLOWED = 10  # deletions of users, ends of memberships
RECENT_MS = 60_000  # Clerk may not return a more recent change everywhere yet
ROWS_AT_A_TIME = 500


class SyncContext(NamedTuple):
    """What a sync reads from and writes to."""

    settings: Settings
    api: ClerkApi
    store: ChangeWriter

    def own(self, clerk_ids: Iterable[str]) -> set[str]:
        """Return those of the users whose absence from Clerk proves that they were deleted there.

        Raises ClerkApiError, DatabaseError.
        """
        return {
            clerk_id
            for chunk in chunks(clerk_ids, IDS_AT_A_TIME)
            for clerk_id in instances.of_instance(self.database, chunk, self.api.instance_id)
        }

    def deletions_allowed(self, local: int) -> int:
        """Return how many of `local` rows may be deleted without --allow-deletes."""
        return max(ALWAYS_ALLOWED, int(local * self.settings.reconcile_max_delete / 100))

    @property
    def database(self) -> Database:
        """The database that the store writes to."""
        return self.store.database


@contextmanager
def sync_context(settings: Settings, database: Database, stopping: StopSignal) -> Iterator[SyncContext]:
    """Yield the context of a sync into `database`, which `stopping` interrupts. Raises SettingsError."""
    api = ClerkApi(settings, stopping=stopping)
    try:
        yield SyncContext(settings, api, ChangeWriter(database, Policy.of(settings), api))
    finally:
        api.close()

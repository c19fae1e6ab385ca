"""The context of every sync from Clerk's API: the API, and the tables that it writes."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import tenacity

from config import Settings
from db import instances
from db.apply.isolation import Isolation, Result, is_delay
from db.apply.tables import Tables
from db.connection.engine import Database
from db.connection.errors import DatabaseError, DatabaseUnavailable
from db.drift.users import IDS_AT_A_TIME
from db.merge.change import UserChange
from db.merge.incoming import ReceivedChange
from db.merge.policy import Policy
from worker.clerk.api import ClerkApi
from worker.shutdown import StopSignal
from worker.threads import chunks

ALWAYS_ALLOWED = 10  # deletions of users, ends of memberships
RECENT_MS = 60_000  # Clerk may not return a more recent change everywhere yet
ROWS_AT_A_TIME = 500
PATIENCE_S = 60.0
MAX_PAUSE_S = 5.0
SOURCE = "api"  # in place of an event's type


class RejectedUser(NamedTuple):
    """A user whom the database refused, and why."""

    clerk_id: str
    reason: str


class SyncContext:
    """What a sync reads from and writes to.

    A write waits up to `patience_s` for an unavailable database and for locked rows.
    """

    def __init__(
        self, settings: Settings, database: Database, api: ClerkApi, patience_s: float = PATIENCE_S
    ) -> None:
        self.settings = settings
        self.database = database
        self.api = api
        self.policy = Policy.of(settings)
        self._isolation = Isolation(Tables(database, self.policy))
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(DatabaseUnavailable)
            | tenacity.retry_if_result(_is_any_delayed),
            wait=tenacity.wait_random_exponential(multiplier=0.25, max=MAX_PAUSE_S),
            stop=lambda state: (state.seconds_since_start or 0.0) > patience_s,
            sleep=api.stopping.pause,
            retry_error_callback=lambda state: state.outcome and state.outcome.result(),
        )

    def write(self, changes: Sequence[UserChange], observed_at: int) -> list[RejectedUser]:
        """Apply changes observed at `observed_at` (ms); return the users whom the database refused.

        Raises DatabaseUnavailable, ClerkApiError, and Stopped rather than wait for longer.
        """
        if not changes:
            return []
        instance_id = self.api.instance_id
        incoming = [
            ReceivedChange(change, None, SOURCE, None, observed_at, instance_id) for change in changes
        ]
        results = self._retrying(self._apply, incoming)
        return [
            RejectedUser(change.subject, str(result))
            for change, result in zip(incoming, results, strict=True)
            if isinstance(result, DatabaseError)
        ]

    def _apply(self, batch: Sequence[ReceivedChange]) -> list[Result]:
        """Apply all changes; those that were applied before change nothing."""
        results = self._isolation.apply(batch)
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, DatabaseError):
                raise result
        refused = [result for result in results if isinstance(result, DatabaseUnavailable)]
        if len(refused) == len(results) and not all(map(is_delay, refused)):
            raise refused[0]
        return results

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


@contextmanager
def sync_context(settings: Settings, database: Database, stopping: StopSignal) -> Iterator[SyncContext]:
    """Yield the context of a sync into `database`, which `stopping` interrupts. Raises SettingsError."""
    api = ClerkApi(settings, stopping=stopping)
    try:
        yield SyncContext(settings, database, api)
    finally:
        api.close()


def _is_any_delayed(results: Sequence[Result]) -> bool:
    return any(map(is_delay, results))

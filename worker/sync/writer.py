"""Writes data from Clerk's API to the tables, with the same merge as deliveries."""

from collections.abc import Sequence
from typing import NamedTuple

import tenacity

from db.apply.isolation import Isolation, Result, is_delay
from db.apply.tables import Tables
from db.connection.engine import Database
from db.connection.errors import DatabaseError, DatabaseUnavailable
from db.merge.change import UserChange
from db.merge.incoming import ReceivedChange
from db.merge.policy import Policy
from worker.clerk.api import ClerkApi

PATIENCE_S = 60.0
MAX_PAUSE_S = 5.0
SOURCE = "api"  # in place of an event's type


class RejectedUser(NamedTuple):
    """A user whom the database refused, and why."""

    clerk_id: str
    reason: str


class ChangeWriter:
    """Applies data from Clerk's API, as that of the instance that the API's key belongs to.

    Waits up to `patience_s` for an unavailable database and for locked rows.
    """

    def __init__(
        self, database: Database, policy: Policy, api: ClerkApi, patience_s: float = PATIENCE_S
    ) -> None:
        self.database = database
        self.policy = policy
        self._api = api
        self._isolation = Isolation(Tables(database, policy))
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
        instance_id = self._api.instance_id
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


def _is_any_delayed(results: Sequence[Result]) -> bool:
    return any(map(is_delay, results))

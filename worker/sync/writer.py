"""What Clerk's API showed goes into the tables, by the one way that everything goes."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import tenacity

from db.apply import users
from db.connection.engine import Database
from db.connection.errors import ChangeRefused, DatabaseUnavailable
from db.merge.change import UserChange
from db.merge.incoming import ReceivedChange
from db.merge.policy import Policy
from worker.shutdown import StopSignal

PATIENCE_S = 60.0
MAX_PAUSE_S = 5.0
SOURCE = "api"  # what stands for the type of an event where no event was


class RejectedUser(NamedTuple):
    """A user whom the database does not take, and why not."""

    clerk_id: str
    reason: str


class ChangeWriter:
    """Applies what the API showed of the instance that `instance_id` returns.

    A database that does not answer is waited for, for up to `patience_s`.
    """

    def __init__(
        self,
        database: Database,
        policy: Policy,
        stopping: StopSignal,
        instance_id: Callable[[], str | None],
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.database = database
        self.policy = policy
        self._instance_id = instance_id
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(DatabaseUnavailable),
            wait=tenacity.wait_random_exponential(multiplier=0.25, max=MAX_PAUSE_S),
            stop=lambda state: stopping.requested or (state.seconds_since_start or 0.0) > patience_s,
            sleep=stopping.wait,
            reraise=True,
        )

    def write(self, changes: Sequence[UserChange], observed_at: int) -> list[RejectedUser]:
        """Apply changes seen at `observed_at` (ms); return those that the database does not take.

        Raises DatabaseUnavailable, ClerkApiError.
        """
        if not changes:
            return []
        instance_id = self._instance_id()
        return self._write(
            [ReceivedChange(change, None, SOURCE, None, observed_at, instance_id) for change in changes]
        )

    def _write(self, batch: Sequence[ReceivedChange]) -> list[RejectedUser]:
        try:
            self._retrying(partial(users.apply, self.database, batch, self.policy))
        except ChangeRefused as error:
            if len(batch) == 1:
                return [RejectedUser(batch[0].subject, str(error))]
            middle = len(batch) // 2
            return [*self._write(batch[:middle]), *self._write(batch[middle:])]
        return []

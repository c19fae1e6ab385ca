"""Applies a batch so that a problem of one change delays or fails that change alone.

1. Apply the batch together. Usually this succeeds.
2. If the server refuses the batch, run every write on no rows. If that fails too, the deployment is at fault.
   The same check finds the rows that other transactions have locked: their changes are left out.
3. If the server still refuses the batch, halve it, down to the change at fault. If each attempt takes long,
   one pass halves once or twice, and later passes continue.
"""

import time
from collections.abc import Sequence

from db.apply.tables import Tables
from db.connection.causes import Cause
from db.connection.errors import LOCK_NOT_AVAILABLE, ChangeRefused, DatabaseUnavailable, unavailable
from db.merge.incoming import Outcome, ReceivedChange

# After this time, changes that a lock or a slow statement delays are not divided further: other jobs wait.
DIVIDES_FOR_S = 15.0

Result = Outcome | Exception


class Isolation:
    """Applies batches to `tables`, each in as few transactions as its changes allow."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    def apply(self, batch: Sequence[ReceivedChange], *, have_waited: bool = False) -> list[Result]:
        """Return for each change, in order, its outcome or the error that concerns it alone.

        With `have_waited`, locked rows are looked for first, so that no statement waits for them. Raises
        DatabaseUnavailable when no change can be applied now.
        """
        if have_waited:
            return self._leave_out_locked(batch)
        try:
            return list(self._tables.apply(batch))
        except DatabaseUnavailable as error:
            if not error.may_concern_one_row:
                raise
            return self._leave_out_locked(batch, error)
        except Exception as error:
            return self._halve(batch, error)

    def _leave_out_locked(
        self, batch: Sequence[ReceivedChange], error: Exception | None = None
    ) -> list[Result]:
        try:
            locked = self._tables.locked(batch)
        except ChangeRefused:  # the attempts to apply them show which change is refused
            locked = frozenset()
        if error is not None and not locked:
            return self._halve(batch, error)
        row_is_locked = unavailable("the user's row is locked", Cause.LOCKED, LOCK_NOT_AVAILABLE)
        results = iter(self._divide([incoming for incoming in batch if incoming.subject not in locked]))
        return [row_is_locked if incoming.subject in locked else next(results) for incoming in batch]

    def _divide(
        self, batch: Sequence[ReceivedChange], deadline: float | None = None, *, waits_briefly: bool = False
    ) -> list[Result]:
        if not batch:
            return []
        try:
            return list(self._tables.apply(batch, waits_briefly=waits_briefly))
        except Exception as error:
            if isinstance(error, DatabaseUnavailable) and not error.may_concern_one_row:
                raise
            return self._halve(batch, error, deadline)

    def _halve(
        self, batch: Sequence[ReceivedChange], error: Exception, deadline: float | None = None
    ) -> list[Result]:
        deadline = deadline or time.monotonic() + DIVIDES_FOR_S
        if len(batch) == 1 or (is_delay(error) and time.monotonic() > deadline):
            return [error] * len(batch)
        # The batch has waited for the lock: its parts need not wait as long.
        waits_briefly = isinstance(error, DatabaseUnavailable) and error.state == LOCK_NOT_AVAILABLE
        middle = len(batch) // 2
        return [
            result
            for part in (batch[:middle], batch[middle:])
            for result in self._divide(part, deadline, waits_briefly=waits_briefly)
        ]


def is_delay(result: Result) -> bool:
    """Say whether the change is only delayed, by a lock or a slow statement."""
    return isinstance(result, DatabaseUnavailable) and result.is_delay


def blame(error: DatabaseUnavailable) -> ChangeRefused:
    """Return the error of a change that the server refuses while it accepts others."""
    return ChangeRefused(
        f"the server takes other changes, but not this one (SQLSTATE {error.state}: {error.cause.sentence});"
        " look at the triggers, rules and policies on the tables",
        retryable=True,
    )

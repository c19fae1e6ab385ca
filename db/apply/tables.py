"""Applies a batch to the tables, or finds what prevents that."""

import time
from collections.abc import Callable, Sequence

import psycopg

from db.apply import statements, users
from db.connection.engine import Database
from db.connection.pipeline import Pipeline
from db.merge.incoming import Outcome, ReceivedChange
from db.merge.policy import Policy

Observe = Callable[[Sequence[ReceivedChange], Sequence[Outcome], float], None]


class Tables:
    """The tables of `database`, written under `policy`.

    `observe` is called after every attempt to apply, with the batch, its outcomes (none if the attempt
    failed), and the seconds that it took.
    """

    def __init__(
        self, database: Database, policy: Policy, observe: Observe = lambda _batch, _outcomes, _s: None
    ) -> None:
        self._database = database
        self._policy = policy
        self._observe = observe

    def apply(self, batch: Sequence[ReceivedChange]) -> list[Outcome]:
        """Apply `batch` in one transaction; return what each change did. Raises as `users.apply`."""
        began = time.perf_counter()
        outcomes: list[Outcome] = []
        try:
            outcomes = users.apply(self._database, batch, self._policy)
        finally:
            self._observe(batch, outcomes, time.perf_counter() - began)
        return outcomes

    def locked(self, clerk_ids: Sequence[str]) -> frozenset[str]:
        """Return which of these users have a row that another transaction has locked.

        First, every write runs on no rows, which fails if a table or right is missing, the database is
        read-only, or a table is locked. One round trip; changes nothing. Raises DatabaseUnavailable when no
        change can be applied, ChangeRefused when a statement-level trigger refuses the writes: it fires
        without any row too.
        """

        def look(pipeline: Pipeline) -> frozenset[str]:
            for write in statements.writes(self._policy):
                pipeline.send_no_rows(write)
            rows = [pipeline.send(one, ids=ids) for one in statements.STORED_IDS]
            unlocked = [pipeline.send(one, ids=ids) for one in statements.UNLOCKED_IDS]
            pipeline.wait()
            pairs = zip(rows, unlocked, strict=True)
            return frozenset().union(*(_ids(stored) - _ids(free) for stored, free in pairs))

        ids = list(clerk_ids)
        return self._database.run_pipeline(look)


def _ids(answer: psycopg.Cursor[tuple[str]]) -> frozenset[str]:
    return frozenset(clerk_id for (clerk_id,) in answer.fetchall())

"""Applies a batch to the tables, or finds what prevents that."""

import time
from collections.abc import Callable, Sequence

import psycopg
from sqlalchemy import text

from db.apply import statements, users
from db.connection.engine import Database
from db.connection.pipeline import Pipeline
from db.merge.change import Organization, placeholder_address
from db.merge.incoming import Outcome, ReceivedChange
from db.merge.policy import Policy
from db.times import LATEST, to_ms

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

    def apply(self, batch: Sequence[ReceivedChange], *, waits_briefly: bool = False) -> list[Outcome]:
        """Apply `batch` in one transaction; return what each change did. Raises as `users.apply`."""
        began = time.perf_counter()
        outcomes: list[Outcome] = []
        try:
            outcomes = users.apply(self._database, batch, self._policy, waits_briefly=waits_briefly)
        finally:
            self._observe(batch, outcomes, time.perf_counter() - began)
        return outcomes

    def locked(self, batch: Sequence[ReceivedChange]) -> frozenset[str]:
        """Return the users whose rows another transaction has locked against the changes of `batch`.

        A foreign key to a user locks the row only against a deletion and a new address. First, every write
        and check runs on no rows, which fails if a table or right is missing, the database is read-only, or a
        table is locked. One round trip; changes nothing. Raises DatabaseUnavailable when no change can be
        applied, ChangeRefused when a statement-level trigger refuses the writes: it also fires without a row.
        """

        def look(pipeline: Pipeline) -> frozenset[str]:
            pipeline.send(text("SAVEPOINT no_rows"))
            for write in statements.writes(self._policy):
                pipeline.send_no_rows(write)
            pipeline.send(text("ROLLBACK TO SAVEPOINT no_rows"))  # what triggers per statement have written
            rows = [pipeline.send(query, ids=ids, **moves) for query in statements.STORED_IDS]
            unlocked = [pipeline.send(query, ids=ids, **moves) for query in statements.UNLOCKED_IDS]
            pipeline.wait()
            pairs = zip(rows, unlocked, strict=True)
            return frozenset().union(*(_ids(stored) - _ids(free) for stored, free in pairs))

        ids = sorted({change.subject for change in batch})
        moves = _moves(batch, self._policy)
        return self._database.run_pipeline(look)


def _moves(batch: Sequence[ReceivedChange], policy: Policy) -> dict[str, list[object]]:
    """Return the parameters of `statements._moving`: who may get another address, or lose the row.

    They are Clerk ids, addresses ("" for a row that goes) and versions of the claims.
    """
    found: list[tuple[object, ...]] = []
    for incoming in batch:
        change = incoming.of_instance(policy.instance_id).change
        if isinstance(change, Organization):
            continue
        clerk_id, email = change.clerk_id, change.email
        placeholder = placeholder_address(clerk_id)
        if change.deleted_at is not None:
            found.append((clerk_id, placeholder if policy.anonymize else "", to_ms(LATEST)))
        elif email is not None:
            found.append((clerk_id, email.address or placeholder, email.version.updated_at))
    return {f"c{i}": [row[i] for row in found] for i in range(3)}


def _ids(answer: psycopg.Cursor[tuple[str]]) -> frozenset[str]:
    return frozenset(clerk_id for (clerk_id,) in answer.fetchall())

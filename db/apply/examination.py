"""Looks at what keeps a batch from being applied: the deployment, or locks on some rows."""

from collections.abc import Sequence

import psycopg

from db.apply import statements
from db.connection.engine import Database
from db.connection.pipeline import Pipeline
from db.merge.policy import Policy


def examine(database: Database, policy: Policy, clerk_ids: Sequence[str]) -> frozenset[str]:
    """Return which of these users have a row that another transaction has locked.

    Before, every write runs on no rows: a missing table or right, a read-only database or a locked table
    fails it. One round trip; changes nothing. Raises DatabaseUnavailable when no change can be applied.
    """

    def look(pipeline: Pipeline) -> frozenset[str]:
        for write in statements.writes(policy):
            pipeline.send_no_rows(write)
        rows = [pipeline.send(one, ids=ids) for one in statements.stored_ids()]
        unlocked = [pipeline.send(one, ids=ids) for one in statements.unlocked_ids()]
        pipeline.wait()
        pairs = zip(rows, unlocked, strict=True)
        return frozenset().union(*(_ids(stored) - _ids(free) for stored, free in pairs))

    ids = list(clerk_ids)
    return database.run_pipeline(look)


def _ids(answer: psycopg.Cursor[tuple[str]]) -> frozenset[str]:
    return frozenset(clerk_id for (clerk_id,) in answer.fetchall())

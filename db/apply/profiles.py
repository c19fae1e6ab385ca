"""PROFILE_FIELDS: the rows of `user_profiles`, a part of the one transaction of `db.apply.users`."""

from collections.abc import Mapping
from typing import Any

import orjson

from db.apply import statements
from db.connection.pipeline import Pipeline
from db.merge.change import UserChange
from db.merge.fields import canonical
from db.merge.rows import ProfileRow, profile_row


def stored_profile(clerk_id: str, text: str, updated_at: Any) -> ProfileRow:
    """Return a row, its profile in canonical form."""
    return ProfileRow(clerk_id, canonical(orjson.loads(text)), updated_at)


def write(pipeline: Pipeline, known: Mapping[str, UserChange], stored: Mapping[str, ProfileRow]) -> None:
    """Send the rows that differ from the stored ones; delete those of users who must have none."""
    wanted = {clerk_id: row for clerk_id, change in known.items() if (row := profile_row(change))}
    changed = [row for row in wanted.values() if row != stored.get(row.clerk_id)]
    gone = sorted(stored.keys() - wanted.keys())
    pipeline.send_rows(statements.WRITE_PROFILES, changed)
    pipeline.send_ids(statements.DELETE_PROFILES, gone)
    if changed or gone:
        pipeline.send(statements.REQUIRE_PROFILES, ids=[row.clerk_id for row in changed], gone=gone)

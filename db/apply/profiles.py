"""PROFILE_FIELDS: the rows of `user_profiles`, a part of the one transaction of `db.apply.users`."""

from collections.abc import Mapping, Sequence
from typing import Any

import psycopg

from db.apply import statements
from db.connection.pipeline import Pipeline
from db.merge.change import UserChange
from db.merge.fields import stored_fields
from db.merge.rows import ProfileRow, profile_row


def ask(pipeline: Pipeline, clerk_ids: Sequence[str]) -> psycopg.Cursor[Any]:
    """Ask for the rows of those users."""
    return pipeline.send(statements.READ_PROFILES, ids=clerk_ids)


def read(asked: psycopg.Cursor[Any]) -> dict[str, ProfileRow]:
    """Return what the database answered."""
    return {row[0]: stored_profile(*row) for row in asked.fetchall()}


def stored_profile(clerk_id: str, text: str, updated_at: Any) -> ProfileRow:
    """Return a row, its profile in canonical form."""
    return ProfileRow(clerk_id, stored_fields(text), updated_at)


def write(pipeline: Pipeline, known: Mapping[str, UserChange], stored: Mapping[str, ProfileRow]) -> None:
    """Send the rows that differ from what is stored; delete those of users who are to have none."""
    wanted = {clerk_id: row for clerk_id, change in known.items() if (row := profile_row(change))}
    changed = [row for row in wanted.values() if row != stored.get(row.clerk_id)]
    statements.send_rows(pipeline, statements.WRITE_PROFILES, changed)
    forget(pipeline, sorted(stored.keys() - wanted.keys()))


def forget(pipeline: Pipeline, clerk_ids: Sequence[str]) -> None:
    """Delete the rows of those users."""
    statements.send_ids(pipeline, statements.DELETE_PROFILES, clerk_ids)

"""The ledger of deliveries: what came, when, and what became of it. No payload, no personal data."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from enum import StrEnum
from typing import NamedTuple

from sqlalchemy import RowMapping, Select, delete, desc, func, select

from db import sql
from db.change import UserChange
from db.engine import Database, Pipeline, columns
from db.models import WebhookEvent
from db.times import to_datetime


class Outcome(StrEnum):
    """What applying a change did."""

    APPLIED = "applied"  # it told something new
    STALE = "stale"  # it was known, or something newer was
    IGNORED = "ignored"  # it says nothing of the user, like a sign-in by staff


class Incoming(NamedTuple):
    """A change, and the delivery that brought it; `svix_id` is None when no delivery did. Times in ms."""

    change: UserChange
    svix_id: str | None
    type: str
    event_at: int | None
    received_at: int


class LedgerRow(NamedTuple):
    """One delivery that was applied."""

    svix_id: str
    type: str
    clerk_id: str
    event_at: datetime | None
    received_at: datetime
    applied_at: datetime
    outcome: str


def record(pipeline: Pipeline, batch: Sequence[Incoming], outcomes: Sequence[Outcome]) -> None:
    """Send one row for each delivery; a svix-id that is there keeps its row."""
    rows = [
        (
            incoming.svix_id,
            incoming.type,
            incoming.change.clerk_id,
            None if incoming.event_at is None else to_datetime(incoming.event_at),
            to_datetime(incoming.received_at),
            outcome.value,
        )
        for incoming, outcome in zip(batch, outcomes, strict=True)
        if incoming.svix_id is not None
    ]
    if rows:
        sql.send_rows(pipeline, sql.record_events(), columns(rows, 6))


def recent(
    database: Database, *, clerk_id: str | None = None, type_: str | None = None, limit: int = 50
) -> list[LedgerRow]:
    """Return the newest `limit` rows, newest first, of one user or type where named."""
    query: Select[tuple[object, ...]] = (
        select(*WebhookEvent.__table__.columns)
        .order_by(desc(WebhookEvent.applied_at), desc(WebhookEvent.svix_id))
        .limit(limit)
    )
    if clerk_id is not None:
        query = query.where(WebhookEvent.clerk_id == clerk_id)
    if type_ is not None:
        query = query.where(WebhookEvent.type == type_)
    return database.run(lambda connection: [_ledger_row(row._mapping) for row in connection.execute(query)])


def last_applied_at(database: Database) -> datetime | None:
    """Return when the newest delivery was applied; None when there is none."""
    query = select(func.max(WebhookEvent.applied_at))
    return database.run(lambda connection: connection.scalar(query))


def prune(database: Database, older_than: timedelta) -> int:
    """Delete the rows applied longer ago than `older_than`, and return how many they were."""
    statement = delete(WebhookEvent).where(WebhookEvent.applied_at < func.now() - older_than)
    return database.run(lambda connection: connection.execute(statement).rowcount)


def _ledger_row(row: RowMapping) -> LedgerRow:
    return LedgerRow(**{field: row[field] for field in LedgerRow._fields})

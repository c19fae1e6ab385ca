"""The ledger of applied deliveries, with times and outcomes. It has no payload and no personal data."""

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import ColumnElement, Float, Select, any_, cast, delete, desc, exists, func, select, tuple_

from db.connection.engine import Database
from db.models import WebhookEvent

PRUNED_AT_ONCE = 5_000
RECENT = 50  # a replayed delivery was received long before others that were applied earlier


class LedgerRow(NamedTuple):
    """One delivery that was applied."""

    svix_id: str
    type: str
    clerk_id: str
    event_at: datetime | None
    received_at: datetime
    applied_at: datetime
    outcome: str


class LedgerFilter(NamedTuple):
    """Selects rows of this user, type and outcome, applied from `since` on and before `until`."""

    clerk_id: str | None = None
    type: str | None = None
    outcome: str | None = None
    since: datetime | None = None
    until: datetime | None = None


MATCH_ALL = LedgerFilter()


class Minute(NamedTuple):
    """The deliveries applied in one minute, and the 95th percentile of their lag from receipt, in s."""

    start: datetime
    events: int
    lag_s: float


class Activity(NamedTuple):
    """What was applied since a given time: by minute (empty minutes are left out), and in all.

    The lags (median and 95th percentile, in s from receipt) are None if nothing was applied.
    """

    minutes: list[Minute]
    events: int
    median_lag_s: float | None
    lag_s: float | None


def recent(
    database: Database, wanted: LedgerFilter = MATCH_ALL, *, limit: int | None = 50
) -> list[LedgerRow]:
    """Return the newest `limit` rows that match, newest first."""
    query: Select[tuple[object, ...]] = (
        select(*(WebhookEvent.__table__.c[name] for name in LedgerRow._fields))
        .where(*_conditions(wanted))
        .order_by(desc(WebhookEvent.applied_at), desc(WebhookEvent.svix_id))
        .limit(limit)
    )
    return database.run(lambda connection: [LedgerRow._make(row) for row in connection.execute(query)])


def activity(database: Database, since: datetime) -> Activity:
    """Return the number of deliveries applied since then, and their lags."""
    minute = func.date_trunc("minute", WebhookEvent.applied_at)
    lag = cast(func.extract("epoch", WebhookEvent.applied_at - WebhookEvent.received_at), Float)
    query = (
        select(
            minute,
            func.count(),
            func.percentile_cont(0.5).within_group(lag),
            func.percentile_cont(0.95).within_group(lag),
        )
        .where(WebhookEvent.applied_at >= since)
        .group_by(func.grouping_sets(tuple_(minute), tuple_()))
        .order_by(minute)
    )
    rows = database.run(lambda connection: connection.execute(query).all())
    minutes = [Minute(start, events, lag_s) for start, events, _, lag_s in rows if start is not None]
    _, events, median, most = next(row for row in rows if row[0] is None)
    return Activity(minutes, events, median, most)


def _conditions(wanted: LedgerFilter) -> Iterator[ColumnElement[bool]]:
    if wanted.clerk_id is not None:
        yield WebhookEvent.clerk_id == wanted.clerk_id
    if wanted.type is not None:
        yield WebhookEvent.type == wanted.type
    if wanted.outcome is not None:
        yield WebhookEvent.outcome == wanted.outcome
    if wanted.since is not None:
        yield WebhookEvent.applied_at >= wanted.since
    if wanted.until is not None:
        yield WebhookEvent.applied_at < wanted.until


def last_applied_at(database: Database) -> datetime | None:
    """Return when the newest delivery was applied; None if there is none."""
    query = select(func.max(WebhookEvent.applied_at))
    return database.run(lambda connection: connection.scalar(query))


def newest(database: Database, within: timedelta) -> str | None:
    """Return the svix-id of the newest delivery, if it was applied within that time."""
    is_recent = WebhookEvent.applied_at > func.now() - within
    query = select(WebhookEvent.svix_id).where(is_recent).order_by(desc(WebhookEvent.applied_at)).limit(1)
    return database.run(lambda connection: connection.scalar(query))


def ends(database: Database) -> tuple[datetime | None, datetime | None, datetime | None]:
    """Return when the last row was applied, the latest receipt of RECENT newest rows, and the oldest receipt.

    All are None in an empty ledger.
    """
    rows = (
        select(WebhookEvent.applied_at, WebhookEvent.received_at)
        .order_by(desc(WebhookEvent.applied_at))
        .limit(RECENT)
        .subquery()
    )
    oldest = select(WebhookEvent.received_at).order_by(WebhookEvent.applied_at).limit(1).scalar_subquery()
    query = select(func.max(rows.c.applied_at), func.max(rows.c.received_at), oldest)
    applied_at, received_at, began_at = database.run(lambda connection: connection.execute(query).one())
    return applied_at, received_at, began_at


def has(database: Database, svix_id: str) -> bool:
    """Say whether the ledger has a row for the delivery."""
    query = select(exists().where(WebhookEvent.svix_id == svix_id))
    return bool(database.run(lambda connection: connection.scalar(query)))


def prune(database: Database, older_than: timedelta) -> int:
    """Delete the rows applied longer ago than `older_than`, and return their number.

    Rows are deleted in portions, each in its own transaction. Rows locked by another deletion are skipped.
    """
    old = (
        select(WebhookEvent.svix_id)
        .where(WebhookEvent.applied_at < func.now() - older_than)
        .limit(PRUNED_AT_ONCE)
        .with_for_update(skip_locked=True)
    )
    statement = delete(WebhookEvent).where(WebhookEvent.svix_id == any_(func.array(old.scalar_subquery())))
    total = 0
    while count := database.run(lambda connection: connection.execute(statement).rowcount):
        total += count
    return total

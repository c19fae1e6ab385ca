"""Clerk and the tables, side by side: a SyncContext over a fake of the one, and what is in both."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr

import config
from db.apply.users import apply
from db.connection.engine import Database
from db.merge.incoming import ReceivedChange
from db.merge.policy import Policy
from tests.support.database_trial import READ_USERS
from tests.support.fake_clerk import FakeClerk
from tests.support.payloads import Json, body
from tests.support.reference_model import Row
from tests.support.settings import MakeSettings
from worker.clerk.api import ClerkApi
from worker.clerk.payloads import FieldSources
from worker.runner.batch import incoming
from worker.shutdown import StopSignal
from worker.sync.backfill import Backfill, BackfillStats
from worker.sync.context import SyncContext, sync_context
from worker.sync.reconcile import Reconcile, Report


def api_settings(make_settings: MakeSettings, clerk: FakeClerk, **overrides: Any) -> config.Settings:
    """Return settings that lead to the fake; keywords replace or add fields."""
    return make_settings(**{"clerk_secret_key": clerk.key, "clerk_api_url": clerk.url, **overrides})


def api_alone(clerk: FakeClerk, **overrides: Any) -> config.Settings:
    """Return settings that lead to the fake, and nowhere else."""
    fields = {"clerk_secret_key": clerk.key, "clerk_api_url": clerk.url, **overrides}
    return config.load(_env_file=None, **fields)


@contextmanager
def open_context(settings: config.Settings, stopping: StopSignal | None = None) -> Iterator[SyncContext]:
    """Give the API and the database that the settings name."""
    database = Database(settings)
    try:
        with sync_context(settings, database, stopping or StopSignal()) as context:
            yield context
    finally:
        database.dispose()


@contextmanager
def client(settings: config.Settings, **options: Any) -> Iterator[ClerkApi]:
    api = ClerkApi(settings, **options)
    try:
        yield api
    finally:
        api.close()


def backfill_until(settings: config.Settings, pages: int) -> None:
    """Run a backfill and request a stop after so many pages. Raises Stopped unless it ends before."""
    stopping = StopSignal()
    seen: list[BackfillStats] = []

    def look(done: BackfillStats) -> None:
        seen.append(done)
        if len(seen) == pages:
            stopping.request()

    with open_context(settings, stopping) as context:
        Backfill(context, look).everything()


def report(context: SyncContext, allow_deletes: int | None = None) -> Report:
    """Return what differs between the tables and Clerk now."""
    return Reconcile(context, settle_s=0, allow_deletes=allow_deletes).report()


def fix(context: SyncContext, allow_deletes: int | None = None) -> list[str]:
    """Fix what is found, and check that nothing more is found then."""
    task = Reconcile(context, settle_s=0, allow_deletes=allow_deletes)
    found = task.report()
    assert found.refusal is None
    left = task.fix(found)
    assert left or not report(context).differing
    return left


def filled(clerk: FakeClerk, context: SyncContext, users: int, members: int = 0) -> None:
    """Let Clerk and the tables have the same made-up users and memberships."""
    clerk.put_many(users)
    clerk.put_many_members(members)
    Backfill(context).everything()
    clerk.requests.clear()


def assert_refused(context: SyncContext, reason: str, allow_deletes: int | None = None) -> None:
    """Check that a report is refused for that reason, and that nothing is fixed from it."""
    before = _contents(context.settings)
    task = Reconcile(context, settle_s=0, allow_deletes=allow_deletes)
    found = task.report()
    assert reason in str(found.refusal)
    for change in (task.fix, task.refresh):
        with pytest.raises(ValueError, match=r"."):
            change(found)
    assert _contents(context.settings) == before


def _contents(settings: config.Settings) -> tuple[object, ...]:
    stays = query(settings, "SELECT id, ended_at FROM membership_sync ORDER BY 1")
    return rows(settings), tombstones(settings), stays


def deliver(context: SyncContext, *events: Json) -> None:
    """Apply events as a worker does."""
    keys = FieldSources.of(context.settings)
    changes: list[ReceivedChange] = [
        incoming(f"msg_{i}_{event['timestamp']}", body(event).decode(), event["timestamp"], keys)
        for i, event in enumerate(events)
    ]
    apply(context.database, changes, Policy.of(context.settings))


def rows(settings: config.Settings) -> dict[str, Row]:
    return {row[0]: Row(*row) for row in query(settings, READ_USERS)}


def count(settings: config.Settings) -> int:
    return int(query(settings, "SELECT count(*) FROM users")[0][0])


def tombstones(settings: config.Settings) -> set[str]:
    """Return the ids of all who were deleted."""
    return {row[0] for row in query(settings, "SELECT clerk_id FROM user_sync WHERE deleted_at IS NOT NULL")}


def query(settings: config.Settings, statement: str) -> list[tuple[Any, ...]]:
    return _run(settings, statement)


def execute(settings: config.Settings, statement: str) -> None:
    """Run a statement, as an operator who changes the tables would."""
    _run(settings, statement)


def _run(settings: config.Settings, statement: str) -> list[tuple[Any, ...]]:
    url = settings.database_url
    assert isinstance(url, SecretStr)
    with psycopg.connect(url.get_secret_value(), autocommit=True, prepare_threshold=None) as connection:
        ran = connection.execute(statement.encode())
        return ran.fetchall() if ran.description else []

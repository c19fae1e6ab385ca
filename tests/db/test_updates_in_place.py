"""Most updates of rows are heap-only: they write no index entry."""

from typing import Any

import psycopg

import config
from db.apply import users
from db.connection.engine import Database
from db.merge.policy import Policy
from tests.support.payloads import NOW, body, user, user_event
from tests.support.settings import MakeSettings
from tests.support.waiting import wait_until
from worker.clerk.payloads import FieldSources
from worker.runner.batch import incoming

USERS, BATCH, ROUNDS = 400, 50, 5
HOT = "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = %s"


def save_all(database: Database, settings: config.Settings, round_: int) -> None:
    """Apply a newer profile of every user, a batch at a time."""
    for first in range(0, USERS, BATCH):
        batch = []
        for i in range(first, first + BATCH):
            data = user(
                f"user_{i}", f"u{i}@example.com", updated_at=NOW + round_, first_name=f"name {round_}"
            )
            event = user_event(data=data, timestamp=NOW + round_)
            content = body(event).decode()
            batch.append(incoming(f"msg_{round_}_{i}", content, NOW, FieldSources.of(settings)))
        users.apply(database, batch, Policy.of(settings))


def test_an_update_of_a_profile_moves_no_index_entry(
    make_settings: MakeSettings, connection: psycopg.Connection[Any]
) -> None:
    settings = make_settings()
    with Database(settings) as database:
        save_all(database, settings, 0)
        before = {table: updates(connection, table) for table in ("users", "user_sync")}
        for round_ in range(1, ROUNDS + 1):
            save_all(database, settings, round_)
    for table, (every_before, hot_before) in before.items():  # a backend that has ended reports its counts
        done = every_before + USERS * ROUNDS
        wait_until(lambda: updates(connection, table)[0] >= done, 20)  # noqa: B023 - it is called at once
        every, hot = updates(connection, table)
        assert hot - hot_before >= 0.6 * (every - every_before), "all, as soon as each page has its room"


def updates(connection: psycopg.Connection[Any], table: str) -> tuple[int, int]:
    row = connection.execute(HOT, [table]).fetchone()
    assert row
    return row[0], row[1]

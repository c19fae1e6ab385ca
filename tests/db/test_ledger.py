import time
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from db import ledger
from db.connection.engine import Database

NOW = datetime.now(UTC).replace(second=30, microsecond=0)
ROW = """
    INSERT INTO webhook_events (svix_id, type, clerk_id, received_at, applied_at, outcome)
    VALUES (%s, 'user.updated', 'user_1', %s, %s, 'applied')
"""

MANY_OLD_ROWS = """
    INSERT INTO webhook_events (svix_id, type, clerk_id, received_at, applied_at, outcome)
    SELECT 'msg_' || i, 'user.updated', 'user_1', long_ago, long_ago, 'applied'
    FROM generate_series(1, %(count)s) AS i, (SELECT now() - interval '40 days' AS long_ago) AS moment
"""


def record(connection: psycopg.Connection, id_: str, *, at: datetime = NOW, lag_s: float = 1) -> None:
    connection.execute(ROW, (id_, at - timedelta(seconds=lag_s), at))


def ids(database: Database, wanted: ledger.LedgerFilter = ledger.MATCH_ALL) -> list[str]:
    return [row.svix_id for row in ledger.recent(database, wanted)]


def test_since_is_included_and_until_is_not(connection: psycopg.Connection, database: Database) -> None:
    record(connection, "a", at=NOW - timedelta(hours=1))
    record(connection, "b")
    assert ids(database, ledger.LedgerFilter(since=NOW - timedelta(hours=1))) == ["b", "a"]
    assert ids(database, ledger.LedgerFilter(until=NOW)) == ["a"]


def test_activity_has_number_and_lag_by_minute(connection: psycopg.Connection, database: Database) -> None:
    for i in range(100):
        record(connection, f"now-{i}", lag_s=i / 10)
    record(connection, "before", at=NOW - timedelta(minutes=7), lag_s=3)
    record(connection, "long ago", at=NOW - timedelta(hours=2))
    activity = ledger.activity(database, NOW - timedelta(hours=1))
    start = NOW.replace(second=0)
    assert [(minute.start, minute.events) for minute in activity.minutes] == [
        (start - timedelta(minutes=7), 1),
        (start, 100),
    ]
    assert activity.events == 101
    assert activity.minutes[1].lag_s == pytest.approx(9.405)
    assert activity.median_lag_s == pytest.approx(4.9)
    assert activity.lag_s == pytest.approx(9.4)


def test_activity_of_nothing_is_nothing(database: Database) -> None:
    assert ledger.activity(database, NOW) == ledger.Activity([], 0, None, None)


def test_only_what_is_old_is_pruned(connection: psycopg.Connection, database: Database) -> None:
    connection.execute(MANY_OLD_ROWS, {"count": 2 * ledger.PRUNED_AT_ONCE + 1})
    record(connection, "yesterday", at=datetime.now(UTC) - timedelta(days=1))
    assert ledger.prune(database, timedelta(days=30)) == 2 * ledger.PRUNED_AT_ONCE + 1
    assert ids(database) == ["yesterday"]
    assert ledger.prune(database, timedelta(days=30)) == 0


def test_two_that_prune_at_once_do_not_wait_for_each_other(
    connection: psycopg.Connection, database: Database, database_url_unpooled: str
) -> None:
    record(connection, "a", at=NOW - timedelta(days=90))
    record(connection, "b", at=NOW - timedelta(days=90))
    with psycopg.connect(database_url_unpooled) as other:
        other.execute("DELETE FROM webhook_events WHERE svix_id = 'a'")
        began = time.monotonic()
        assert ledger.prune(database, timedelta(days=30)) == 1
        assert time.monotonic() - began < 10
    assert ids(database) == []

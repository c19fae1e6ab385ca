import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest

import config
from cli import events
from db import ledger
from db.connection.engine import Database
from db.ledger import LedgerRow
from tests.support.commands import RunCommand, runner
from tests.support.payloads import ANN, svix_id
from tests.support.processes import clerk_sync
from tests.support.service_process import ServiceProcess
from tests.support.settings import MakeSettings
from tests.support.stack import environment
from tests.support.terminal import on_a_terminal
from tests.support.waiting import wait_until

PATIENCE_S = 20


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, database_url: str) -> RunCommand:
    """Run `clerk-sync events` and return its exit status, its output and its errors."""
    monkeypatch.setenv("DATABASE_URL", database_url)
    return runner("events")


def record(
    connection: psycopg.Connection,
    id_: str,
    *,
    minutes_ago: float = 0,
    type_: str = "user.updated",
    clerk_id: str = "user_1",
    outcome: str = "applied",
) -> None:
    connection.execute(
        """
        INSERT INTO webhook_events (svix_id, type, clerk_id, received_at, applied_at, outcome)
        VALUES (%s, %s, %s, now(), now() - %s * interval '1 minute', %s)
        """,
        (id_, type_, clerk_id, minutes_ago, outcome),
    )


def listed(run: RunCommand, *arguments: str) -> list[str]:
    status, out, _ = run("--json", *arguments)
    assert status == 0
    return [row["svix_id"] for row in json.loads(out)]


def test_the_ledger_is_filtered_by_each_option(run: RunCommand, connection: psycopg.Connection) -> None:
    record(connection, "old", minutes_ago=180)
    record(connection, "session", minutes_ago=60, type_="session.created")
    record(connection, "other", clerk_id="user_2", outcome="stale")
    assert listed(run) == ["other", "session", "old"]
    assert listed(run, "--user", "user_1") == ["session", "old"]
    assert listed(run, "--type", "session.created") == ["session"]
    assert listed(run, "--outcome", "stale") == ["other"]
    assert listed(run, "--since", "2h") == ["other", "session"]
    assert listed(run, "--until", "2h") == ["old"]
    assert listed(run, "--since", "4h", "--until", "30m") == ["session", "old"]
    assert listed(run, "--limit", "1") == ["other"]


def test_the_listing_shows_the_same(run: RunCommand, connection: psycopg.Connection) -> None:
    record(connection, "msg_1", outcome="stale")
    status, out, _ = run()
    assert status == 0
    assert all(text in out for text in ("msg_1", "user_1", "user.updated", "stale"))
    assert run("--outcome", "ignored") == (0, "no deliveries applied\n", "")


def test_the_longest_delivery_takes_80_columns(run: RunCommand, connection: psycopg.Connection) -> None:
    record(connection, svix_id(), clerk_id=ANN, type_="organizationMembership.created", minutes_ago=119)
    assert max(len(line) for line in run()[1].splitlines()) <= 80


def test_a_narrow_terminal_does_not_break_the_ids(
    make_settings: MakeSettings, connection: psycopg.Connection
) -> None:
    id_ = svix_id()
    record(connection, id_, clerk_id=ANN)
    with on_a_terminal(make_settings(), "events", columns=80) as terminal:
        assert terminal.wait() == 0
    first, second = terminal.shown.splitlines()
    assert "applied  user.updated, " in first
    assert second == f"  {ANN}  {id_}"


@pytest.mark.parametrize(
    "arguments",
    [("--outcome", "lost"), ("--since", "soon"), ("--follow", "--until", "1h"), ("--limit", "0")],
    ids=" ".join,
)
def test_wrong_usage_has_exit_status_2(run: RunCommand, arguments: tuple[str, ...]) -> None:
    assert run(*arguments)[0] == 2


class Follower(ServiceProcess):
    """A `clerk-sync events --follow` that runs."""

    def __init__(self, settings: config.Settings, directory: Path, *arguments: str) -> None:
        command = clerk_sync("events", "--follow", *arguments)
        super().__init__("events", command, environment(settings), directory)
        self._read = 0

    def line(self) -> str:
        """Return the next line, once it is there."""
        wait_until(lambda: not self.is_quiet(0), PATIENCE_S, self.text)
        self._read += 1
        return self.text().splitlines()[self._read - 1]

    def is_quiet(self, seconds: float) -> bool:
        """Say whether no line comes for so long."""
        time.sleep(seconds)
        return self.text().count("\n") == self._read


@pytest.fixture
def follow(make_settings: MakeSettings, tmp_path: Path) -> Iterator[Callable[..., Follower]]:
    """Start one; after the test Ctrl-C ends it, without another word."""
    with ExitStack() as stack:

        def start(*arguments: str) -> Follower:
            follower = stack.enter_context(Follower(make_settings(), tmp_path, *arguments))
            stack.callback(lambda: check_end(follower))
            return follower

        yield start


def check_end(follower: Follower) -> None:
    assert follower.stop(signal.SIGINT, PATIENCE_S) == 0
    assert follower.is_quiet(0), follower.text()


def test_follow_shows_what_is_there_and_then_each_row_that_comes_once(
    follow: Callable[..., Follower], connection: psycopg.Connection
) -> None:
    for i in range(5):
        record(connection, f"msg_{i}", minutes_ago=(5 - i) / 100)
    follower = follow("--limit", "3")
    shown = [(follower.line(), follower.line()) for _ in range(3)]
    assert [ids.split()[-1] for _, ids in shown] == ["msg_2", "msg_3", "msg_4"]
    assert all(" UTC  applied  user.updated" in head for head, _ in shown)
    for i in (5, 6):
        record(connection, f"msg_{i}")
        assert " UTC  " in follower.line()
        assert follower.line().split()[-1] == f"msg_{i}"
    assert follower.is_quiet(2.5)


def test_follow_does_not_miss_a_row_whose_transaction_took_long(
    follow: Callable[..., Follower], connection: psycopg.Connection, database_url_unpooled: str
) -> None:
    with psycopg.connect(database_url_unpooled) as slow:
        follower = follow("--json", "--outcome", "applied")
        record(slow, "slow")  # its time is now, and it is not visible before it is committed
        time.sleep(1.5)
        record(connection, "fast")
        assert json.loads(follower.line())["svix_id"] == "fast"
        slow.commit()
        row = json.loads(follower.line())
        assert row["svix_id"] == "slow"
        assert set(row) == set(LedgerRow._fields)
        record(connection, "stale", outcome="stale")
        assert follower.is_quiet(2.5)


def test_follow_reads_again_what_is_not_new_only_now_and_then(
    make_settings: MakeSettings, connection: psycopg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that comes late, as its transaction took half a minute, is shown all the same."""
    monkeypatch.setattr(events, "LOOK_EVERY_S", 0.01)
    read: list[int] = []
    recent = ledger.recent

    def counted(*arguments: Any, **options: Any) -> list[LedgerRow]:
        rows = recent(*arguments, **options)
        read.append(len(rows))
        return rows

    for i in range(100):
        record(connection, f"old_{i}", minutes_ago=0.5)
    record(connection, "new")
    monkeypatch.setattr(ledger, "recent", counted)
    database = Database(make_settings())
    rows = events.following(database, ledger.MATCH_ALL, 1)
    try:
        assert next(rows).svix_id == "new"
        read.clear()
        record(connection, "late", minutes_ago=0.4)
        assert next(rows).svix_id == "late"
        assert read == [1] * (events.FAR_EVERY - 1) + [102]
    finally:
        database.dispose()

"""`user`: everything about one user on one screen."""

import json
import os
import time
from typing import Any

import psycopg
import pytest
from redis import Redis

from tests.support.commands import RunCommand, run_with
from tests.support.failed_jobs import fail
from tests.support.fake_clerk import FakeClerk
from tests.support.payloads import user, user_event
from tests.support.queue import delivery, put
from tests.support.settings import MakeSettings
from tests.support.stack import environment
from tests.support.terminal import on_a_terminal
from worker.queue.consumer import ReservedJobs

ADDRESS = "ann@example.com"


@pytest.fixture
def connection(connection: psycopg.Connection[Any]) -> psycopg.Connection[Any]:
    """The test's connection, and what is stored about three users."""
    connection.execute("INSERT INTO users (clerk_id, email, name) VALUES ('user_one', %s, 'Ann')", [ADDRESS])
    connection.execute(
        "INSERT INTO user_sync (clerk_id, claimed_email, claim_updated_at, claim_observed_at,"
        " profile_updated_at, profile_observed_at) VALUES ('user_one', %(email)s, 2, 2, 2, 2),"
        " ('user_two', %(email)s, 1, 1, 1, 1)",
        {"email": ADDRESS},
    )
    connection.execute("INSERT INTO user_sync (clerk_id, deleted_at) VALUES ('user_gone', now())")
    connection.execute(
        "INSERT INTO webhook_events (svix_id, type, clerk_id, received_at, outcome)"
        " VALUES ('msg_applied', 'user.created', 'user_one', now(), 'applied')"
    )
    return connection


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch,
    make_settings: MakeSettings,
    connection: psycopg.Connection,  # noqa: ARG001 - its rows are there
    clerk: FakeClerk,
) -> RunCommand:
    settings = make_settings(clerk_secret_key=clerk.key, clerk_api_url=clerk.url)
    for name, value in environment(settings).items():
        monkeypatch.setenv(name, value)
    return lambda *arguments, before=(): run_with(os.environ, *before, "user", *arguments)


@pytest.mark.parametrize(("options", "zone"), [([], "UTC"), (["--local-time"], "JST")])
def test_exact_times_are_in_utc_unless_local_time_is_asked_for(
    run: RunCommand,
    connection: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    zone: str,
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        shown = run("user_gone", before=options)[1]
    finally:
        monkeypatch.undo()
        time.tzset()
    query = (
        "SELECT to_char(deleted_at AT TIME ZONE %s, 'YYYY-MM-DD HH24:MI:SS')"
        " FROM user_sync WHERE clerk_id = %s"
    )
    (moment,) = connection.execute(query, ["Asia/Tokyo" if options else "UTC", "user_gone"]).fetchone() or (
        "",
    )
    assert f"({moment} {zone})" in shown


def about(clerk_id: str) -> dict[str, Any]:
    return user_event(data=user(clerk_id))


def test_json_has_the_clerk_id_first_and_all_that_is_known(run: RunCommand, redis: Redis) -> None:
    failed = fail(redis, about("user_one"))
    held = delivery(about("user_one"))
    put(redis, held)
    ReservedJobs(redis, "w").settle_and_take([], 10)
    waiting = delivery(about("user_one"))
    put(redis, waiting)
    put(redis, delivery(about("user_two")))
    status, out, err = run("user_one", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert next(iter(found)) == "clerk_id"
    assert found["clerk_id"] == "user_one"
    assert found["row"]["email"] == ADDRESS
    assert found["sync"]["profile_updated_at"] == 2
    assert [claim["clerk_id"] for claim in found["claims"]] == ["user_two"]
    assert found["memberships"] == []
    assert [event["svix_id"] for event in found["events"]] == ["msg_applied"]
    assert {(job["id"], job["state"]) for job in found["jobs"]} == {
        (failed, "failed"),
        (held.svix_id, "reserved"),
        (waiting.svix_id, "waiting"),
    }
    assert found["clerk"] is None


def test_the_output_fits_80_columns(run: RunCommand, make_settings: MakeSettings, redis: Redis) -> None:
    fail(redis, about("user_one"))
    status, piped, _ = run("user_one")
    assert status == 0
    assert all(len(line) <= 80 for line in piped.splitlines())
    with on_a_terminal(make_settings(), "user", "user_one", columns=80) as terminal:
        terminal.wait()
        shown = terminal.shown.replace("\r", "")
    assert all(len(line) <= 80 for line in shown.splitlines())
    for words in (ADDRESS, "also claimed by user_two", "Deleted no", "failed: Unreadable", "user.created"):
        assert words in " ".join(shown.split()), words


def test_a_deletion_and_an_unknown_user_are_shown(run: RunCommand) -> None:
    _, out, _ = run("user_gone")
    assert "Deleted        now" in out or "ago" in out
    assert "Row            none" in out
    status, out, _ = run("user_never")
    assert status == 0
    assert "Nothing is stored about this user." in out
    _, out, _ = run("user_never", "--json")
    assert json.loads(out)["row"] is None
    assert run("no id!")[0] == 2


def test_the_end_of_the_bodies_in_redis_is_shown(run: RunCommand, connection: psycopg.Connection) -> None:
    """An erasure asks whether anything is left."""
    assert "In Redis       bodies of applied deliveries, until 20" in run("user_one")[1]
    assert json.loads(run("user_one", "--json")[1])["bodies_until"] is not None
    connection.execute("UPDATE webhook_events SET applied_at = now() - interval '61 minutes'")
    assert "In Redis" not in run("user_one")[1]
    assert json.loads(run("user_gone", "--json")[1])["bodies_until"] is None


def test_with_clerk_the_api_is_asked(run: RunCommand, clerk: FakeClerk) -> None:
    clerk.put(user("user_one"))
    assert "has this user, updated" in run("user_one", "--clerk")[1]
    found = json.loads(run("user_two", "--clerk", "--json")[1])
    assert found["clerk"] == {"exists": False, "updated_at": None}


def test_without_redis_the_tables_are_shown(run: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://127.0.0.1:1/0")
    began = time.monotonic()
    status, out, _ = run("user_one")
    assert (status, time.monotonic() - began < 12) == (0, True)
    assert ADDRESS in out
    assert "not known: nothing listens where REDIS_URL leads" in out

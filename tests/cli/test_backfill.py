"""`clerk-sync backfill` as an operator runs it, interrupts it and runs it again."""

import signal
import time

import config
from cli.dev.servers import free_port
from db.times import now_ms
from tests.support.commands import PATIENCE_S, run, start
from tests.support.fake_clerk import FakeClerk, Request, numbered_id
from tests.support.payloads import ABSENT, ANN, NOW, user
from tests.support.settings import MakeSettings
from tests.support.sync import api_settings, count, execute, query, rows
from tests.support.waiting import wait_until


def slowly(_: Request) -> None:
    time.sleep(0.3)


def seen(settings: config.Settings) -> int:
    """Return how far the run is that was saved last."""
    saved = query(settings, "SELECT (state -> 'position' ->> 'seen')::int FROM sync_progress")
    return int(saved[0][0]) if saved else 0


def test_every_user_is_synced_and_counted(clerk: FakeClerk, settings: config.Settings) -> None:
    clerk.put_many(1200)
    ran = run(settings, "backfill")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == "1,200 users: 1,200 created, 0 updated, 0 unchanged\n"
    assert set(rows(settings)) == set(clerk.ids())
    clerk.put(user(ANN), user(numbered_id(1), updated_at=NOW))
    assert run(settings, "backfill").stdout == "1,201 users: 1 created, 1 updated, 1,199 unchanged\n"


def kill_a_run_that_got_beyond(users: int, settings: config.Settings) -> int:
    """Return how far it got."""
    running = start(settings, "backfill")
    wait_until(lambda: seen(settings) >= users, PATIENCE_S)
    running.kill()
    running.communicate()
    return seen(settings)


def test_killed_three_times_it_goes_on_where_it_was(clerk: FakeClerk, settings: config.Settings) -> None:
    clerk.put_many(3000)
    clerk.shortens_pages_to = 250
    clerk.before = slowly
    reached = 0
    for _ in range(3):
        reached = kill_a_run_that_got_beyond(reached + 500, settings)
        assert reached < 3000
    clerk.before = lambda _: None
    clerk.requests.clear()
    ran = run(settings, "backfill")
    assert ran.returncode == 0, ran.stderr
    assert f"Resuming after {reached:,} users" in ran.stderr
    assert ran.stdout.startswith("3,000 users: ")
    pages = [request for request in clerk.requests if request.path == "/users"]
    assert pages[0].parameter("starting_after") == numbered_id(reached - 1)
    assert set(rows(settings)) == set(clerk.ids())
    assert seen(settings) == 0


def test_sigterm_stops_it_and_says_what_comes_next(clerk: FakeClerk, settings: config.Settings) -> None:
    clerk.put_many(3000)
    clerk.shortens_pages_to = 250
    clerk.before = lambda _: time.sleep(0.15 if len(clerk.requests) < 6 else 1)
    running = start(settings, "backfill")
    wait_until(lambda: seen(settings) >= 500, PATIENCE_S)
    running.send_signal(signal.SIGTERM)
    began = time.monotonic()
    out, err = running.communicate(timeout=PATIENCE_S)
    assert time.monotonic() - began < 20
    assert running.returncode == 1
    assert out == ""
    assert err.startswith("clerk-sync: stopped after ")
    assert "the next backfill resumes there" in err
    clerk.before = lambda _: None
    assert run(settings, "backfill").returncode == 0
    assert count(settings) == 3000


def test_restart_begins_anew(clerk: FakeClerk, settings: config.Settings) -> None:
    clerk.put_many(600)
    clerk.lists_at_most = 500
    ran = run(settings, "backfill")
    assert ran.returncode == 1
    assert "ended early" in ran.stderr
    assert "600" in ran.stderr
    clerk.lists_at_most = None
    clerk.requests.clear()
    assert run(settings, "backfill", "--restart").returncode == 0
    assert not any(request.parameter("starting_after") for request in clerk.requests[:2])


def test_since_reads_only_what_was_updated_since(clerk: FakeClerk, settings: config.Settings) -> None:
    now = now_ms()
    clerk.put(user(ANN, updated_at=now), user("user_old", updated_at=now - 10_000_000))
    ran = run(settings, "backfill", "--since", "1h")
    assert ran.stdout == "1 user: 1 created, 0 updated, 0 unchanged\n"
    assert rows(settings).keys() == {ANN}


def test_who_is_left_out_is_reported(clerk: FakeClerk, settings: config.Settings) -> None:
    clerk.put(user(ANN), user("user_refused", first_name="Secretname"))
    execute(settings, "ALTER TABLE users ADD CONSTRAINT no_name CHECK (name NOT LIKE 'Secret%')")
    clerk.show_next([user(ANN), user(ABSENT), clerk.user("user_refused")])
    ran = run(settings, "backfill")
    assert ran.returncode == 1
    assert ran.stdout.endswith(", 2 left out\n")
    assert "entry 2 was left out: it has no Clerk id" in ran.stderr
    assert "user_refused was left out" in ran.stderr
    assert "Secretname" not in ran.stderr + ran.stdout


def test_what_is_wrong_is_one_line(clerk: FakeClerk, make_settings: MakeSettings) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    wrong: dict[str, dict[str, str | None]] = {
        "CLERK_SECRET_KEY is not set": {"clerk_secret_key": None},
        "check CLERK_SECRET_KEY": {"clerk_secret_key": "sk_live_wrong"},
        "CLERK_INSTANCE_ID": {"clerk_instance_id": "ins_other"},
        "DATABASE_URL": {"database_url": f"postgresql://postgres@{nowhere.removeprefix('http://')}/x"},
    }
    for reason, overrides in wrong.items():
        ran = run(api_settings(make_settings, clerk, **overrides), "backfill")
        assert (ran.returncode, ran.stdout) == (1, "")
        assert reason in ran.stderr
        assert ran.stderr.startswith("clerk-sync: ")
        assert ran.stderr.count("\n") == 1
        assert "sk_live_wrong" not in ran.stderr
        assert clerk.key not in ran.stderr


def test_without_migrations_it_says_so(clerk: FakeClerk, settings: config.Settings) -> None:
    clerk.put(user(ANN))
    execute(settings, "DROP TABLE clerk_sync_version")
    ran = run(settings, "backfill")
    assert ran.returncode == 1
    assert "clerk-sync db upgrade" in ran.stderr

"""Reconciliation that workers run by themselves: when it is due, by one of them, no longer than they live."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog.testing
from pydantic import SecretStr
from redis import Redis

import config
from cli.dev.servers import free_port
from db.connection.engine import Database
from db.times import now_ms
from tests.support.fake_clerk import FakeClerk, Request, numbered_id
from tests.support.payloads import ANN, BEN, CAT, NOW, membership, user
from tests.support.settings import MakeSettings
from tests.support.stack import Stack
from tests.support.sync import api_settings, count, execute, query, rows
from tests.support.together import together
from tests.support.waiting import wait_until
from worker.clerk import api
from worker.clerk.api import READ_TIMEOUT_S
from worker.redis_client import worker_redis
from worker.shutdown import StopSignal
from worker.sync import scheduled
from worker.sync.backfill import OVERLAP_MS
from worker.sync.last_run import KEY, keep, load, summary, synced
from worker.sync.lock import LOCK_KEY, LOCK_S, LOST, ReconciliationLock
from worker.sync.scheduled import ScheduledReconciliation


@pytest.fixture
def settings(make_settings: MakeSettings, clerk: FakeClerk) -> config.Settings:
    return api_settings(make_settings, clerk, reconcile_every="1h")


class ReconcilingWorker:
    """A worker's reconciliations, and what they leave in Redis and in the tables that `settings` name."""

    def __init__(self, settings: config.Settings, redis: Redis, database: Database) -> None:
        self.settings = settings
        self.redis = redis
        self.database = database

    def run_if_due(self, lock_s: float = LOCK_S) -> None:
        servers = self.redis, self.database
        task = ScheduledReconciliation(self.settings, *servers, StopSignal(), lock_s=lock_s, settle_s=0)
        task.run_if_due()

    def run_again(self) -> dict[str, Any]:
        """Reconcile, however short a time ago the last one was, and return the result."""
        self.make_due()
        self.run_if_due()
        return self.result

    def make_due(self, last_ended: str = "2026-01-01T00:00:00+00:00") -> None:
        keep(self.redis, {**self.result, "finished_at": last_ended})

    @property
    def result(self) -> dict[str, Any]:
        """The result of the last reconciliation."""
        result = load(self.redis)
        assert result is not None
        return result

    @property
    def cursor(self) -> int:
        """From when on the next reconciliation reads."""
        cursors = "SELECT state->'since' FROM sync_progress WHERE task = 'incremental'"
        ((since,),) = query(self.settings, cursors)
        return int(since)


@pytest.fixture
def worker(settings: config.Settings, redis: Redis, database: Database) -> ReconcilingWorker:
    return ReconcilingWorker(settings, redis, database)


def test_the_first_reconciliation_fetches_everyone_and_says_what_it_did(
    clerk: FakeClerk, worker: ReconcilingWorker
) -> None:
    assert load(worker.redis) is None
    clerk.put_many(700)
    worker.run_if_due()
    result = worker.result
    assert result["error"] is None
    assert result["backfill"] == {
        "seen": 700, "created": 700, "updated": 0, "unchanged": 0, "invalid": 0, "refused": 0,
        "memberships": 0,
    }  # fmt: skip
    assert result["drift"] == {
        "listed": 700, "local": 700, "missing": 0, "stale": 0, "ghost": 0, "claims": 0, "tombstone": 0,
        "refusal": None, "merged": 0,
    }  # fmt: skip
    assert result["started_at"] <= result["finished_at"]


def test_a_later_reconciliation_reads_what_was_updated_since(
    clerk: FakeClerk, worker: ReconcilingWorker
) -> None:
    clerk.put_many(700)
    clerk.put(user(BEN, updated_at=NOW))
    worker.run_if_due()
    assert worker.cursor == NOW - OVERLAP_MS
    now = now_ms()
    clerk.put(user(ANN, created_at=now, updated_at=now), user(CAT, updated_at=NOW - OVERLAP_MS))
    clerk.requests.clear()
    assert worker.run_again()["backfill"]["seen"] == 3
    assert {ANN, CAT} <= rows(worker.settings).keys()
    assert clerk.requests[0].parameter("order_by") == "-updated_at"
    assert now - OVERLAP_MS - 1000 <= worker.cursor <= now - OVERLAP_MS


def test_a_clock_of_clerks_that_is_ahead_does_not_put_the_cursor_into_the_future(
    clerk: FakeClerk, worker: ReconcilingWorker
) -> None:
    ahead = now_ms() + 10 * OVERLAP_MS
    clerk.put(user(ANN, updated_at=ahead))
    worker.run_if_due()
    assert worker.cursor <= ahead - 10 * OVERLAP_MS


@pytest.mark.parametrize("shown", ["no user", "only the last", "none of the new"])
def test_a_listing_that_was_cut_short_is_read_again_from_where_it_began(
    clerk: FakeClerk, worker: ReconcilingWorker, shown: str
) -> None:
    clerk.put(*(user(clerk_id, updated_at=NOW) for clerk_id in (ANN, BEN, CAT)))
    worker.run_if_due()
    before = worker.cursor
    new = [
        user(clerk_id, first_name="New", updated_at=NOW + at * OVERLAP_MS)
        for at, clerk_id in enumerate((ANN, BEN, CAT), start=2)
    ]
    clerk.put(*new)
    clerk.lists_at_most = {"no user": 0, "only the last": 1}.get(shown)
    clerk.hidden = {ANN, BEN} if shown == "none of the new" else set()
    if shown == "none of the new":
        clerk.put(user(CAT, updated_at=NOW))
    assert worker.run_again()["drift"]["refusal"]
    assert worker.cursor == before
    clerk.lists_at_most, clerk.hidden = None, set()
    clerk.put(*new)
    assert worker.run_again()["backfill"]["seen"] == 3
    assert all(row.name.startswith("New") for row in rows(worker.settings).values())
    assert worker.cursor == NOW + 3 * OVERLAP_MS


def test_who_was_refused_by_the_database_is_read_again(clerk: FakeClerk, worker: ReconcilingWorker) -> None:
    clerk.put(user(ANN, updated_at=NOW), user(BEN, updated_at=NOW))
    worker.run_if_due()
    execute(worker.settings, "ALTER TABLE users ADD CONSTRAINT no_name CHECK (name NOT LIKE 'New %')")
    clerk.put(user(ANN, first_name="New", updated_at=NOW + OVERLAP_MS))
    clerk.put(user(BEN, first_name="Newer", updated_at=NOW + 9 * OVERLAP_MS))
    for _ in range(2):
        result = worker.run_again()
        assert (result["backfill"]["refused"], result["drift"]["stale"]) == (1, 1)
        assert worker.cursor == NOW + OVERLAP_MS
    execute(worker.settings, "ALTER TABLE users DROP CONSTRAINT no_name")
    assert worker.run_again()["backfill"]["updated"] == 1
    assert worker.cursor == NOW + 8 * OVERLAP_MS


def test_a_reconciliation_merges_what_differs_and_only_tells_who_is_gone(
    clerk: FakeClerk, worker: ReconcilingWorker
) -> None:
    settings = worker.settings
    clerk.put_many(30)
    clerk.put(user(ANN), user(BEN))
    worker.run_if_due()
    before = rows(settings)
    clerk.remove(ANN)
    execute(settings, f"UPDATE users SET name = 'Other' WHERE clerk_id = '{numbered_id(3)}'")
    execute(settings, f"DELETE FROM users WHERE clerk_id = '{numbered_id(4)}'")
    execute(settings, "ALTER TABLE users ADD CONSTRAINT no_name CHECK (role <> 'admin')")
    clerk.put(user(BEN, public_metadata={"role": "admin"}))
    drift = worker.run_again()["drift"]
    assert (drift["missing"], drift["stale"], drift["ghost"]) == (0, 1, 1)
    assert rows(settings) == before


def test_what_a_reconciliation_fetched_is_shown_when_no_user_differs_any_more(
    clerk: FakeClerk, worker: ReconcilingWorker
) -> None:
    clerk.put_many(50)
    clerk.put(user(BEN, updated_at=NOW))
    worker.run_if_due()
    lost, changed = ([numbered_id(i) for i in range(first, last)] for first, last in ((0, 10), (10, 30)))
    execute(worker.settings, f"DELETE FROM users WHERE clerk_id <= '{lost[-1]}'")
    between = f"clerk_id BETWEEN '{changed[0]}' AND '{changed[-1]}'"
    execute(worker.settings, f"UPDATE users SET name = 'Other' WHERE {between}")
    clerk.put(user(ANN, updated_at=NOW), user(BEN, first_name="New", updated_at=NOW + 1))
    found = summary(worker.run_again(), 3600, datetime.now(UTC))
    assert (found["result"], found["differing"]) == ("ok", 0)
    assert found["synced"] == {"created": 1, "updated": 1, "merged": 30}
    assert synced(worker.run_again()) == {"created": 0, "updated": 0, "merged": 0}


@pytest.mark.parametrize("reason", ["cut short", "lists no users", "more than 10 at a time"])
def test_a_listing_that_is_refused_changes_nothing(
    clerk: FakeClerk, worker: ReconcilingWorker, reason: str
) -> None:
    settings = worker.settings
    clerk.put_many(30)
    clerk.put(user(BEN, updated_at=NOW))
    worker.run_if_due()
    execute(settings, f"DELETE FROM users WHERE clerk_id = '{numbered_id(29)}'")
    execute(settings, f"UPDATE users SET name = 'Other' WHERE clerk_id = '{numbered_id(28)}'")
    before = rows(settings)
    match reason:
        case "cut short":
            clerk.counts = 32
        case "lists no users":
            clerk.lists_at_most = clerk.counts = 0
        case _:
            clerk.remove(*(numbered_id(i) for i in range(11)))
    drift = worker.run_again()["drift"]
    assert reason in drift["refusal"]
    listed = 0 if reason == "lists no users" else 1
    assert (drift["missing"], drift["stale"], drift["merged"]) == (listed, listed, 0)
    assert rows(settings) == before


def test_a_reconciliation_merges_memberships_and_only_tells_which_ended(
    clerk: FakeClerk, worker: ReconcilingWorker
) -> None:
    worker.settings = settings = worker.settings.model_copy(update={"organization_source": "membership"})
    clerk.put(user(ANN), user(BEN), user(CAT, updated_at=NOW + 2 * OVERLAP_MS))
    for clerk_id in (ANN, BEN, CAT):
        clerk.put_members(membership(clerk_id, id=f"orgmem_{clerk_id}"))
    worker.run_if_due()
    clerk.remove_members(f"orgmem_{ANN}")
    execute(settings, f"UPDATE users SET organization = 'Other', name = 'Other' WHERE clerk_id <> '{CAT}'")
    drift = worker.run_again()["drift"]
    assert (drift["missing"], drift["stale"], drift["refusal"]) == (0, 1, None)
    assert {row.organization for row in rows(settings).values()} == {"Acme"}
    assert all(row.name != "Other" for row in rows(settings).values())


@pytest.mark.parametrize("wrong_by_s", [0, -18_000, 18_000])
def test_nothing_is_done_before_it_is_due_whatever_the_workers_clock_says(
    clerk: FakeClerk, worker: ReconcilingWorker, monkeypatch: pytest.MonkeyPatch, wrong_by_s: float
) -> None:
    clock = SimpleNamespace(time=lambda: time.time() + wrong_by_s, monotonic=time.monotonic)
    monkeypatch.setattr(scheduled, "time", clock)
    worker.run_if_due()
    requests = len(clerk.requests)
    worker.run_if_due()
    assert len(clerk.requests) == requests


@pytest.mark.parametrize(
    ("variable", "reported"),
    [("SSL_CERT_FILE", "the trusted certificates cannot be read"), ("HTTPS_PROXY", "ValueError in ")],
)
def test_an_environment_that_allows_no_request_is_reported_and_not_tried_again_at_once(
    worker: ReconcilingWorker, monkeypatch: pytest.MonkeyPatch, variable: str, reported: str
) -> None:
    api._trusted.cache_clear()
    monkeypatch.setenv(variable, "nonsense://hunter2")
    worker.run_if_due()
    result = worker.result
    assert result["error"].startswith(reported)
    assert "hunter2" not in result["error"]
    worker.run_if_due()
    assert worker.result == result
    monkeypatch.delenv(variable)
    assert worker.run_again()["error"] is None


def test_one_that_ended_in_the_future_holds_back_no_other(
    clerk: FakeClerk, worker: ReconcilingWorker
) -> None:
    """A machine can start with a clock that is years ahead, and correct it later."""
    worker.run_if_due()
    worker.make_due("2099-01-01T00:00:00+00:00")
    worker.run_if_due()
    assert worker.result["finished_at"] < "2099"
    requests = len(clerk.requests)
    worker.run_if_due()
    assert len(clerk.requests) == requests


def test_one_worker_at_a_time_does_it(clerk: FakeClerk, worker: ReconcilingWorker) -> None:
    clerk.put_many(10)
    clerk.before = lambda _: time.sleep(0.05)
    together([worker.run_if_due] * 4)
    assert sum(request.path == "/users/count" for request in clerk.requests) == 4  # two for each walk
    assert not lock_is_held(worker.redis)


def test_a_lock_that_a_dead_worker_left_expires(worker: ReconcilingWorker, redis: Redis) -> None:
    redis.set(LOCK_KEY, "another", px=60_000)
    worker.run_if_due()
    assert load(redis) is None
    redis.pexpire(LOCK_KEY, 1)
    wait_until(lambda: not lock_is_held(redis), 20)
    worker.run_if_due()
    assert worker.result["error"] is None


SHORT_LOCK_S = 3.0


def test_the_lock_lives_as_long_as_a_reconciliation_that_has_to_wait(
    clerk: FakeClerk, worker: ReconcilingWorker
) -> None:
    clerk.put_many(10)
    clerk.answer_next(429, path="/users", headers={"Retry-After": "5"})
    began = time.monotonic()
    lives: list[int] = []
    thread = threading.Thread(target=worker.run_if_due, args=(SHORT_LOCK_S,))
    thread.start()
    while thread.is_alive():
        lives.append(worker.redis.pttl(LOCK_KEY))
        time.sleep(0.02)
    assert time.monotonic() - began >= 5
    taken = [i for i, life in enumerate(lives) if life > 0]
    assert min(lives[taken[0] : taken[-1]]) > 0
    assert max(lives) <= SHORT_LOCK_S * 1000
    assert worker.result["error"] is None
    assert not lock_is_held(worker.redis)


def reconcile_once(settings: config.Settings) -> None:
    """Reconcile in a process of its own."""
    redis, database = worker_redis(settings), Database(settings)
    ReconcilingWorker(settings, redis, database).run_if_due(SHORT_LOCK_S)
    database.dispose()
    redis.close()


@pytest.fixture
def other(settings: config.Settings) -> Iterator[BaseProcess]:
    """Another worker's process, at its turn."""
    process = multiprocessing.get_context("spawn").Process(target=reconcile_once, args=(settings,))
    process.start()
    yield process
    process.kill()
    process.join(30)


def lock_is_held(redis: Redis) -> bool:
    return bool(redis.exists(LOCK_KEY))


def test_after_a_worker_was_killed_in_a_reconciliation_another_one_goes_on_soon(
    clerk: FakeClerk, worker: ReconcilingWorker, redis: Redis, other: BaseProcess
) -> None:
    clerk.answer_next(429, path="/users", headers={"Retry-After": "30"})
    wait_until(lambda: clerk.requests_for("/users"), 60)
    worker.run_if_due()
    assert load(redis) is None
    other.kill()
    other.join(60)
    assert redis.pttl(LOCK_KEY) <= SHORT_LOCK_S * 1000
    wait_until(lambda: not lock_is_held(redis), 20)
    worker.run_if_due()
    assert worker.result["error"] is None


def test_a_worker_that_slept_through_the_loss_of_the_lock_does_nothing_more(
    clerk: FakeClerk, worker: ReconcilingWorker, other: BaseProcess
) -> None:
    clerk.answer_next(429, path="/users", headers={"Retry-After": "5"})
    wait_until(lambda: clerk.requests_for("/users"), 60)
    assert other.pid is not None
    os.kill(other.pid, signal.SIGSTOP)
    wait_until(lambda: not lock_is_held(worker.redis), 20)
    clerk.put(user(ANN))
    worker.run_if_due()
    done = worker.result
    asked = len(clerk.requests)
    os.kill(other.pid, signal.SIGCONT)
    other.join(60)
    assert other.exitcode == 0
    assert worker.result == done
    assert len(clerk.requests) == asked
    assert worker.cursor == NOW + 20 - OVERLAP_MS


@pytest.mark.parametrize("path", ["/users", "/users/count"])
def test_a_worker_that_lost_the_lock_leaves_the_rest_to_others(
    clerk: FakeClerk, worker: ReconcilingWorker, redis: Redis, path: str
) -> None:
    clerk.put_many(1200)

    def take_the_lock(request: Request) -> None:
        if request.path == path:
            redis.set(LOCK_KEY, "another")

    clerk.before = take_the_lock
    worker.run_if_due()
    assert load(redis) is None
    assert not query(worker.settings, "SELECT 1 FROM sync_progress WHERE task = 'incremental'")
    assert redis.get(LOCK_KEY) == b"another"


def test_the_loss_of_the_lock_is_logged_once(redis: Redis) -> None:
    lock = ReconciliationLock(redis, StopSignal(), 0.6)
    with structlog.testing.capture_logs() as logs:
        assert lock.acquire()
        redis.set(LOCK_KEY, "another")
        wait_until(lambda: lock.stopping.requested, 20)
        time.sleep(1)  # for several renewals
    lock.release()
    assert [entry["event"] for entry in logs].count(LOST) == 1


def test_a_failure_is_reported_in_one_line_and_tried_again_soon(worker: ReconcilingWorker) -> None:
    wrong = {"clerk_secret_key": SecretStr("sk_live_wrong"), "reconcile_every": 1.0}
    worker.settings = worker.settings.model_copy(update=wrong)
    worker.run_if_due()
    first = worker.result
    assert "CLERK_SECRET_KEY" in first["error"]
    assert (first["backfill"], first["drift"]) == (None, None)
    assert "sk_live_wrong" not in json.dumps(first)
    time.sleep(1.1)
    worker.run_if_due()
    assert worker.result["started_at"] > first["started_at"]


def test_another_key_begins_with_everyone_again(clerk: FakeClerk, worker: ReconcilingWorker) -> None:
    clerk.put(user(ANN, updated_at=NOW))
    worker.run_if_due()
    clerk.key = "sk_live_another"
    clerk.put(user(BEN, updated_at=NOW))
    worker.settings = worker.settings.model_copy(update={"clerk_secret_key": SecretStr(clerk.key)})
    assert worker.run_again()["backfill"]["seen"] == 2


def test_a_worker_reconciles_beside_its_work_and_stops_in_the_middle_of_it(
    clerk: FakeClerk, make_settings: MakeSettings, tmp_path: Path
) -> None:
    clerk.put_many(600)
    clerk.put(user(CAT))
    settings = api_settings(
        make_settings, clerk, reconcile_every="1s", port=free_port(), web_workers=1, log_format="json"
    )
    redis = worker_redis(settings)
    with Stack(settings, tmp_path, workers=2) as stack:
        wait_until(lambda: load(redis), 20, stack.logs)
        assert count(settings) == 601
        clerk.before = hang
        asked = len(clerk.requests)
        wait_until(lambda: len(clerk.requests) > asked, 20, stack.logs)
        began = time.monotonic()
        for worker in stack.workers:
            worker.end(signal.SIGTERM, patience=20)
        assert time.monotonic() - began < READ_TIMEOUT_S
        assert [worker.exit_status for worker in stack.workers] == [0, 0]
        logs = stack.logs()
    redis.close()
    assert '"event":"reconciled"' in logs
    for secret in (clerk.key, "@example.com", "Marisol"):
        assert secret not in logs


def hang(_: Request) -> None:
    time.sleep(3 * READ_TIMEOUT_S)


def test_an_interval_needs_a_key_for_clerk(make_settings: MakeSettings) -> None:
    with pytest.raises(config.SettingsError, match=r"^RECONCILE_EVERY .*CLERK_SECRET_KEY"):
        make_settings(reconcile_every="1h")


def test_the_key_in_redis_is_the_documented_one(worker: ReconcilingWorker) -> None:
    worker.run_if_due()
    assert KEY == "clerk-sync:reconcile"
    assert worker.redis.exists(KEY)
    assert query(worker.settings, "SELECT task FROM sync_progress") == [("incremental",)]

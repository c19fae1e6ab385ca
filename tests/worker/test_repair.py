"""Repair that workers run by themselves: when it is due, by one of them, and no longer than they live."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

import config
from cli.servers import free_port
from db.engine import Database
from tests.clerk import ANN, BEN, CAT, NOW, user
from tests.conftest import MakeSettings
from tests.fake_clerk import FakeClerk, Request, numbered_id
from tests.repair import api_settings, count, execute, query, rows
from tests.stack import Stack, wait_until
from worker.redis_clients import worker_redis
from worker.repair import LOCK_KEY, Repair
from worker.repair_log import KEY, keep, last_repair
from worker.stop import StopSignal


@pytest.fixture
def settings(make_settings: MakeSettings, clerk: FakeClerk) -> config.Settings:
    return api_settings(make_settings, clerk, reconcile_every="1h")


@pytest.fixture
def redis(settings: config.Settings) -> Iterator[Redis]:
    client = worker_redis(settings)
    yield client
    client.close()


@pytest.fixture
def database(settings: config.Settings) -> Iterator[Database]:
    made = Database(settings)
    yield made
    made.dispose()


@pytest.fixture
def repair(settings: config.Settings, redis: Redis, database: Database) -> Repair:
    return Repair(settings, redis, database, StopSignal())


def result_of(redis: Redis) -> dict[str, Any]:
    result = last_repair(redis)
    assert result is not None
    return result


def make_due(redis: Redis) -> None:
    """Let the last repair be long ago."""
    keep(redis, {**result_of(redis), "finished_at": "2026-01-01T00:00:00+00:00"})


def test_the_first_repair_brings_everyone_and_says_what_it_did(
    clerk: FakeClerk, repair: Repair, redis: Redis
) -> None:
    assert last_repair(redis) is None
    clerk.put_many(700)
    repair.turn()
    result = result_of(redis)
    assert result["error"] is None
    assert result["backfill"] == {
        "seen": 700, "created": 700, "updated": 0, "unchanged": 0, "unread": 0, "refused": 0,
        "memberships": 0,
    }  # fmt: skip
    assert result["drift"] == {
        "listed": 700, "here": 700, "missing": 0, "stale": 0, "ghost": 0, "claims": 0, "tombstone": 0,
        "refusal": None,
    }  # fmt: skip
    assert result["started_at"] <= result["finished_at"]


def test_a_later_repair_reads_what_was_updated_since(
    clerk: FakeClerk, repair: Repair, redis: Redis, settings: config.Settings
) -> None:
    clerk.put_many(700)
    repair.turn()
    make_due(redis)
    now = time.time_ns() // 1_000_000
    clerk.put(user(ANN, created_at=now, updated_at=now))
    clerk.requests.clear()
    repair.turn()
    assert result_of(redis)["backfill"]["seen"] == 1
    assert ANN in rows(settings)
    assert clerk.requests[0].parameter("order_by") == "-updated_at"


def test_a_repair_tells_of_drift_and_deletes_nobody(
    clerk: FakeClerk, repair: Repair, redis: Redis, settings: config.Settings
) -> None:
    clerk.put_many(30)
    clerk.put(user(ANN))
    repair.turn()
    clerk.remove(ANN)
    execute(settings, f"UPDATE users SET name = 'Other' WHERE clerk_id = '{numbered_id(3)}'")
    make_due(redis)
    repair.turn()
    drift = result_of(redis)["drift"]
    assert (drift["stale"], drift["ghost"], drift["missing"]) == (1, 1, 0)
    assert count(settings) == 31


def test_nothing_is_done_before_it_is_due(clerk: FakeClerk, repair: Repair) -> None:
    repair.turn()
    requests = len(clerk.requests)
    repair.turn()
    assert len(clerk.requests) == requests


def test_one_worker_at_a_time_does_it(
    clerk: FakeClerk, settings: config.Settings, redis: Redis, database: Database
) -> None:
    clerk.put_many(10)
    clerk.before = lambda _: time.sleep(0.05)
    repairs = [Repair(settings, redis, database, StopSignal()) for _ in range(4)]
    threads = [threading.Thread(target=each.turn) for each in repairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sum(request.path == "/users/count" for request in clerk.requests) == 4  # two for each walk
    assert not redis.exists(LOCK_KEY)


def test_a_lock_that_a_dead_worker_left_expires(repair: Repair, redis: Redis) -> None:
    redis.set(LOCK_KEY, "somebody", px=300)
    repair.turn()
    assert last_repair(redis) is None
    time.sleep(0.4)
    repair.turn()
    assert result_of(redis)["error"] is None


def test_whoever_lost_the_lock_leaves_the_rest_to_others(
    clerk: FakeClerk, repair: Repair, redis: Redis
) -> None:
    clerk.put_many(1200)

    def take_the_lock(request: Request) -> None:
        if request.path == "/users":
            redis.set(LOCK_KEY, "somebody")

    clerk.before = take_the_lock
    repair.turn()
    assert last_repair(redis) is None
    assert redis.get(LOCK_KEY) == b"somebody"


def test_a_failure_is_told_in_one_line_and_tried_again_soon(
    clerk: FakeClerk, redis: Redis, database: Database, make_settings: MakeSettings
) -> None:
    settings = api_settings(make_settings, clerk, clerk_secret_key="sk_live_wrong", reconcile_every="1s")
    repair = Repair(settings, redis, database, StopSignal())
    repair.turn()
    first = result_of(redis)
    assert "CLERK_SECRET_KEY" in first["error"]
    assert (first["backfill"], first["drift"]) == (None, None)
    assert "sk_live_wrong" not in json.dumps(first)
    time.sleep(1.1)
    repair.turn()
    assert result_of(redis)["started_at"] > first["started_at"]


def test_a_listing_that_was_cut_short_is_told(
    clerk: FakeClerk, repair: Repair, redis: Redis, settings: config.Settings
) -> None:
    clerk.put_many(600)
    clerk.lists_at_most = 500
    repair.turn()
    assert "cut short" in result_of(redis)["drift"]["refusal"]
    assert count(settings) == 500
    clerk.lists_at_most = None
    make_due(redis)
    repair.turn()
    assert count(settings) == 600


def test_another_key_begins_with_everyone_again(
    clerk: FakeClerk, repair: Repair, redis: Redis, database: Database, make_settings: MakeSettings
) -> None:
    clerk.put(user(ANN, updated_at=NOW))
    repair.turn()
    make_due(redis)
    clerk.key = "sk_live_another"
    clerk.put(user(BEN, updated_at=NOW))
    settings = api_settings(make_settings, clerk, reconcile_every="1h")
    Repair(settings, redis, database, StopSignal()).turn()
    assert result_of(redis)["backfill"]["seen"] == 2


def test_a_worker_repairs_beside_its_work_and_stops_in_the_middle_of_it(
    clerk: FakeClerk, make_settings: MakeSettings, tmp_path: Path
) -> None:
    clerk.put_many(600)
    clerk.put(user(CAT))
    settings = api_settings(
        make_settings, clerk, reconcile_every="1s", port=free_port(), web_workers=1, log_format="json"
    )
    redis = worker_redis(settings)
    with Stack(settings, tmp_path, workers=2) as stack:
        wait_until(lambda: last_repair(redis), 20, stack.logs)
        assert count(settings) == 601
        clerk.before = hang
        asked = len(clerk.requests)
        wait_until(lambda: len(clerk.requests) > asked, 20, stack.logs)
        began = time.monotonic()
        for worker in stack.workers:
            worker.end(signal.SIGTERM, patience=20)
        assert time.monotonic() - began < 9
        assert [worker.exit_status for worker in stack.workers] == [0, 0]
        logs = stack.logs()
    redis.close()
    assert '"event": "repair"' in logs
    for secret in (clerk.key, "@example.com", "Marisol"):
        assert secret not in logs


def hang(_: Request) -> None:
    time.sleep(10)


def test_without_an_interval_no_worker_asks_clerk(
    clerk: FakeClerk, make_settings: MakeSettings, tmp_path: Path
) -> None:
    settings = api_settings(make_settings, clerk, port=free_port(), web_workers=1)
    with Stack(settings, tmp_path):
        time.sleep(1.5)
    assert clerk.requests == []


def test_an_interval_needs_a_key_for_clerk(make_settings: MakeSettings) -> None:
    with pytest.raises(config.SettingsError, match=r"^RECONCILE_EVERY .*CLERK_SECRET_KEY"):
        make_settings(reconcile_every="1h")


def test_the_key_in_redis_is_the_documented_one(
    repair: Repair, redis: Redis, settings: config.Settings
) -> None:
    repair.turn()
    assert KEY == "clerk-sync:repair"
    assert redis.exists(KEY)
    assert query(settings, "SELECT task FROM sync_progress") == [("incremental",)]

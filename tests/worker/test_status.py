import os
import signal
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg
import pytest
from redis import Redis

from cli.servers import RedisServer, free_port
from db.times import now_ms
from tests.conftest import MakeSettings
from tests.jobs import delivery
from tests.jobs_failed import fail
from worker.intake import LAST_RECEIVED_KEY, DeliveryQueue
from worker.queue import HOLDERS_KEY, SILENT_AFTER_S, HeldJobs
from worker.rq_layout import WORKER_PREFIX, WORKERS_KEY
from worker.status import LIMIT_S, Question, Status, ask

MakeStatus = Callable[..., Status]


@pytest.fixture
def make_status(make_settings: MakeSettings) -> Iterator[MakeStatus]:
    made = []

    def make(**overrides: Any) -> Status:
        made.append(Status(make_settings(**overrides)))
        return made[-1]

    yield make
    for status in made:
        status.close()


@pytest.fixture
def worker(redis: Redis) -> None:
    """A worker that is alive, as far as Redis knows."""
    redis.sadd(WORKERS_KEY, f"{WORKER_PREFIX}one")
    redis.hset(f"{WORKER_PREFIX}one", mapping={"state": "idle", "last_heartbeat": "2026-01-01T10:00:00.0Z"})
    HeldJobs(redis, "one").beat()


def minutes_ago(redis: Redis, minutes: float) -> None:
    redis.set(LAST_RECEIVED_KEY, int((time.time() - minutes * 60) * 1000))


@pytest.mark.usefixtures("worker")
def test_all_is_well(make_status: MakeStatus) -> None:
    report = make_status(silence_alarm_minutes=1).report()
    assert report["status"] == "ok"
    assert all(check["ok"] for check in report["checks"].values())
    assert report["workers"]["alive"] == 1
    assert report["last_received_at"] is None


@pytest.mark.usefixtures("worker")
def test_a_worker_that_beats_no_more_is_not_alive(make_status: MakeStatus, redis: Redis) -> None:
    redis.zadd(HOLDERS_KEY, {"one": time.time() - SILENT_AFTER_S - 2})
    assert make_status().report()["workers"]["alive"] == 0


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(
    ("alarm", "silent_for", "status"),
    [(10, 9, "ok"), (10, 11, "degraded"), (None, 10_000, "ok"), (0.5, 1, "degraded")],
)
def test_silence_is_reported_once_it_has_lasted_too_long(
    make_status: MakeStatus, redis: Redis, alarm: float | None, silent_for: float, status: str
) -> None:
    minutes_ago(redis, silent_for)
    report = make_status(silence_alarm_minutes=alarm).report()
    assert report["status"] == status
    assert any("no delivery for" in warning for warning in report["warnings"]) is (status == "degraded")


@pytest.mark.usefixtures("worker")
def test_silence_from_the_beginning_counts_from_when_we_began_to_look(make_status: MakeStatus) -> None:
    status = make_status(silence_alarm_minutes=0.001)
    time.sleep(0.1)
    assert status.report()["status"] == "degraded"


def test_without_a_worker_the_service_is_degraded(make_status: MakeStatus, redis: Redis) -> None:
    HeldJobs(redis, "gone").beat()
    report = make_status().report()
    assert report["status"] == "degraded"
    assert any("no worker is alive" in warning for warning in report["warnings"])
    assert report["workers"]["alive"] == 0
    seen = datetime.fromisoformat(report["workers"]["last_seen_at"])
    assert abs((datetime.now(UTC) - seen).total_seconds()) < 10
    redis.delete(HOLDERS_KEY)
    assert make_status().report()["workers"]["last_seen_at"] is None


def test_connections_that_have_died_since_are_no_trouble(
    make_status: MakeStatus, database_url_unpooled: str
) -> None:
    status = make_status()
    status.report()
    with psycopg.connect(database_url_unpooled, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    checks = status.report()["checks"]
    assert {name: check["error"] for name, check in checks.items()} == dict.fromkeys(checks)


@pytest.mark.parametrize("append_only", [True, False])
def test_redis_without_an_append_only_file_is_a_warning_and_no_more(
    make_status: MakeStatus, server_directory: Path, append_only: bool
) -> None:
    server = RedisServer(server_directory, free_port())
    server.start()
    try:
        with Redis.from_url(server.url) as redis:
            redis.config_set("appendonly", "yes" if append_only else "no")
            redis.sadd(WORKERS_KEY, f"{WORKER_PREFIX}one")
            redis.hset(f"{WORKER_PREFIX}one", "state", "idle")
        report = make_status(redis_url=server.url).report()
        assert report["status"] == "ok"
        assert any("append-only" in warning for warning in report["warnings"]) is not append_only
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("policy", "maxmemory", "warned"),
    [("noeviction", "1gb", False), ("volatile-lru", "1gb", True), ("allkeys-lru", "0", False)],
)
def test_a_redis_that_may_throw_jobs_away_is_a_warning(
    make_status: MakeStatus, server_directory: Path, policy: str, maxmemory: str, *, warned: bool
) -> None:
    server = RedisServer(server_directory, free_port())
    server.start()
    try:
        with Redis.from_url(server.url) as redis:
            redis.config_set("maxmemory-policy", policy)
            redis.config_set("maxmemory", maxmemory)
        report = make_status(redis_url=server.url).report()
        assert any("noeviction" in warning for warning in report["warnings"]) is warned
    finally:
        server.stop()


def test_a_redis_that_does_not_tell_is_not_warned_about(
    make_status: MakeStatus, server_directory: Path
) -> None:
    server = RedisServer(server_directory, free_port())
    server.start()
    try:
        with Redis.from_url(server.url) as redis:
            redis.execute_command("ACL", "SETUSER", "default", "-info")
        report = make_status(redis_url=server.url).report()
        assert report["checks"]["redis"]["ok"]
        assert not any("append-only" in warning for warning in report["warnings"])
    finally:
        server.stop()


def test_what_waits_and_what_has_failed_is_counted(
    make_status: MakeStatus, redis: Redis, queue: DeliveryQueue
) -> None:
    fail(redis)
    queue.enqueue(delivery(received_at=now_ms() - 5000))
    report = make_status().report()
    assert (report["queue"]["depth"], report["queue"]["failed"]) == (1, 1)
    assert 5 <= report["queue"]["oldest_age_s"] < 60


def test_whatever_hangs_the_report_comes_in_time(make_status: MakeStatus, server_directory: Path) -> None:
    server = RedisServer(server_directory, free_port(), durable=False)
    server.start()
    status = make_status(redis_url=server.url, silence_alarm_minutes=1)
    assert status.report()["checks"]["redis"]["ok"]
    assert server.pid
    os.kill(server.pid, signal.SIGSTOP)
    try:
        for _ in range(3):
            began = time.monotonic()
            report = status.report()
            assert time.monotonic() - began < 3
            assert report["status"] == "failing"
            assert report["checks"]["database"]["ok"]
            assert report["queue"]["failed"] is None
    finally:
        os.kill(server.pid, signal.SIGCONT)
        server.stop()


def test_a_question_that_hangs_is_not_asked_again_and_other_questions_do_not_pile_up() -> None:
    asked: list[object] = []

    def hang(about: object) -> dict[str, object]:
        asked.append(about)
        time.sleep(1.2 * LIMIT_S)
        return {"about": about}

    question = Question("slow", hang)
    began = time.monotonic()
    for about in ("one", "one"):
        answer = ask({"slow": (question, (about,))})["slow"]
        if answer.error is None:
            assert answer.facts == {"about": "one"}
    assert asked == ["one"]
    assert time.monotonic() - began < 2 * LIMIT_S + 1
    question.start("two")
    other = ask({"slow": (question, ("three",))})["slow"]
    assert other.error is not None
    assert "three" not in asked

import time
from contextlib import closing
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
from redis import Redis

from cli.dev.servers import RedisServer
from db.times import now_ms
from tests.support.failed_jobs import fail
from tests.support.faulty_proxy import proxy_to
from tests.support.queue import beat, delivery, frozen, put
from tests.support.service import AskHealth, add_service, add_worker
from tests.support.waiting import wait_until, within
from worker.monitoring import health, probes, receivers
from worker.monitoring.probes import LIMIT_S, Probe, ask
from worker.queue.consumer import CONSUMERS_KEY, DEAD_AFTER_S, ReservedJobs
from worker.queue.failed_jobs import FailedJobs, ReplayResult
from worker.queue.producer import LAST_RECEIVED_KEY, WATCHING_SINCE_KEY, DeliveryQueue
from worker.queue.rq_format import JOB_PREFIX, SUSPENDED_KEY, timestamp
from worker.redis_client import QueueUnavailable


@pytest.fixture
def worker(redis: Redis) -> None:
    """A worker that is alive, as far as Redis knows."""
    add_service(redis)


def minutes_ago(redis: Redis, minutes: float) -> None:
    redis.set(LAST_RECEIVED_KEY, int((time.time() - minutes * 60) * 1000))


@pytest.mark.usefixtures("worker")
def test_all_is_well(report: AskHealth) -> None:
    found = report(silence_alarm_minutes=1)
    assert found["status"] == "ok"
    assert all(check["ok"] for check in found["checks"].values())
    assert found["workers"]["alive"] == 1
    assert found["last_received_at"] is None


@pytest.mark.usefixtures("worker")
def test_a_worker_that_beats_no_more_is_not_alive(report: AskHealth, redis: Redis) -> None:
    redis.zadd(CONSUMERS_KEY, {"one": time.time() - DEAD_AFTER_S - 2})
    assert report()["workers"]["alive"] == 0


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(
    ("alarm", "silent_for", "status"),
    [(10, 9, "ok"), (10, 11, "degraded"), (None, 10_000, "ok"), (0.5, 1, "degraded")],
)
def test_silence_is_reported_once_it_has_lasted_too_long(
    report: AskHealth, redis: Redis, alarm: float | None, silent_for: float, status: str
) -> None:
    minutes_ago(redis, silent_for)
    found = report(silence_alarm_minutes=alarm)
    assert found["status"] == status
    assert any("no delivery for" in warning for warning in found["warnings"]) is (status == "degraded")


@pytest.mark.usefixtures("worker")
def test_silence_from_the_beginning_counts_from_the_first_look(report: AskHealth, redis: Redis) -> None:
    assert report(silence_alarm_minutes=0.05)["status"] == "ok"
    redis.set(WATCHING_SINCE_KEY, int((time.time() - 4) * 1000))
    assert report(silence_alarm_minutes=0.05)["status"] == "degraded"
    minutes_ago(redis, 0.01)
    assert report(silence_alarm_minutes=0.05)["status"] == "ok"


@pytest.mark.usefixtures("worker")
def test_a_delivery_that_finds_the_queue_too_long_came_all_the_same(report: AskHealth, redis: Redis) -> None:
    put(redis, delivery(received_at=now_ms() - 600_000))
    alarms = {"silence_alarm_minutes": 5, "max_queue_depth": 1}
    assert any("no delivery" in warning for warning in report(**alarms)["warnings"])
    with closing(DeliveryQueue(redis, max_depth=1)) as queue, pytest.raises(QueueUnavailable):
        queue.enqueue(delivery(received_at=now_ms()))
    found = report(**alarms)
    assert found["status"] == "degraded"
    assert not any("no delivery" in warning for warning in found["warnings"])
    assert any("MAX_QUEUE_DEPTH" in warning for warning in found["warnings"])


def test_a_worker_was_last_seen_at_its_heartbeat(report: AskHealth, redis: Redis) -> None:
    """Its hash, which an idle worker writes every minute, has an older time."""
    add_worker(redis)
    workers = report()["workers"]
    [worker] = workers["list"]
    assert worker["last_seen_at"] == workers["last_seen_at"] > "2026-01-01T10:00:01"


@pytest.mark.parametrize(
    ("waits", "alarms"),
    [
        (("database",), ["the worker is waiting for the database: why database"]),
        (("database", "database"), ["all workers are waiting for the database: why database"]),
        (
            ("database", "Redis"),
            [
                "a worker is waiting for Redis: why Redis",
                "a worker is waiting for the database: why database",
            ],
        ),
        (("database", None), []),
        (("\x1b[2J", ["database"]), []),
    ],
)
def test_workers_that_all_wait_apply_nothing(
    report: AskHealth, redis: Redis, waits: tuple[object, ...], alarms: list[str]
) -> None:
    receivers.beat(redis, "receiver")
    for number, what in enumerate(waits):
        add_worker(redis, str(number), waiting_for=what, reason=f"why {what}")
    found = report()
    assert found["status"] == ("degraded" if alarms else "ok")
    assert [warning for warning in found["warnings"] if "waiting for" in warning] == alarms


@pytest.mark.usefixtures("worker")
def test_workers_that_are_suspended_apply_nothing(report: AskHealth, redis: Redis) -> None:
    redis.set(SUSPENDED_KEY, 1)
    found = report()
    assert found["status"] == "degraded"
    assert 'the workers are suspended: rq resume --url "$REDIS_URL"' in found["warnings"]
    redis.delete(SUSPENDED_KEY)
    assert report()["status"] == "ok"


@pytest.mark.parametrize(
    ("damage", "trouble"),
    [
        (("CONFIG", "SET", "maxmemory", "1"), "Redis is out of memory: raise its maxmemory, or free memory"),
        (("REPLICAOF", "127.0.0.1", "1"), "REDIS_URL leads to a read-only replica: name the primary"),
    ],
)
def test_a_redis_that_takes_no_writes_fails_and_what_is_in_it_is_reported(
    report: AskHealth, own_redis: RedisServer, damage: tuple[str, ...], trouble: str
) -> None:
    with Redis.from_url(own_redis.url) as redis:
        add_worker(redis, "one")
        put(redis, delivery())
        redis.execute_command(*damage)
    found = report(redis_url=own_redis.url)
    assert found["status"] == "failing"
    assert found["checks"]["redis"]["error"] == f"{trouble}; until then deliveries are refused"
    assert (found["queue"]["depth"], found["workers"]["alive"]) == (1, 1)


@pytest.mark.parametrize(
    ("damage", "alive"),
    [(("CONFIG", "SET", "maxmemory", "1"), 0), (("REPLICAOF", "127.0.0.1", "1"), None)],
    ids=["full", "replica"],
)
def test_where_redis_takes_no_heartbeat_nobody_is_said_to_be_dead(
    report: AskHealth, own_redis: RedisServer, damage: tuple[str, ...], alive: int | None
) -> None:
    """A full Redis takes heartbeats: there a missing worker may be why it is full."""
    with Redis.from_url(own_redis.url) as redis:
        add_service(redis)
        redis.zadd(CONSUMERS_KEY, {"one": time.time() - DEAD_AFTER_S - 2})
        redis.expire(
            f"{receivers.KEY_PREFIX}receiver", receivers.FORGET_AFTER_S - receivers.SILENT_AFTER_S - 2
        )
        redis.execute_command(*damage)
    found = report(redis_url=own_redis.url)
    assert (found["workers"]["alive"], found["receivers"]["alive"]) == (alive, alive)
    assert len([it for it in found["warnings"] if "is alive" in it]) == (0 if alive is None else 2)


def test_without_a_worker_the_service_is_degraded(report: AskHealth, redis: Redis) -> None:
    beat(redis, "gone")
    found = report()
    assert found["status"] == "degraded"
    assert any("no worker is alive" in warning for warning in found["warnings"])
    assert found["workers"]["alive"] == 0
    seen = datetime.fromisoformat(found["workers"]["last_seen_at"])
    assert abs((datetime.now(UTC) - seen).total_seconds()) < 10
    redis.delete(CONSUMERS_KEY)
    assert report()["workers"]["last_seen_at"] is None


def test_connections_that_have_died_since_are_no_trouble(
    report: AskHealth, connection: psycopg.Connection
) -> None:
    report()
    connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    checks = report()["checks"]
    assert {name: check["error"] for name, check in checks.items()} == dict.fromkeys(checks)


def test_a_connection_that_was_forgotten_on_its_way_is_trouble_for_seconds_only(
    report: AskHealth, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "ANSWER_LIMIT_S", LIMIT_S + 0.5)
    with proxy_to(database_url) as (proxy, url):
        assert report(database_url=url)["checks"]["database"]["ok"]
        proxy.forget()
        assert not report(database_url=url)["checks"]["database"]["ok"]
        wait_until(lambda: report(database_url=url)["checks"]["database"]["ok"], 20)


@pytest.mark.usefixtures("worker")
def test_the_warning_about_the_url_of_the_migrations_ends_with_its_cause(
    report: AskHealth, database_url_unpooled: str
) -> None:
    with proxy_to(database_url_unpooled) as (proxy, url):
        urls = {"database_url": database_url_unpooled, "database_url_unpooled": url}
        with proxy.starting_up():
            assert "migrations cannot run" in str(report(**urls)["warnings"])
        assert report(**urls)["warnings"] == []


@pytest.mark.parametrize("append_only", [True, False])
def test_redis_without_an_append_only_file_is_a_warning_and_no_more(
    report: AskHealth, own_redis: RedisServer, append_only: bool
) -> None:
    with Redis.from_url(own_redis.url) as redis:
        redis.config_set("appendonly", "yes" if append_only else "no")
        add_service(redis)
    found = report(redis_url=own_redis.url)
    assert found["status"] == "ok"
    assert any("append-only" in warning for warning in found["warnings"]) is not append_only


@pytest.mark.parametrize(
    ("policy", "maxmemory", "warned"),
    [("noeviction", "1gb", False), ("volatile-lru", "1gb", True), ("allkeys-lru", "0", False)],
)
def test_a_redis_that_may_throw_jobs_away_is_a_warning(
    report: AskHealth, own_redis: RedisServer, policy: str, maxmemory: str, *, warned: bool
) -> None:
    with Redis.from_url(own_redis.url) as redis:
        redis.config_set("maxmemory-policy", policy)
        redis.config_set("maxmemory", maxmemory)
    found = report(redis_url=own_redis.url)
    assert any("noeviction" in warning for warning in found["warnings"]) is warned


def test_a_redis_that_does_not_tell_is_not_warned_about(report: AskHealth, own_redis: RedisServer) -> None:
    with Redis.from_url(own_redis.url) as redis:
        redis.execute_command("ACL", "SETUSER", "default", "-info")
    found = report(redis_url=own_redis.url)
    assert found["checks"]["redis"]["ok"]
    assert not any("append-only" in warning for warning in found["warnings"])


def test_what_waits_and_what_has_failed_is_counted(
    report: AskHealth, redis: Redis, queue: DeliveryQueue
) -> None:
    fail(redis)
    queue.enqueue(delivery(received_at=now_ms() - 5000))
    found = report()
    assert (found["queue"]["depth"], found["queue"]["failed"]) == (1, 1)
    assert 5 <= found["queue"]["oldest_age_s"] < 60


def test_what_a_worker_has_in_hand_counts_in_the_oldest_age(
    report: AskHealth, redis: Redis, queue: DeliveryQueue
) -> None:
    queue.enqueue(delivery(received_at=now_ms() - 5000))
    beat(redis, "one")
    assert len(ReservedJobs(redis, "one").settle_and_take([], 10) or []) == 1
    queue.enqueue(delivery(received_at=now_ms()))
    found = report()["queue"]
    assert (found["depth"], found["reserved"]) == (1, 1)
    assert 5 <= found["oldest_age_s"] < 60


def test_a_job_that_was_replayed_waits_since_then(report: AskHealth, redis: Redis) -> None:
    id_ = fail(redis)
    long_ago = timestamp(datetime.now(UTC) - timedelta(hours=5))
    redis.hset(JOB_PREFIX + id_, mapping={"created_at": long_ago, "enqueued_at": long_ago})
    assert list(FailedJobs(redis).replay([id_])) == [(id_, ReplayResult.REPLAYED)]
    assert report()["queue"]["oldest_age_s"] < 60
    redis.hset(JOB_PREFIX + id_, "enqueued_at", "")
    assert report()["queue"]["oldest_age_s"] > 4 * 3600


def test_whatever_hangs_the_report_comes_in_time(report: AskHealth, own_redis: RedisServer) -> None:
    assert report(redis_url=own_redis.url)["checks"]["redis"]["ok"]
    with frozen(own_redis):
        for _ in range(3):
            with within(2 * LIMIT_S):
                found = report(redis_url=own_redis.url)
            assert found["status"] == "failing"
            assert found["checks"]["database"]["ok"]
            assert found["queue"]["failed"] is None


def test_a_question_that_hangs_is_not_asked_again_and_other_questions_do_not_pile_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probes, "LIMIT_S", 0.5)
    asked: list[object] = []

    def hang(about: object) -> dict[str, object]:
        asked.append(about)
        time.sleep(0.6)
        return {"about": about}

    question = Probe("slow", hang)
    began = time.monotonic()
    for about in ("one", "one"):
        answer = ask(question, slow=about)["slow"]
        if answer.error is None:
            assert answer.facts == {"about": "one"}
    assert asked == ["one"]
    assert time.monotonic() - began < 2
    question.start("two")
    other = ask(question, slow="three")["slow"]
    assert other.error is not None
    assert "three" not in asked

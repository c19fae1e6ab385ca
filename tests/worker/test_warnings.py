"""What makes the service degraded, each on real servers; each ends by itself when its cause does."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import psycopg
import pytest
from flask.testing import FlaskClient
from redis import Redis

from cli.dev.servers import PostgresServer, free_port
from db.connection.engine import Database
from db.identity import leads_to_same_tables
from tests.support.deliveries import PATH, MakeClient, signed
from tests.support.failed_jobs import fail
from tests.support.payloads import body, user_event
from tests.support.queue import delivery
from tests.support.service import add_service, add_worker
from tests.support.settings import SECRET, MakeSettings
from tests.support.waiting import wait_until
from web.app import create_app
from worker.monitoring import receivers, recent
from worker.monitoring.health import Status
from worker.monitoring.metrics import Metrics
from worker.monitoring.receivers import ReceiverTasks
from worker.queue import lock_waits
from worker.queue.consumer import Finished, ReservedJobs
from worker.queue.failed_jobs import FailedJobs
from worker.queue.producer import DeliveryQueue
from worker.queue.rq_format import SUSPENDED_KEY
from worker.shutdown import StopSignal

Report = Callable[..., dict[str, Any]]


@pytest.fixture
def report(make_settings: MakeSettings, redis: Redis) -> Iterator[Report]:
    """Return what /health says, of a service with a worker and a receiver."""
    made: dict[str, Status] = {}
    add_service(redis)

    def ask(**overrides: Any) -> dict[str, Any]:
        key = repr(overrides)
        if key not in made:
            made[key] = Status(make_settings(**overrides))
        return made[key].report()

    yield ask
    for status in made.values():
        status.close()


def _warning(report: dict[str, Any], words: str) -> str:
    found = [warning for warning in report["warnings"] if words in warning]
    assert len(found) == 1, report["warnings"]
    assert report["status"] == "degraded"
    return str(found[0])


def _is_well(report: dict[str, Any]) -> bool:
    return bool(report["status"] == "ok")


def test_failed_jobs_are_counted_with_the_newest_reason(report: Report, redis: Redis) -> None:
    assert _is_well(report())
    ids = [fail(redis)]
    time.sleep(1.1)  # RQ keeps the time of a failure in seconds
    ids.append(fail(redis, reason="Unreadable: the newest"))
    said = _warning(report(), "failed")
    assert (
        said == "2 jobs have failed, the newest because of Unreadable: the newest: see clerk-sync failed list"
    )
    jobs = FailedJobs(redis)
    list(jobs.discard(ids[:1]))
    assert _warning(report(), "failed").startswith("1 job has failed")
    list(jobs.discard(ids[1:]))
    assert _is_well(report())


def test_a_batch_that_is_in_hand_for_long_is_said(report: Report, redis: Redis) -> None:
    add_worker(redis, in_hand_s=31)
    assert "31 s" in _warning(report(), "the same batch in hand")
    add_worker(redis, in_hand_s=2)
    assert _is_well(report())


@pytest.fixture
def make_client(make_settings: MakeSettings) -> MakeClient:
    return lambda **overrides: create_app(make_settings(**overrides)).test_client()


def test_a_delivery_that_waits_for_a_lock_is_said_after_thirty_seconds(report: Report, redis: Redis) -> None:
    held = ReservedJobs(redis, "one")
    DeliveryQueue(redis).enqueue(delivery(received_at=int(time.time() * 1000)))
    [job] = held.settle_and_take([], 1) or []
    redis.zadd(lock_waits.KEY, {job.id: time.time() - 20})
    short = report()
    assert (short["status"], short["lock_waits"]["jobs"]) == ("ok", 1)
    redis.zadd(lock_waits.KEY, {job.id: time.time() - 40})
    assert "1 delivery waits for a row that another transaction has locked for 40" in _warning(
        report(), "row"
    )
    held.settle_and_take([Finished(job, "applied")], 0)
    assert _is_well(report())


def test_what_a_suspended_worker_holds_is_counted(report: Report, redis: Redis) -> None:
    DeliveryQueue(redis).enqueue(delivery(received_at=int(time.time() * 1000)))
    assert ReservedJobs(redis, "one").wait(1, StopSignal())
    redis.set(SUSPENDED_KEY, 1)
    queue = report()["queue"]
    assert (queue["depth"], queue["reserved"]) == (0, 1)


def _send(client: FlaskClient, count: int, *, secret: str = SECRET, age_s: int = 0) -> None:
    for _ in range(count):
        content = body(user_event())
        client.post(PATH, data=content, headers=signed(content, secret=secret, age_s=age_s))
    client.get("/metrics")  # which adds up what was counted


OTHER_SECRET = "whsec_" + "QUJDREVGR0hJSktMTU5PUFFSU1RVVldY"


def test_deliveries_that_are_refused_degrade_and_strangers_noise_does_not(
    report: Report, make_client: MakeClient
) -> None:
    client = make_client()
    _send(client, 5, secret=OTHER_SECRET)
    assert _is_well(report()), "a few are noise"
    _send(client, 3, secret=OTHER_SECRET)
    _send(client, 2)
    said = _warning(report(), "signature does not match")
    assert said.startswith("8 deliveries refused in the last 15 minutes")
    assert "(2 genuine ones came meanwhile)" in said
    assert "CLERK_WEBHOOK_SIGNING_SECRET" in said
    _send(client, 8)
    noise = report()
    assert noise["status"] == "ok"
    assert any("forgeries" in warning for warning in noise["warnings"])


def test_deliveries_that_are_too_old_name_the_clock(
    report: Report, make_client: MakeClient, redis: Redis
) -> None:
    client = make_client()
    _send(client, 8, age_s=600)
    assert "set the clock" in _warning(report(), "the signature is too old")
    [key] = cast("list[bytes]", redis.keys(f"{recent.KEY_PREFIX}*"))
    minute = int(bytes(key).decode().removeprefix(recent.KEY_PREFIX))
    redis.rename(key, f"{recent.KEY_PREFIX}{minute - 3}")
    _send(client, 1)
    assert report()["status"] == "ok", "it is over: genuine ones alone have come since"


def test_deliveries_of_another_instance_that_are_ignored_degrade(
    report: Report, make_client: MakeClient, redis: Redis
) -> None:
    client = make_client(clerk_instance_id="ins_ours")
    content = body(user_event() | {"instance_id": "ins_theirs"})
    assert client.post(PATH, data=content, headers=signed(content)).json == {"status": "ignored"}
    client.get("/metrics")
    assert "CLERK_INSTANCE_ID" in _warning(report(), "1 delivery of another Clerk instance ignored")
    redis.delete(*redis.keys(f"{recent.KEY_PREFIX}*"))
    assert _is_well(report())


def test_a_second_instance_in_the_tables_is_said(report: Report, database_url_unpooled: str) -> None:
    with psycopg.connect(database_url_unpooled, autocommit=True) as connection:
        connection.execute("INSERT INTO instance_sync (id) VALUES ('ins_one')")
        assert _is_well(report())
        connection.execute("INSERT INTO instance_sync (id) VALUES ('ins_two')")
        assert "CLERK_INSTANCE_ID" in _warning(report(), "2 Clerk instances have written")
        connection.execute("DELETE FROM instance_sync WHERE id = 'ins_two'")
    assert _is_well(report())


def test_without_a_receiver_that_is_said_and_one_that_ends_leaves(
    report: Report, make_settings: MakeSettings, redis: Redis
) -> None:
    redis.delete(receivers.KEY)
    assert "start clerk-sync web" in _warning(report(), "no receiver is alive")
    tasks = ReceiverTasks(make_settings(), Metrics())
    tasks.start()
    wait_until(lambda: redis.zcard(receivers.KEY), 10)
    assert _is_well(report())
    assert report()["receivers"]["alive"] == 1
    tasks.stop()
    assert redis.zcard(receivers.KEY) == 0
    redis.zadd(receivers.KEY, {"silent": time.time() - receivers.SILENT_AFTER_S - 2})
    silent = report()
    assert silent["receivers"]["alive"] == 0
    assert silent["receivers"]["last_seen_at"]


def test_a_redis_that_was_emptied_is_told_by_the_ledger(
    report: Report, redis: Redis, database_url_unpooled: str
) -> None:
    queue = DeliveryQueue(redis)
    received_at = int(time.time() * 1000)
    queue.enqueue(delivery(received_at=received_at))
    assert _is_well(report())
    with psycopg.connect(database_url_unpooled, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO webhook_events (svix_id, type, clerk_id, received_at, outcome)"
            " VALUES ('msg_1', 'user.created', 'user_1', now(), 'applied')"
        )
    assert _is_well(report())
    redis.flushdb()
    add_service(redis)
    assert "what waited there is lost" in _warning(report(), "Redis was emptied")
    queue.enqueue(delivery(received_at=received_at - 3_600_000))
    assert _warning(report(), "Redis was emptied"), "what came back is an old snapshot"
    queue.enqueue(delivery(received_at=received_at + 1000))
    assert _is_well(report())


@pytest.fixture
def other_postgres(server_directory: Path) -> Iterator[PostgresServer]:
    server = PostgresServer(server_directory / "other", free_port(), durable=False)
    server.start()
    yield server
    server.stop("immediate")


def test_two_urls_that_lead_to_different_tables_are_said(
    report: Report, database_url: str, database_url_unpooled: str, other_postgres: PostgresServer
) -> None:
    same = database_url_unpooled + "?application_name=other"
    assert _is_well(report(database_url=database_url, database_url_unpooled=same))
    different = report(database_url=database_url, database_url_unpooled=other_postgres.url)
    assert "DATABASE_URL_UNPOOLED" in _warning(different, "lead to different tables")
    with psycopg.connect(database_url_unpooled, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA elsewhere")
    hidden = f"{database_url_unpooled}?options=-csearch_path%3Delsewhere"
    assert _warning(
        report(database_url=database_url, database_url_unpooled=hidden), "lead to different tables"
    )
    away = report(database_url=database_url, database_url_unpooled="postgresql://x@127.0.0.1:1/x")
    assert away["status"] == "ok"
    assert any("migrations cannot run" in warning for warning in away["warnings"])


def test_a_database_and_its_copy_are_two(make_settings: MakeSettings, database_url_unpooled: str) -> None:
    there, _, name = database_url_unpooled.rpartition("/")
    url = f"{there}/{name}_copy"
    with psycopg.connect(f"{there}/postgres", autocommit=True) as admin:
        admin.execute(f'CREATE DATABASE "{name}_copy" TEMPLATE "{name}"'.encode())
        one, again = (Database(make_settings(database_url=database_url_unpooled)) for _ in range(2))
        copy = Database(make_settings(database_url=url, database_url_unpooled=url))
        assert leads_to_same_tables(one, again)
        assert not leads_to_same_tables(one, copy)
        for database in (one, again, copy):
            database.dispose()
        admin.execute(f'DROP DATABASE "{name}_copy" WITH (FORCE)'.encode())


def test_a_clock_that_is_more_than_a_minute_off_is_said(
    report: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _is_well(report())
    right = time.time
    monkeypatch.setattr("worker.monitoring.health.time.time", lambda: right() - 90)
    assert _warning(report(), "this machine's clock is 90 s behind the database's")
    monkeypatch.setattr("worker.monitoring.health.time.time", right)
    assert _is_well(report())

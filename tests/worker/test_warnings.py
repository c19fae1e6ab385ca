"""What makes the service degraded, each on real servers; each ends by itself when its cause does."""

import json
import re
import time
from datetime import UTC, datetime
from typing import Any, cast

import psycopg
import pytest
from flask.testing import FlaskClient
from redis import Redis

from cli.dev.servers import PostgresServer, RedisServer
from db.connection.engine import Database
from db.identity import leads_to_same_tables
from db.times import now_ms
from tests.support.databases import new_database, with_database
from tests.support.deliveries import PATH, MakeClient, signed
from tests.support.failed_jobs import fail
from tests.support.payloads import body, user_event
from tests.support.queue import beat, delivery, put
from tests.support.reserved_jobs import fill, settle, take
from tests.support.service import AskHealth, add_service, add_worker
from tests.support.settings import SECRET, MakeSettings
from tests.support.waiting import wait_until
from web.app import create_app
from worker.monitoring import probes, receivers, recent
from worker.monitoring.health import Status
from worker.monitoring.metrics import DELIVERIES, DeliveryAnswer, Metrics
from worker.monitoring.receivers import ReceiverTasks
from worker.monitoring.redis_stats import CAUSES_KEY
from worker.queue import lock_waits
from worker.queue.consumer import Failed, Finished, ReservedJobs
from worker.queue.failed_jobs import FailedJobs
from worker.queue.producer import WATCHING_SINCE_KEY
from worker.queue.rq_format import (
    FAILED_KEY,
    JOB_PREFIX,
    SCHEDULED_KEY,
    SUSPENDED_KEY,
    WORKER_PREFIX,
    WORKERS_KEY,
)
from worker.shutdown import StopSignal


@pytest.fixture(autouse=True)
def _service(redis: Redis, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker and a receiver, whose health is not asked in a hurry: the machine may be busy."""
    monkeypatch.setattr(probes, "LIMIT_S", 20)
    add_service(redis)


Admin = psycopg.Connection[Any]


def _warning(report: dict[str, Any], words: str) -> str:
    found = [warning for warning in report["warnings"] if words in warning]
    assert len(found) == 1, report["warnings"]
    assert report["status"] == "degraded"
    return str(found[0])


def _is_well(report: dict[str, Any]) -> bool:
    return bool(report["status"] == "ok")


def test_failed_jobs_are_counted_with_the_newest_reason(report: AskHealth, redis: Redis) -> None:
    assert _is_well(report())
    ids = [fail(redis), fail(redis, reason="Unreadable: the newest")]
    redis.zincrby(FAILED_KEY, -1, ids[0])  # RQ keeps the time of a failure in seconds
    said = _warning(report(), "failed")
    assert (
        said == "2 jobs have failed, the newest because of Unreadable: the newest:"
        " see clerk-sync failed list (docs/operations.md, Jobs fail)"
    )
    jobs = FailedJobs(redis)
    list(jobs.discard(ids[:1]))
    assert _warning(report(), "failed").startswith("1 job has failed")
    list(jobs.discard(ids[1:]))
    assert _is_well(report())


def _refuse(redis: Redis) -> None:
    """Let a worker of ours refuse what is in the queue, to be tried again, and that be due."""
    held = ReservedJobs(redis, "refusing")
    reason = "ChangeRefused: the database refused the change: RaiseException (SQLSTATE P0001)"
    settle(held, *(Failed(job, reason, reason, retryable=True) for job in take(held)))


def test_deliveries_that_are_refused_again_and_again_are_said_before_they_fail(
    report: AskHealth, redis: Redis
) -> None:
    """A trigger of the application refuses every change: it is minutes until the first job has failed."""
    fill(redis, 2)
    _refuse(redis)
    assert _is_well(report()), "one more attempt may heal it"
    [*ids] = cast("list[bytes]", redis.zrange(SCHEDULED_KEY, 0, -1))
    redis.zadd(SCHEDULED_KEY, dict.fromkeys(ids, 0))
    assert beat(redis).retried == 2
    _refuse(redis)
    said = _warning(report(), "refused more than once")
    assert said.startswith("2 deliveries were refused more than once, and will be tried again: Change")
    assert "P0001" in said
    redis.zadd(SCHEDULED_KEY, dict.fromkeys(ids, 0))
    beat(redis)
    _finish(redis)
    assert "refused" not in str(report()["warnings"])


def _finish(redis: Redis) -> None:
    """Let a worker apply what is in the queue, elsewhere."""
    held = ReservedJobs(redis, "one")
    settle(held, *(Finished(job, "applied") for job in take(held)))


def _flush(counts: Metrics, redis: Redis) -> None:
    """Count a delivery as a process does, and add it to the totals."""
    counts.count(DELIVERIES, "user.created", DeliveryAnswer.QUEUED)
    counts.flush(redis)


def _record(connection: Admin, svix_id: str = "msg_1", ago: str = "0") -> None:
    """Write a delivery into the ledger that was received so long ago."""
    connection.execute(
        "INSERT INTO webhook_events (svix_id, type, clerk_id, received_at, outcome)"
        " VALUES (%s, 'user.created', 'user_1', now() - %s::interval, 'applied')",
        [svix_id, ago],
    )


def test_a_worker_that_applies_to_another_database_is_said(
    report: AskHealth, redis: Redis, connection: Admin
) -> None:
    """The ledger here lacks the newest delivery that a worker has applied."""
    given = delivery(received_at=now_ms())
    put(redis, given)
    _finish(redis)
    assert "DATABASE_SCHEMA" in _warning(report(), "is not in the ledger")
    _record(connection, given.svix_id)
    assert _is_well(report())


def test_a_batch_that_is_in_hand_for_long_is_said(report: AskHealth, redis: Redis) -> None:
    add_worker(redis, in_hand_s=31)
    assert "31 s" in _warning(report(), "the same batch for")
    add_worker(redis, in_hand_s=2)
    assert _is_well(report())


@pytest.fixture
def make_client(make_settings: MakeSettings) -> MakeClient:
    return lambda **overrides: create_app(make_settings(**overrides)).test_client()


def test_a_delivery_that_waits_for_a_lock_is_said_after_thirty_seconds(
    report: AskHealth, redis: Redis
) -> None:
    reserved = ReservedJobs(redis, "one")
    put(redis, delivery(received_at=now_ms()))
    [job] = reserved.settle_and_take([], 1) or []
    redis.zadd(lock_waits.KEY, {job.id: time.time() - 20})
    short = report()
    assert (short["status"], short["lock_waits"]["jobs"]) == ("ok", 1)
    redis.zadd(lock_waits.KEY, {job.id: time.time() - 40})
    assert "1 delivery has waited 40 s for a row that another transaction has locked" in _warning(
        report(), "row"
    )
    reserved.settle_and_take([Finished(job, "applied")], 0)
    assert "row" not in str(report()["warnings"])


def test_what_a_suspended_worker_holds_is_counted(report: AskHealth, redis: Redis) -> None:
    put(redis, delivery(received_at=now_ms()))
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
    report: AskHealth, make_client: MakeClient
) -> None:
    client = make_client()
    _send(client, 5, secret=OTHER_SECRET)
    assert _is_well(report()), "a few are noise"
    _send(client, 3, secret=OTHER_SECRET)
    _send(client, 2)
    said = _warning(report(), "signature does not match")
    assert said.startswith("8 deliveries refused in the last 15 minutes")
    assert re.search(r"\(2 genuine ones came, the last \d s ago\)", said)
    assert "CLERK_WEBHOOK_SIGNING_SECRET" in said
    _send(client, 8)
    noise = report()
    assert noise["status"] == "ok"
    assert any("forgeries" in warning for warning in noise["warnings"])


def test_a_busy_service_that_refuses_all_of_a_sudden_is_said_at_once(report: AskHealth, redis: Redis) -> None:
    """A quarter of an hour's genuine deliveries do not outweigh that none comes any more."""
    recent.add(redis, {recent.GENUINE: 900})
    recent.add(redis, {recent.MISMATCH: 9})
    assert _is_well(report()), "genuine ones may still be coming"
    _age_genuine(redis, 20)
    assert _warning(report(), "(900 genuine ones came, the last 2")
    recent.add(redis, {recent.GENUINE: 1})
    assert _is_well(report())


def test_a_quiet_service_waits_for_its_genuine_deliveries(report: AskHealth, redis: Redis) -> None:
    recent.add(redis, {recent.GENUINE: 30, recent.MISMATCH: 9})
    _age_genuine(redis, 60)
    assert _is_well(report()), "two were due"
    _age_genuine(redis, 180)
    assert _warning(report(), "signature does not match")


def test_a_reason_that_is_over_is_not_named_beside_one_that_goes_on(report: AskHealth, redis: Redis) -> None:
    recent.add(redis, {recent.MISMATCH: 21})
    _move(redis, 3)
    recent.add(redis, {recent.GENUINE: 5})
    _move(redis, 2)
    recent.add(redis, {recent.STALE: 9})
    said = report()
    assert _warning(said, "the signed time is more than five minutes off")
    assert "does not match" not in str(said["warnings"])


def _age_genuine(redis: Redis, seconds: int) -> None:
    now: Any = redis.time()
    redis.set(recent.GENUINE_AT_KEY, now[0] - seconds)


def _move(redis: Redis, minutes: int) -> None:
    """Let the newest minute's counts be so much older; a new minute may have begun since."""
    counted: Any = redis.keys(f"{recent.KEY_PREFIX}*")
    minute = max(int(key.rpartition(b":")[2]) for key in counted)
    redis.rename(f"{recent.KEY_PREFIX}{minute}", f"{recent.KEY_PREFIX}{minute - minutes}")


def test_deliveries_that_are_too_old_name_the_clock(
    report: AskHealth, make_client: MakeClient, redis: Redis
) -> None:
    client = make_client()
    _send(client, 8, age_s=600)
    assert "(0 genuine ones came): set the clock" in _warning(
        report(), "the signed time is more than five minutes off"
    )
    _move(redis, 3)
    _send(client, 1)
    assert report()["status"] == "ok", "it is over: genuine ones alone have come since"


def test_deliveries_of_another_instance_that_are_ignored_degrade(
    report: AskHealth, make_client: MakeClient, redis: Redis
) -> None:
    client = make_client(clerk_instance_id="ins_ours")
    content = body(user_event() | {"instance_id": "ins_theirs"})
    assert client.post(PATH, data=content, headers=signed(content)).json == {"status": "ignored"}
    client.get("/metrics")
    assert "CLERK_INSTANCE_ID" in _warning(report(), "1 delivery of another Clerk instance ignored")
    redis.delete(*redis.keys(f"{recent.KEY_PREFIX}*"))
    assert _is_well(report())


def test_a_second_instance_in_the_tables_is_said(report: AskHealth, connection: Admin) -> None:
    connection.execute("INSERT INTO instance_sync (id) VALUES ('ins_one')")
    assert _is_well(report())
    connection.execute("INSERT INTO instance_sync (id) VALUES ('ins_two')")
    assert "CLERK_INSTANCE_ID" in _warning(report(), "2 Clerk instances have written")
    connection.execute("DELETE FROM instance_sync WHERE id = 'ins_two'")
    assert _is_well(report())


def test_without_a_receiver_that_is_said_and_one_that_ends_leaves(
    report: AskHealth, make_settings: MakeSettings, redis: Redis
) -> None:
    receivers.deregister(redis, "receiver")
    assert "start clerk-sync web" in _warning(report(), "no receiver is alive")
    tasks = ReceiverTasks(make_settings(), Metrics())
    tasks.start()
    wait_until(lambda: redis.scard(receivers.NAMES_KEY), 30)
    assert _is_well(report())
    assert report()["receivers"]["alive"] == 1
    tasks.stop()
    assert (redis.scard(receivers.NAMES_KEY), redis.keys(f"{receivers.KEY_PREFIX}*")) == (0, [])


def test_a_receiver_that_was_killed_is_missed_within_half_a_minute(report: AskHealth, redis: Redis) -> None:
    key = f"{receivers.KEY_PREFIX}receiver"
    redis.expire(key, receivers.FORGET_AFTER_S - 15)
    assert _is_well(report())
    redis.expire(key, receivers.FORGET_AFTER_S - 29)
    silent = report()
    assert _warning(silent, "no receiver is alive")
    seen = datetime.fromisoformat(silent["receivers"]["last_seen_at"])
    assert 28 <= (datetime.now(UTC) - seen).total_seconds() <= 45
    redis.delete(key)  # as it expires
    assert report()["receivers"] == {"alive": 0, "last_seen_at": None}
    assert redis.scard(receivers.NAMES_KEY) == 0


def test_a_heartbeat_registers_again_once_its_names_are_gone(report: AskHealth, redis: Redis) -> None:
    redis.flushdb()
    add_service(redis)
    assert report()["receivers"]["alive"] == 1
    redis.delete(receivers.NAMES_KEY)
    receivers.register(redis, "receiver")
    assert report()["receivers"]["alive"] == 1


def test_a_heartbeat_needs_no_memory(report: AskHealth, own_redis: RedisServer) -> None:
    with Redis.from_url(own_redis.url) as redis:
        receivers.beat(redis, "receiver")
        redis.expire(f"{receivers.KEY_PREFIX}receiver", receivers.FORGET_AFTER_S - 29)
        redis.config_set("maxmemory", 1)
        receivers.beat(redis, "receiver")
        full = report(redis_url=own_redis.url)
    assert "out of memory" in full["checks"]["redis"]["error"]
    assert full["receivers"]["alive"] == 1


def test_a_redis_that_was_emptied_is_reported_by_the_ledger(
    report: AskHealth, redis: Redis, connection: Admin
) -> None:
    received_at = now_ms()
    put(redis, delivery(received_at=received_at))
    assert _is_well(report())
    _record(connection)
    assert _is_well(report())
    redis.flushdb()
    add_service(redis)
    assert "what waited there is lost" in _warning(report(), "Redis was emptied")
    put(redis, delivery(received_at=received_at - 3_600_000))
    assert _warning(report(), "Redis was emptied"), "what came back is an old snapshot"
    put(redis, delivery(received_at=received_at + 1000))
    assert _is_well(report())


def test_a_redis_that_was_emptied_under_traffic_is_said_for_an_hour(
    report: AskHealth, redis: Redis, connection: Admin
) -> None:
    """The deliveries that come meanwhile end no warning, and prove that a receiver is alive."""
    _record(connection, ago="15 minutes")
    redis.flushdb()
    add_worker(redis)
    put(redis, delivery(received_at=now_ms()))
    report()  # or a receiver's heartbeat: since then Redis remembers
    assert redis.exists(WATCHING_SINCE_KEY)
    redis.set(WATCHING_SINCE_KEY, now_ms() + 900)  # which is "now" for nearly two seconds
    said = report()
    assert _warning(said, "lost data now: what waited there is lost")
    assert "no receiver" not in str(said["warnings"])
    receivers.beat(redis, "receiver")
    redis.set(WATCHING_SINCE_KEY, int((time.time() - 240) * 1000))
    assert _warning(report(), "lost data 4 min ago")
    redis.set(WATCHING_SINCE_KEY, int((time.time() - 3601) * 1000))
    assert _is_well(report())


def test_a_redis_that_lost_its_newest_data_is_said_under_traffic(
    report: AskHealth, redis: Redis, connection: Admin
) -> None:
    """An old snapshot was restored, or a replica that lagged became the primary: nobody else can tell."""
    _record(connection, ago="15 minutes")
    counts = Metrics()
    redis.set(WATCHING_SINCE_KEY, now_ms() - 86_400_000)
    _flush(counts, redis)
    snapshot = {key: redis.dump(key) or b"" for key in redis.scan_iter()}
    _flush(counts, redis)
    _flush(counts, redis)
    put(redis, delivery(received_at=now_ms()))
    assert _is_well(report())
    redis.flushdb()
    for key, value in snapshot.items():
        redis.restore(key, 0, value)
    _flush(counts, redis)
    add_service(redis)
    put(redis, delivery(received_at=now_ms()))
    assert _warning(report(), "lost data now: what waited there is lost")


def test_evicted_jobs_are_said_for_an_hour(report: AskHealth, redis: Redis, connection: Admin) -> None:
    _record(connection, ago="15 minutes")
    redis.set(WATCHING_SINCE_KEY, now_ms() - 86_400_000)
    lost, kept = (delivery(received_at=now_ms()) for _ in range(2))
    put(redis, lost)
    put(redis, kept)
    redis.delete(f"{JOB_PREFIX}{lost.svix_id}")
    assert _is_well(report())
    assert len(take(ReservedJobs(redis, "one"))) == 1
    assert _warning(report(), "lost data now: what waited there is lost")


@pytest.mark.parametrize("evicted", [f"{WORKER_PREFIX}one", WORKERS_KEY])
def test_a_worker_whose_keys_redis_evicted_is_alive(report: AskHealth, redis: Redis, evicted: str) -> None:
    """A policy such as volatile-ttl evicts the hash first, because it expires soon."""
    redis.delete(evicted)
    assert report()["workers"]["alive"] == 1


def test_two_receivers_with_different_clocks_are_no_loss_of_data(
    report: AskHealth, redis: Redis, connection: Admin
) -> None:
    """Each accepts deliveries: its clock is less than five minutes away from Svix's."""
    fast_ms, slow_ms = (int((time.time() + s) * 1000) for s in (290, -290))
    redis.set(WATCHING_SINCE_KEY, fast_ms)
    connection.execute(
        "INSERT INTO webhook_events (svix_id, type, clerk_id, received_at, outcome)"
        " SELECT 'msg_' || ms, 'user.created', 'user_1', to_timestamp(ms / 1000.0), 'applied'"
        " FROM unnest(%s) AS ms",
        ([fast_ms, slow_ms],),
    )
    put(redis, delivery(received_at=slow_ms))
    assert "Redis was emptied" not in str(report()["warnings"])


def test_what_only_the_database_shows_stays_in_the_metrics_while_it_is_away(
    report: AskHealth, redis: Redis
) -> None:
    """Otherwise the alert ends and fires again with each short outage of the database."""
    redis.set(CAUSES_KEY, json.dumps(["redis_lost_data"]))
    away = report(database_url="postgresql://x@127.0.0.1:1/x", database_url_unpooled=None)
    assert away["status"] == "failing"
    assert _kept(redis) == ["redis_lost_data"]
    assert _is_well(report())
    assert _kept(redis) == []


def test_a_part_of_the_console_that_does_not_answer_keeps_no_cause(
    redis: Redis, make_settings: MakeSettings
) -> None:
    """Else an alert would not end for as long as only the console is open, and its chart takes too long."""
    add_service(redis)
    redis.set(CAUSES_KEY, json.dumps(["redis_lost_data"]))
    status = Status(make_settings())
    status.report({**probes.ask(*status.probes), "activity": probes.ProbeResult({}, 2000.0, "no answer")})
    status.close()
    assert _kept(redis) == []


def _kept(redis: Redis) -> Any:
    return json.loads(cast("bytes", redis.get(CAUSES_KEY)))


def test_two_urls_that_lead_to_different_tables_are_said(
    report: AskHealth,
    database_url: str,
    database_url_unpooled: str,
    connection: psycopg.Connection,
    own_postgres: PostgresServer,
) -> None:
    same = database_url_unpooled + "?application_name=other"
    assert _is_well(report(database_url=database_url, database_url_unpooled=same))
    different = report(database_url=database_url, database_url_unpooled=own_postgres.url)
    assert "DATABASE_URL_UNPOOLED" in _warning(different, "lead to different tables")
    connection.execute("CREATE SCHEMA elsewhere")
    hidden = f"{database_url_unpooled}?options=-csearch_path%3Delsewhere"
    assert _warning(
        report(database_url=database_url, database_url_unpooled=hidden), "lead to different tables"
    )
    away = report(database_url=database_url, database_url_unpooled="postgresql://x@127.0.0.1:1/x")
    assert away["status"] == "ok"
    assert any("migrations cannot run" in warning for warning in away["warnings"])


def test_a_database_and_its_copy_are_two(make_settings: MakeSettings, database_url_unpooled: str) -> None:
    name = database_url_unpooled.rpartition("/")[2]
    copied = f"{name}_copy"
    url = with_database(database_url_unpooled, copied)
    with (
        psycopg.connect(with_database(url, "postgres"), autocommit=True) as admin,
        new_database(admin, copied, f"TEMPLATE {name}"),
    ):
        one, again = (Database(make_settings(database_url=database_url_unpooled)) for _ in range(2))
        copy = Database(make_settings(database_url=url, database_url_unpooled=url))
        assert leads_to_same_tables(one, again)
        assert not leads_to_same_tables(one, copy)
        for database in (one, again, copy):
            database.dispose()


def test_a_clock_that_is_more_than_a_minute_off_is_said(
    report: AskHealth, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _is_well(report())
    right = time.time
    monkeypatch.setattr("worker.monitoring.health.time.time", lambda: right() - 90)
    assert _warning(report(), "this machine's clock is 90 s behind the database's")
    monkeypatch.setattr("worker.monitoring.health.time.time", right)
    assert _is_well(report())

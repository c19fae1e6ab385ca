"""Real worker processes, and what befalls them."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pydantic import SecretStr
from redis import Redis
from redis.exceptions import RedisError
from rq.command import send_shutdown_command

import config
from cli.dev.servers import PostgresServer, RedisServer, free_port
from tests.support.databases import with_database
from tests.support.directories import open_directory
from tests.support.migrations import migrate
from tests.support.payloads import NOW, deleted_event, user, user_event
from tests.support.processes import clerk_sync
from tests.support.queue import RqView, delivery, frozen, rq_command
from tests.support.service_process import SOON_S, START_S, ServiceProcess
from tests.support.settings import NO_DATABASE, NOTHING_LISTENS, MakeSettings
from tests.support.stack import environment
from tests.support.waiting import wait_until, within
from worker import redis_client
from worker.queue.consumer import CONSUMERS_KEY, DEAD_AFTER_S, RESERVED_PREFIX
from worker.queue.lock_waits import lock_waits
from worker.queue.producer import WATCHING_SINCE_KEY, DeliveryQueue
from worker.queue.rq_format import FINISHED_KEY, JOB_PREFIX, RETRY_INTERVALS_S, SCHEDULED_KEY, WORKER_REPORT
from worker.runner.batch_worker import consumer_count

MARK = "marked.person"

Launch = Callable[..., "Worker"]


class Worker(ServiceProcess):
    """`clerk-sync worker`, in a process of its own, whose log is JSON."""

    def __init__(self, settings: config.Settings, directory: Path, name: str) -> None:
        env = environment(settings) | {"LOG_FORMAT": "json"}
        super().__init__(name, clerk_sync("worker"), env, directory)
        self.settings = settings

    def ready(self) -> "Worker":
        """Wait until it has started."""
        self.await_line("worker started", START_S)
        return self

    @property
    def own_name(self) -> str:
        """What it is called in Redis, once it has started."""
        return str(self.lines("worker started")[0]["worker"])


@pytest.fixture
def launch(make_settings: MakeSettings, server_directory: Path) -> Iterator[Launch]:
    """Start a worker; keywords are settings. Whatever the test does, none outlives it."""
    workers: list[Worker] = []

    def start(**overrides: Any) -> Worker:
        settings, name = make_settings(**overrides), f"worker-{len(workers)}"
        workers.append(Worker(settings, server_directory, name).start())
        return workers[-1]

    yield start
    for worker in workers:
        worker.kill()


def person(i: int, **fields: Any) -> Any:
    return user_event(data=user(f"user_{i}", first_name=f"name {i}", last_name=None, **fields))


def fill(queue: DeliveryQueue, numbers: range) -> list[str]:
    """Enqueue a user.created for each number and return the ids of the jobs."""
    given = [delivery(person(i)) for i in numbers]
    for one in given:
        queue.enqueue(one)
    return [one.svix_id for one in given]


def names(connection: psycopg.Connection[Any]) -> set[str]:
    return {name for (name,) in connection.execute("SELECT name FROM users")}


def await_users(connection: psycopg.Connection[Any], numbers: range, within: float = SOON_S) -> None:
    wanted = {f"name {i}" for i in numbers}
    wait_until(lambda: wanted <= names(connection), within, lambda: str(wanted - names(connection)))


def await_status(rq: RqView, ids: list[str], status: str, within: float = SOON_S) -> None:
    wait_until(lambda: {rq.status(id_) for id_ in ids} == {status}, within)


HOLD_UP = """
    CREATE TABLE hold_up (clerk_id text);
    CREATE FUNCTION hold_up() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
      WHILE EXISTS (SELECT FROM hold_up WHERE clerk_id = NEW.clerk_id) LOOP PERFORM pg_sleep(0.05); END LOOP;
      RETURN NEW;
    END $$;
    CREATE TRIGGER hold_up BEFORE INSERT ON user_sync FOR EACH ROW EXECUTE FUNCTION hold_up();
"""


@contextmanager
def held_up(connection: psycopg.Connection[Any], *clerk_ids: str) -> Iterator[None]:
    """Let a worker that applies something of these users hang, with its batch in hand, until the block ends.

    For up to 15 s, BATCH_LIMITS' statement_timeout. No lock is in the way: that would delay single jobs.
    """
    connection.execute(HOLD_UP)
    connection.cursor().executemany("INSERT INTO hold_up VALUES (%s)", [[id_] for id_ in clerk_ids])
    try:
        yield
    finally:
        connection.execute("DELETE FROM hold_up")


def reserved(rq: RqView, worker: Worker) -> list[str]:
    """Return what a worker's first thread has reserved, then what the others have."""
    parts: Any = [
        rq.redis.lrange(RESERVED_PREFIX + worker.own_name + part, 0, -1) for part in ("", ".2", ".3")
    ]
    return [id_.decode() for part in parts for id_ in part]


def assert_nothing_is_held(rq: RqView) -> None:
    assert list(rq.redis.scan_iter(f"{RESERVED_PREFIX}*")) == []
    assert rq.redis.zcard(CONSUMERS_KEY) == 0
    assert rq.ids("started") == []


# Work and its end


def test_what_is_queued_is_applied_and_finished(
    queue: DeliveryQueue, rq: RqView, connection: psycopg.Connection[Any], launch: Launch, redis_url: str
) -> None:
    ids = fill(queue, range(150))
    worker = launch().ready()
    await_users(connection, range(150))
    await_status(rq, ids, "finished")
    queue.enqueue(gone := delivery(deleted_event("user_7")))
    await_status(rq, [gone.svix_id], "finished")
    assert len(names(connection)) == 149
    (known,) = rq.workers()
    assert (known.name, known.pid, known.queue_names()) == (worker.own_name, worker.pid, ["clerk"])
    assert known.successful_job_count == 151
    assert "idle clerk" in rq_command(redis_url, "info", "--only-workers", "-S", "json")
    assert worker.stop(within=15) == 0
    assert worker.lines("worker stopped")
    assert_nothing_is_held(rq)
    assert rq.workers() == []


def test_sigterm_lets_it_finish_what_is_in_hand_and_take_no_more(
    queue: DeliveryQueue, rq: RqView, connection: psycopg.Connection[Any], launch: Launch
) -> None:
    ids = fill(queue, range(35))
    with held_up(connection, "user_3", "user_13", "user_23"):
        worker = launch(batch_size=10).ready()
        wait_until(lambda: set(reserved(rq, worker)) == set(ids[:30]), SOON_S)
        for _ in range(3):  # sending it again changes nothing
            os.kill(worker.living_pid, signal.SIGTERM)
            time.sleep(0.1)
        assert worker.running
    wait_until(lambda: not worker.running, SOON_S)
    assert worker.exit_status == 0
    assert names(connection) == {f"name {i}" for i in range(30)}
    assert [rq.places(id_) for id_ in ids] == [*[["finished"]] * 30, *[["queue"]] * 5]
    assert rq.queue.get_job_ids() == ids[30:]
    assert_nothing_is_held(rq)


def test_while_one_batch_waits_for_the_database_the_next_are_applied(
    queue: DeliveryQueue, rq: RqView, connection: psycopg.Connection[Any], launch: Launch
) -> None:
    ids = fill(queue, range(45))
    with held_up(connection, "user_3"):
        worker = launch(batch_size=10).ready()
        await_users(connection, range(10, 45))
        await_status(rq, ids[10:], "finished")
        wait_until(lambda: reserved(rq, worker) == ids[:10], SOON_S)
    await_users(connection, range(45))
    await_status(rq, ids, "finished")
    (known,) = rq.workers()
    assert known.successful_job_count == 45
    assert {rq.job(id_).worker_name for id_ in ids} == {worker.own_name}
    assert worker.stop() == 0
    assert_nothing_is_held(rq)


def test_one_that_cannot_finish_in_time_ends_all_the_same_and_loses_nothing(
    queue: DeliveryQueue, rq: RqView, connection: psycopg.Connection[Any], launch: Launch, redis: Redis
) -> None:
    ids = fill(queue, range(3))
    with held_up(connection, "user_1"):
        worker = launch(shutdown_seconds=1).ready()
        wait_until(lambda: reserved(rq, worker) == ids, SOON_S)
        assert worker.stop(within=12) == 1
    redis.zadd(CONSUMERS_KEY, {worker.own_name: time.time() - DEAD_AFTER_S - 1})
    launch()
    await_users(connection, range(3), START_S)
    await_status(rq, ids, "finished")


def test_a_row_that_the_application_locks_delays_its_delivery_alone_and_burns_no_retry(
    queue: DeliveryQueue, rq: RqView, connection: psycopg.Connection[Any], launch: Launch
) -> None:
    launch().ready()
    await_status(rq, fill(queue, range(60)), "finished", START_S)
    updates = [delivery(person(i, updated_at=NOW + 99, public_metadata={"role": "admin"})) for i in range(60)]
    ids = [one.svix_id for one in updates]
    with connection.transaction():
        connection.execute("SELECT FROM users WHERE clerk_id = 'user_7' FOR UPDATE")
        for one in updates:
            queue.enqueue(one)
        await_status(rq, [*ids[:7], *ids[8:]], "finished", 30)
        wait_until(lambda: lock_waits(rq.redis).jobs == 1, SOON_S)
        assert rq.places(ids[7]) in (["scheduled"], ["queue"], ["started", "reserved"])
    await_status(rq, [ids[7]], "finished", 30)
    assert rq.job(ids[7]).retries_left == len(RETRY_INTERVALS_S)
    wait_until(lambda: lock_waits(rq.redis).jobs == 0, SOON_S)


# Failures


def test_a_lost_race_is_retried_later_heals_then_or_fails(
    queue: DeliveryQueue, rq: RqView, connection: psycopg.Connection[Any], launch: Launch, redis: Redis
) -> None:
    connection.execute("ALTER TABLE users ADD CONSTRAINT one_name UNIQUE (name)")
    launch()
    await_status(rq, fill(queue, range(2)), "finished", START_S)
    twins = [user(f"user_twin_{i}", first_name=f"name {i}", last_name=None) for i in range(2)]
    hopeless, healing = given = [delivery(user_event(data=twin)).svix_id for twin in twins]
    for id_, twin in zip(given, twins, strict=True):
        queue.enqueue(delivery(user_event(data=twin), id_=id_))
    await_status(rq, given, "scheduled", 15)
    assert [rq.places(id_) for id_ in given] == [["scheduled"]] * 2
    assert {rq.job(id_).retries_left for id_ in given} == {len(RETRY_INTERVALS_S) - 1}
    due = float(str(redis.zscore(SCHEDULED_KEY, healing)))
    assert abs(due - time.time() - RETRY_INTERVALS_S[0]) < 5

    redis.hset(JOB_PREFIX + hopeless, "retries_left", 0)
    redis.zadd(SCHEDULED_KEY, {hopeless: time.time()})
    await_status(rq, [hopeless], "failed", 15)
    meta = rq.job(hopeless).meta
    assert meta["attempts"] == 2
    assert "UniqueViolation (SQLSTATE 23505, constraint one_name)" in meta["reason"]

    connection.execute("ALTER TABLE users DROP CONSTRAINT one_name")
    redis.zadd(SCHEDULED_KEY, {healing: time.time()})
    await_status(rq, [healing], "finished")
    assert (rq.ids("failed"), rq.ids("scheduled")) == ([hopeless], [])


# RQ's tools


def test_rq_suspend_stops_it_and_resume_lets_it_go_on(
    queue: DeliveryQueue, rq: RqView, connection: psycopg.Connection[Any], launch: Launch, redis_url: str
) -> None:
    rq_command(redis_url, "suspend")
    ids = fill(queue, range(5))
    launch().ready()
    time.sleep(1.5)
    assert (rq.queue.get_job_ids(), names(connection)) == (ids, set())
    rq_command(redis_url, "resume")
    await_users(connection, range(5))


def test_rqs_own_worker_does_our_jobs_with_the_same_effect(
    queue: DeliveryQueue,
    rq: RqView,
    connection: psycopg.Connection[Any],
    make_settings: MakeSettings,
    redis_url: str,
) -> None:
    ids = fill(queue, range(3))
    queue.enqueue(delivery(person(0), id_="msg_twice"))
    queue.enqueue(unreadable := delivery(user_event(data=user(None, f"{MARK}@example.com"))))
    options = ("--burst", "-w", "rq.worker.SimpleWorker", "-S", "json", "clerk")
    said = rq_command(redis_url, "worker", *options, environment=environment(make_settings()))
    assert names(connection) == {"name 0", "name 1", "name 2"}
    assert [rq.places(id_) for id_ in ids] == [["finished"]] * 3
    assert [rq.job(id_).return_value() for id_ in (*ids, "msg_twice")] == [*["applied"] * 3, "stale"]
    assert rq.places(unreadable.svix_id) == ["scheduled"], "RQ's worker retries whatever fails"
    recorded = connection.execute("SELECT svix_id FROM webhook_events").fetchall()
    assert sorted(id_ for (id_,) in recorded) == sorted([*ids, "msg_twice"])
    assert MARK not in said


# Servers that come and go


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A PostgreSQL that tests may stop; each finds it running."""
    with open_directory() as path:
        server = PostgresServer(path / "postgres", free_port(), durable=False)
        server.start()
        yield server
        server.stop("immediate")


@pytest.fixture
def own_database(server: PostgresServer, make_settings: MakeSettings, redis_url: str) -> Iterator[SecretStr]:
    name = f"test_{redis_url.rpartition('/')[2]}"
    with psycopg.connect(server.url, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}".encode())
    url = SecretStr(with_database(server.url, name))
    migrate(make_settings(database_url=url, database_url_unpooled=None))
    yield url
    if not server.running:
        server.start()
    with psycopg.connect(server.url, autocommit=True) as admin:
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


def report(redis: Redis, worker: Worker) -> Any:
    found: Any = redis.hget(f"rq:worker:{worker.own_name}", WORKER_REPORT)
    return json.loads(found or "{}")


def test_a_database_that_goes_and_comes_back_fails_no_job_and_burns_no_retry(
    queue: DeliveryQueue, rq: RqView, server: PostgresServer, own_database: SecretStr, launch: Launch
) -> None:
    worker = launch(database_url=own_database, database_url_unpooled=None, batch_size=10).ready()
    fill(queue, range(5))
    await_status(rq, fill(queue, range(5)), "finished")
    server.stop("immediate")
    ids = fill(queue, range(5, 40))
    reason = worker.await_line("waiting", START_S, what="database")["reason"]
    assert reason == NOTHING_LISTENS
    wait_until(lambda: report(rq.redis, worker).get("waiting_for") == "database", SOON_S)
    assert [rq.places(id_) for id_ in ids] == [["queue"]] * 35
    server.start()
    with psycopg.connect(own_database.get_secret_value(), autocommit=True) as connection:
        await_users(connection, range(40), 15)
    await_status(rq, ids, "finished")
    assert {rq.job(id_).retries_left for id_ in ids} == {len(RETRY_INTERVALS_S)}
    assert rq.ids("failed") == rq.ids("scheduled") == []
    assert worker.stop() == 0


def test_locks_that_run_out_make_batches_smaller_and_fail_no_job(
    queue: DeliveryQueue, rq: RqView, own_database: SecretStr, launch: Launch
) -> None:
    """The locks of all sessions share one table, whose size is the application's or platform's choice."""
    ids = fill(queue, range(400))
    lock = "SELECT {}(1, number) FROM generate_series(1, {}) AS number"
    with psycopg.connect(own_database.get_secret_value(), autocommit=True) as others:
        with pytest.raises(psycopg.errors.OutOfMemory):
            others.execute(lock.format("pg_advisory_lock", 1_000_000))
        others.execute(lock.format("pg_advisory_unlock", 120))
        worker = launch(database_url=own_database, database_url_unpooled=None).ready()
        await_status(rq, ids, "finished")
    assert "(SQLSTATE 53200)" in worker.lines("waiting")[0]["reason"]
    assert max(line["of"] for line in worker.lines("batch")) < 120
    assert {rq.job(id_).retries_left for id_ in ids} == {len(RETRY_INTERVALS_S)}


def test_a_redis_that_goes_and_comes_back_is_waited_for(
    own_redis: RedisServer, connection: psycopg.Connection[Any], launch: Launch
) -> None:
    worker = launch(redis_url=SecretStr(own_redis.url)).ready()
    with Redis.from_url(own_redis.url) as client, closing(DeliveryQueue(client)) as queue:
        rq = RqView(client)
        await_status(rq, fill(queue, range(3)), "finished")
        own_redis.stop()
        worker.await_line("waiting", START_S, what="Redis")
        own_redis.start()
        ids = fill(queue, range(3, 6))
        await_status(rq, ids, "finished", START_S)
        await_users(connection, range(6))
        wait_until(lambda: [known.name for known in rq.workers()] == [worker.own_name], SOON_S)
        wait_until(lambda: shut_down(client, worker), START_S)
    assert worker.exit_status == 0


def shut_down(client: Redis, worker: Worker) -> bool:
    """Send RQ's command to end; its channel comes back some time after Redis has."""
    if worker.running:
        send_shutdown_command(client, worker.own_name)
        time.sleep(0.5)
    return not worker.running


def test_a_redis_that_hangs_is_reported_after_one_time_out(
    own_redis: RedisServer, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_client, "PATIENCE_S", 1.0)
    with redis_client.worker_redis(make_settings(**NO_DATABASE, redis_url=own_redis.url)) as redis:
        redis.ping()
        with frozen(own_redis):
            for _ in ("an open connection", "a new one"):
                with within(2), pytest.raises(RedisError):
                    redis.ping()
        assert redis.ping()


def test_a_redis_that_dies_while_a_batch_is_held_loses_no_job(
    own_redis: RedisServer, connection: psycopg.Connection[Any], launch: Launch
) -> None:
    with Redis.from_url(own_redis.url) as client, closing(DeliveryQueue(client)) as queue:
        rq = RqView(client)
        ids = fill(queue, range(5))
        with held_up(connection, "user_0"):
            worker = launch(redis_url=SecretStr(own_redis.url)).ready()
            wait_until(lambda: reserved(rq, worker) == ids, SOON_S)
            own_redis.stop()
        await_users(connection, range(5))
        own_redis.start()
        await_status(rq, ids, "finished", START_S)
        assert [rq.places(id_) for id_ in ids] == [["finished"]] * 5
    assert worker.stop() == 0


def test_a_redis_that_has_forgotten_everything_knows_the_worker_again_soon(
    queue: DeliveryQueue, rq: RqView, connection: psycopg.Connection[Any], launch: Launch, redis: Redis
) -> None:
    worker = launch().ready()
    redis.flushdb()
    wait_until(lambda: [known.name for known in rq.workers()] == [worker.own_name], SOON_S)
    (known,) = rq.workers()
    assert (known.pid, known.queue_names()) == (worker.pid, ["clerk"])
    fill(queue, range(2))
    await_users(connection, range(2))


def test_a_redis_that_was_restored_while_no_worker_ran_is_named(
    launch: Launch, queue: DeliveryQueue, redis: Redis, rq: RqView
) -> None:
    """Everything was started again with an old snapshot: no process knows what Redis has confirmed."""
    redis.set(WATCHING_SINCE_KEY, 1)
    fill(queue, range(2))
    worker = launch().ready()
    wait_until(lambda: redis.zcard(FINISHED_KEY) == 2, SOON_S, worker.text)
    worker.stop()
    fill(queue, range(2, 4))
    second = launch().ready()
    wait_until(lambda: redis.zcard(FINISHED_KEY) == 4, SOON_S, second.text)
    second.stop()
    assert redis.get(WATCHING_SINCE_KEY) == b"1"
    redis.delete(FINISHED_KEY, *(JOB_PREFIX + id_ for id_ in rq.ids("finished")))
    fill(queue, range(4, 6))
    launch().await_line("Redis has lost data: it does not know the newest delivery applied")
    wait_until(lambda: redis.get(WATCHING_SINCE_KEY) != b"1", SOON_S)


def test_a_database_that_hangs_is_waited_for_and_does_not_keep_a_worker_from_ending(
    server: PostgresServer, own_database: SecretStr, launch: Launch
) -> None:
    with frozen(server):
        worker = launch(database_url=own_database, database_url_unpooled=None).ready()
        worker.await_line("waiting", START_S, what="database")
        assert worker.stop(within=15) == 0


@pytest.mark.parametrize(("pool_size", "max_overflow", "count"), [(1, 0, 2), (2, 0, 2), (2, 1, 3), (5, 5, 3)])
def test_there_are_as_many_consumer_threads_as_connections_within_limits(
    make_settings: MakeSettings, pool_size: int, max_overflow: int, count: int
) -> None:
    assert consumer_count(make_settings(db_pool_size=pool_size, db_max_overflow=max_overflow)) == count

"""The second consumer thread works during a backlog, and never goes idle with jobs reserved."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
from pydantic import SecretStr
from redis import Redis

import config
from cli.dev.servers import RedisServer, free_port
from db.connection.engine import Database
from db.connection.errors import DatabaseUnavailable
from tests.support.payloads import user, user_event
from tests.support.queue import RqView, enqueue
from tests.support.reserved_jobs import fill
from tests.support.settings import MakeSettings
from tests.support.waiting import wait_until
from worker.queue.consumer import MAX_BATCH_BYTES, Finished, ReservedJobs, Settled, TakenJob
from worker.queue.rq_format import SUSPENDED_KEY
from worker.redis_client import worker_redis
from worker.runner import consumer_loop
from worker.runner.consumer_loop import ConsumerThread, Process, SharedState
from worker.shutdown import StopSignal

SOON_S, START_S = 20.0, 30.0
BATCH = 2


class Helper(NamedTuple):
    """A consumer in a thread, and what steers it."""

    consumer: ConsumerThread
    backlog: threading.Event
    stopping: StopSignal
    thread: threading.Thread


@pytest.fixture
def settings(make_settings: MakeSettings, own_redis: RedisServer) -> config.Settings:
    return make_settings(redis_url=SecretStr(own_redis.url))


@pytest.fixture
def redis(settings: config.Settings) -> Iterator[Redis]:
    client = worker_redis(settings)
    yield client
    client.close()


@contextmanager
def helping(
    settings: config.Settings,
    redis: Redis,
    process: Process,
    *,
    batch_size: int = BATCH,
    run: Callable[[ConsumerThread], None] = ConsumerThread.run_helper,
    waiting_for: str | None = None,
) -> Iterator[Helper]:
    database = Database(settings)
    stopping, backlog = StopSignal(), threading.Event()
    consumer = ConsumerThread(
        ReservedJobs(redis, "w", ".2"), SharedState(process, batch_size, database, stopping, backlog)
    )
    consumer.waiting_for = waiting_for
    thread = threading.Thread(target=run, args=(consumer,), daemon=True)
    thread.start()
    try:
        yield Helper(consumer, backlog, stopping, thread)
        assert thread.is_alive(), "it ends only on a stop request"
    finally:
        stopping.request()
        thread.join(SOON_S)
        database.dispose()
    assert not thread.is_alive()


def finish(jobs: list[TakenJob]) -> list[Settled]:
    return [Finished(job, "applied") for job in jobs]


def finished(redis: Redis) -> int:
    return len(RqView(redis).ids("finished"))


def test_a_helper_sleeps_until_there_is_a_backlog(settings: config.Settings, redis: Redis) -> None:
    fill(redis, 1)
    with helping(settings, redis, finish) as helper:
        helper.thread.join(1)
        assert finished(redis) == 0
        helper.backlog.set()
        wait_until(lambda: finished(redis) == 1, SOON_S)
        wait_until(lambda: not helper.backlog.is_set(), SOON_S)


@pytest.mark.parametrize("count", [BATCH, BATCH + 1, 5 * BATCH])
def test_a_helper_settles_what_it_has_done_before_it_rests(
    settings: config.Settings, redis: Redis, count: int
) -> None:
    fill(redis, count)
    with helping(settings, redis, finish) as helper:
        helper.backlog.set()
        wait_until(lambda: finished(redis) == count, SOON_S)


def test_a_helper_settles_although_another_thread_says_that_the_backlog_is_gone(
    settings: config.Settings, redis: Redis
) -> None:
    def process(jobs: list[TakenJob]) -> list[Settled]:
        helper.backlog.clear()
        return finish(jobs)

    fill(redis, BATCH)
    with helping(settings, redis, process) as helper:
        helper.backlog.set()
        wait_until(lambda: finished(redis) == BATCH, SOON_S)


def test_a_batch_that_is_full_by_its_bytes_is_no_end_of_the_backlog(
    settings: config.Settings, redis: Redis
) -> None:
    large = user_event(data=user(public_metadata={"text": "x" * (MAX_BATCH_BYTES // 2)}))
    for _ in range(5):
        enqueue(redis, large)
    with helping(settings, redis, finish, batch_size=100) as helper:
        helper.backlog.set()
        wait_until(lambda: finished(redis) == 5, SOON_S)


def test_after_a_slow_batch_the_next_are_smaller_until_they_are_fast(
    settings: config.Settings, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer_loop, "SLOW_BATCH_S", 0.3)
    sizes: list[int] = []

    def process(jobs: list[TakenJob]) -> list[Settled]:
        sizes.append(len(jobs))
        if len(sizes) <= 2:
            time.sleep(0.4)
        return finish(jobs)

    fill(redis, 8 + 4 + 2 + 4 + 8 + 8)
    with helping(settings, redis, process, batch_size=8) as helper:
        helper.backlog.set()
        wait_until(lambda: sum(sizes) == 34, SOON_S)
    assert sizes == [8, 4, 2, 4, 8, 8]


@pytest.mark.parametrize("run", [ConsumerThread.run_primary, ConsumerThread.run_helper])
def test_batches_become_smaller_until_the_server_takes_them(
    settings: config.Settings, redis: Redis, run: Callable[[ConsumerThread], None]
) -> None:
    """As when the transaction lasts longer than PostgreSQL lets it: that looks like a lost connection."""
    sizes: list[int] = []

    def process(jobs: list[TakenJob]) -> list[Settled]:
        sizes.append(len(jobs))
        if len(jobs) > 1:
            raise DatabaseUnavailable("lost")
        return finish(jobs)

    def all_finished(helper: Helper) -> bool:
        helper.backlog.set()  # again: a helper rests after a failure
        return finished(redis) == 4

    fill(redis, 4)
    with helping(settings, redis, process, batch_size=4, run=run) as helper:
        wait_until(lambda: all_finished(helper), SOON_S)
    assert sizes[:3] == [4, 2, 1]


def test_while_the_database_is_away_a_helper_sleeps_with_no_job_reserved(
    settings: config.Settings, redis: Redis
) -> None:
    tried: list[int] = []

    def process(jobs: list[TakenJob]) -> list[Settled]:
        tried.append(len(jobs))
        raise DatabaseUnavailable("away")

    fill(redis, BATCH)
    with helping(settings, redis, process) as helper:
        helper.backlog.set()
        wait_until(lambda: tried and not helper.backlog.is_set(), SOON_S)
        helper.thread.join(1)
        assert tried == [BATCH]
        assert RqView(redis).queue.count == BATCH


def test_a_suspended_helper_rests_with_no_job_reserved(settings: config.Settings, redis: Redis) -> None:
    fill(redis, BATCH)
    ReservedJobs(redis, "w", ".2").settle_and_take([], BATCH)  # its answer is lost
    redis.set(SUSPENDED_KEY, 1)
    with helping(settings, redis, finish) as helper:
        helper.backlog.set()
        wait_until(lambda: RqView(redis).queue.count == BATCH, SOON_S)


def test_a_consumer_waits_for_no_server_any_more_although_no_job_comes(
    settings: config.Settings, redis: Redis
) -> None:
    run = ConsumerThread.run_primary
    with helping(settings, redis, finish, run=run, waiting_for="database") as helper:
        wait_until(lambda: helper.consumer.waiting_for is None, SOON_S)


@pytest.mark.parametrize(("before", "meanwhile"), [("database", "database"), ("Redis", None)])
def test_a_consumer_waits_for_the_database_until_a_batch_has_passed_and_for_redis_until_it_has_one(
    settings: config.Settings, redis: Redis, before: str, meanwhile: str | None
) -> None:
    """An attempt may take seconds, as with a locked table, and is no end of what it waits for."""
    said: list[str | None] = []
    is_known = threading.Event()

    def process(jobs: list[TakenJob]) -> list[Settled]:
        assert is_known.wait(SOON_S)
        said.append(helper.consumer.waiting_for)
        return finish(jobs)

    fill(redis, 1)
    run = ConsumerThread.run_primary
    with helping(settings, redis, process, run=run, waiting_for=before) as helper:
        is_known.set()
        wait_until(lambda: finished(redis) == 1, SOON_S)
    assert said == [meanwhile]
    assert helper.consumer.waiting_for is None


def test_a_redis_that_has_become_a_replica_is_left(
    settings: config.Settings, redis: Redis, own_redis: RedisServer
) -> None:
    fill(redis, BATCH)
    redis.close()  # the connections that were opened for that
    with Redis.from_url(own_redis.url) as instrument, helping(settings, redis, finish) as helper:
        instrument.ping()
        redis.ping()
        own = {client["id"] for client in instrument.client_list()}
        instrument.replicaof("127.0.0.1", free_port())
        helper.backlog.set()
        wait_until(lambda: len(own & {client["id"] for client in instrument.client_list()}) == 1, SOON_S)
        instrument.replicaof("NO", "ONE")
        wait_until(lambda: finished(redis) == BATCH, SOON_S)


def test_a_helper_survives_the_loss_of_both_servers_and_releases_its_jobs(
    settings: config.Settings, redis: Redis, own_redis: RedisServer
) -> None:
    tried: list[int] = []

    def process(jobs: list[TakenJob]) -> list[Settled]:
        tried.append(len(jobs))
        if len(tried) > 1:
            return finish(jobs)
        own_redis.stop()
        threading.Timer(0.5, come_back).start()
        raise DatabaseUnavailable("away")

    is_back = threading.Event()

    def come_back() -> None:
        own_redis.start()
        is_back.set()

    fill(redis, BATCH)
    with helping(settings, redis, process) as helper:
        helper.backlog.set()
        assert is_back.wait(START_S)
        wait_until(lambda: RqView(redis).queue.count == BATCH or finished(redis) == BATCH, SOON_S)

        def all_finished() -> bool:
            helper.backlog.set()  # again: the thread may have been about to clear it, having found nothing
            return finished(redis) == BATCH

        wait_until(all_finished, SOON_S)


@pytest.mark.parametrize(("jobs", "seconds"), [(1, 0.01), (10, 0.01), (50, 0.05), (399, 0.1)])
def test_the_time_to_the_next_take_grows_with_the_batch_within_limits(jobs: int, seconds: float) -> None:
    assert consumer_loop.pace_s(jobs) == seconds


def test_after_a_batch_that_was_not_full_the_next_take_waits_for_that_time(
    settings: config.Settings, redis: Redis
) -> None:
    batches: list[tuple[float, int]] = []

    def process(jobs: list[TakenJob]) -> list[Settled]:
        batches.append((time.monotonic(), len(jobs)))
        fill(redis, 1)
        return finish(jobs)

    fill(redis, 80)
    with helping(settings, redis, process, batch_size=100, run=ConsumerThread.run_primary):
        wait_until(lambda: len(batches) > 1, START_S)
    (first, size), (second, _), *_ = batches
    assert size == 80
    assert second - first >= 0.04

"""What an idle service costs: commands to Redis, and connections to PostgreSQL."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psycopg
import pytest
from redis import Redis

from cli.dev.servers import RedisServer, free_port
from db.connection.engine import Database
from tests.support.queue import RqView, commands, enqueue
from tests.support.settings import MakeSettings
from tests.support.stack import Stack
from tests.support.waiting import wait_until
from worker.monitoring.receivers import BEAT_EVERY_S
from worker.queue.maintenance import QueueMaintenance
from worker.runner import batch_worker
from worker.runner.consumer_loop import WAIT_S
from worker.shutdown import StopSignal

BEATS = 3  # of the worker, in some thirty seconds: from one beat to another nothing counts by chance
COMMANDS_A_MINUTE = 60
START_S = 30.0


def await_beats(redis: Redis, count: int) -> None:
    """Count anew, and wait until the worker's heartbeat has run so often; nothing else is a script."""
    redis.config_resetstat()
    wait_until(lambda: commands(redis).get("evalsha", 0) == count, 20 * count)
    time.sleep(0.5)  # the rest of it


def test_an_idle_minute_of_web_and_worker_is_at_most_sixty_commands(
    make_settings: MakeSettings, own_redis: RedisServer, tmp_path: Path
) -> None:
    settings = make_settings(port=free_port(), web_workers=2, redis_url=own_redis.url)
    with Redis.from_url(own_redis.url) as redis, Stack(settings, tmp_path, workers=1) as stack:
        wait_until(lambda: len(RqView(redis).workers()) == 1, START_S, stack.logs)
        time.sleep(5)  # what each does once at its start is done
        await_beats(redis, 1)
        began = time.monotonic()
        await_beats(redis, BEATS)
        took_s = time.monotonic() - began
        idle = commands(redis)
        redis.config_resetstat()
        QueueMaintenance(RqView(redis).queue).run()  # once a minute, and not within that time
        maintenance = commands(redis)
    # In half a minute one of these comes more or less by chance: a wait, and what renews an expiry.
    hash_every_s: float = batch_worker.WORKER_HASH_EVERY_S
    periods_s = {"blmove": [float(WAIT_S)], "expire": [BEAT_EVERY_S, BEAT_EVERY_S, hash_every_s]}
    total = float(sum(maintenance.values()))
    for name, periods in periods_s.items():
        assert idle.pop(name) <= sum(took_s / period_s + 1 for period_s in periods), name
        total += sum(60 / period_s for period_s in periods)
    total += sum(idle.values()) * 60 / took_s
    assert total <= COMMANDS_A_MINUTE, (idle, maintenance)


def test_an_idle_worker_opens_no_connection_to_the_database(
    make_settings: MakeSettings,
    redis: Redis,
    database: Database,
    connection: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pruning, which needs a connection, is due all the time here."""
    monkeypatch.setattr(batch_worker, "PRUNE_EVERY_S", 0.1)
    stopping = StopSignal()
    worker = batch_worker.BatchWorker(make_settings(), redis, database, stopping)
    with ThreadPoolExecutor(1) as thread:
        working = thread.submit(worker.work)
        wait_until(lambda: len(RqView(redis).workers()) == 1, START_S)
        time.sleep(2)
        before = sessions(connection)
        time.sleep(3)
        assert sessions(connection) == before
        enqueue(redis)
        wait_until(lambda: len(RqView(redis).ids("finished")) == 1, START_S)
        stopping.request()
        assert working.result(START_S) is True


def sessions(connection: psycopg.Connection[Any]) -> int:
    row = connection.execute(
        "SELECT sessions FROM pg_stat_database WHERE datname = current_database()"
    ).fetchone()
    assert row
    return int(row[0])

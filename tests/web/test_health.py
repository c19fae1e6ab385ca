import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import psycopg
import pytest
from flask.testing import FlaskClient
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from cli.dev.servers import PostgresServer, RedisServer
from tests.support.deliveries import PATH, MakeClient, signed
from tests.support.payloads import body, user_event
from tests.support.queue import frozen
from tests.support.settings import MakeSettings
from web.app import create_app
from worker.monitoring import probes
from worker.monitoring.probes import LIMIT_S


@pytest.mark.parametrize("damage", [("CONFIG", "SET", "maxmemory", "1"), ("REPLICAOF", "127.0.0.1", "1")])
def test_while_deliveries_are_refused_no_page_says_that_all_is_well(
    make_client: MakeClient, own_redis: RedisServer, damage: tuple[str, ...]
) -> None:
    client = make_client(redis_url=own_redis.url)
    first, second = body(user_event()), body(user_event())
    assert client.post(PATH, data=first, headers=signed(first)).status_code == 202
    with Redis.from_url(own_redis.url) as redis:
        redis.execute_command(*damage)
    assert client.post(PATH, data=second, headers=signed(second)).status_code == 503
    ready, health = client.get("/health/ready"), client.get("/health")
    assert (ready.status_code, health.status_code) == (503, 503)
    assert ready.json
    assert health.json
    assert health.json["checks"]["redis"]["error"].startswith(ready.json["error"])
    assert health.json["queue"]["depth"] == 1
    shown = {
        sample.name: sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
    }
    assert (shown["clerk_sync_redis_takes_writes"], shown["clerk_sync_queue_depth"]) == (0, 1)


def test_with_both_servers_frozen_health_answers_in_time(
    make_settings: MakeSettings,
    own_redis: RedisServer,
    own_postgres: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probes, "LIMIT_S", 1)
    settings = make_settings(
        redis_url=own_redis.url, database_url=own_postgres.url, database_url_unpooled=None
    )
    known, fresh = (create_app(settings).test_client() for _ in range(2))
    assert _errors(known)["database"] is None, "it has connections from now on"
    with frozen(own_redis), frozen_wholly(own_postgres):
        for client in (known, fresh):
            began = time.monotonic()
            assert None not in _errors(client).values()
            assert time.monotonic() - began < 2 * LIMIT_S


def _errors(client: FlaskClient) -> dict[str, str | None]:
    answer = client.get("/health")
    assert answer.status_code == 503  # also before: that database is not migrated
    assert answer.json
    return {name: check["error"] for name, check in answer.json["checks"].items()}


@contextmanager
def frozen_wholly(postgres: PostgresServer) -> Iterator[None]:
    """Let PostgreSQL hang with the processes that serve its connections: they would go on without it."""
    with psycopg.connect(postgres.url) as connection:
        serving = [pid for (pid,) in connection.execute("SELECT pid FROM pg_stat_activity").fetchall()]
        with frozen(postgres):
            for pid in serving:
                os.kill(pid, signal.SIGSTOP)
            try:
                yield
            finally:
                for pid in serving:
                    os.kill(pid, signal.SIGCONT)


@pytest.mark.usefixtures("patient_receiver")
def test_a_flood_of_readiness_asks_redis_once_at_a_time_and_takes_no_delivery_its_connection(
    make_client: MakeClient, own_redis: RedisServer
) -> None:
    client = make_client(redis_url=own_redis.url)
    assert client.get("/health/ready").status_code == 200
    content = body(user_event())
    with ThreadPoolExecutor(100) as threads, Redis.from_url(own_redis.url) as redis:
        flood = [threads.submit(lambda: client.get("/health/ready").status_code) for _ in range(600)]
        delivered = client.post(PATH, data=content, headers=signed(content)).status_code
        assert {answer.result() for answer in flood} == {200}
        assert delivered == 202
        assert int(redis.info("clients")["connected_clients"]) <= 5  # this one, and few for health


def test_while_redis_hangs_all_callers_of_readiness_wait_for_one_probe(
    make_client: MakeClient, own_redis: RedisServer
) -> None:
    client = make_client(redis_url=own_redis.url)
    assert client.get("/health/ready").status_code == 200
    with frozen(own_redis), ThreadPoolExecutor(100) as threads:
        began = time.monotonic()
        flood = [threads.submit(lambda: client.get("/health/ready").status_code) for _ in range(100)]
        assert {answer.result() for answer in flood} == {503}
        assert time.monotonic() - began < 8

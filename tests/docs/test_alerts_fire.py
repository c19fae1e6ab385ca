"""Each alert rule, fired once by what it is there for: a real Prometheus scrapes a real stack."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import yaml
from redis import Redis

import config
from cli.dev.process import Process
from cli.dev.servers import ENVIRONMENT, RedisServer, free_port
from db.times import now_ms
from tests.support import http
from tests.support.deliveries import signed
from tests.support.fake_clerk import FakeClerk
from tests.support.payloads import body, svix_id, user, user_event
from tests.support.service import add_worker
from tests.support.settings import MakeSettings
from tests.support.stack import Stack
from tests.support.waiting import wait_until
from worker.monitoring import receivers
from worker.monitoring.redis_stats import CAUSES_KEY
from worker.queue import lock_waits
from worker.queue.producer import LAST_RECEIVED_KEY, WATCHING_SINCE_KEY, Delivery, delivery_queue
from worker.queue.rq_format import JOB_PREFIX, WORKER_PREFIX

ALERTS = Path(__file__).parents[2] / "docs" / "alerts.yml"
PATIENCE_S = 60
OLD_MS = 7_200_000
OURS = user_event()["instance_id"]

pytestmark = [
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
    pytest.mark.timeout(600),
]


class Prometheus:
    """A real one that scrapes one target every second, with the rules as they are but for their patience."""

    def __init__(self, directory: Path, target: str) -> None:
        self.port = free_port()
        self.fired: set[str] = set()
        rules = yaml.safe_load(ALERTS.read_text())
        for rule in rules["groups"][0]["rules"]:
            rule.pop("for", None)
        (directory / "rules.yml").write_text(yaml.safe_dump(rules))
        settings = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["rules.yml"],
            "scrape_configs": [{"job_name": "clerk-sync", "static_configs": [{"targets": [target]}]}],
        }
        (directory / "prometheus.yml").write_text(yaml.safe_dump(settings))
        self._process = Process("prometheus", directory / "prometheus.pid")
        binary = shutil.which("prometheus")
        assert binary
        self._process.launch(
            [
                binary,
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{self.port}",
                "--log.level=warn",
            ],
            env=ENVIRONMENT,
            cwd=directory,
            log=directory / "prometheus.log",
        )

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire now."""
        try:
            answer: Any = http.get(f"http://127.0.0.1:{self.port}/api/v1/alerts").json()
        except httpx.TransportError:
            return set()
        now = {a["labels"]["alertname"] for a in answer["data"]["alerts"] if a["state"] == "firing"}
        self.fired |= now
        return now

    def await_alert(self, name: str) -> None:
        """Wait until that alert fires."""
        wait_until(lambda: name in self.firing(), PATIENCE_S, lambda: f"{name} does not fire: {self.fired}")

    def await_quiet(self, name: str) -> None:
        """Wait until that alert does not fire any more."""
        wait_until(lambda: name not in self.firing(), PATIENCE_S, lambda: f"{name} goes on firing")

    def ask(self, expression: str) -> list[Any]:
        """Return the result of a query."""
        answer: Any = http.get(
            f"http://127.0.0.1:{self.port}/api/v1/query", params={"query": expression}
        ).json()
        result: list[Any] = answer["data"]["result"]
        return result

    def stop(self) -> None:
        self._process.end()


def test_every_alert_fires_for_what_it_is_there_for(
    make_settings: MakeSettings,
    own_redis: RedisServer,
    clerk: FakeClerk,
    connection: psycopg.Connection,
    tmp_path: Path,
) -> None:
    settings = make_settings(
        redis_url=own_redis.url,
        port=free_port(),
        web_workers=1,
        db_pool_size=1,
        db_max_overflow=0,
        db_pool_timeout=0.3,
        clerk_secret_key=clerk.key,
        clerk_api_url=clerk.url,
        reconcile_every="5s",
        clerk_instance_id=OURS,
    )
    clerk.instance_id = OURS
    with Stack(settings, tmp_path) as stack:
        prometheus = Prometheus(tmp_path, f"127.0.0.1:{settings.port}")
        try:
            wait_until(lambda: _knows(prometheus), PATIENCE_S)
            wait_until(
                lambda: prometheus.firing() == set(),
                PATIENCE_S,
                lambda: f"alerts fire with no reason: {prometheus.firing()}",
            )
            prometheus.fired.clear()
            _hear_nothing(prometheus, own_redis)
            _forge(stack, prometheus)
            _ignore(stack, prometheus)
            _degrade(stack, prometheus, own_redis)
            _fail(stack, prometheus)
            _drift(stack, prometheus, clerk)
            _exhaust(stack, prometheus, connection)
            _lag(settings, stack, prometheus)
            _fill_redis(prometheus, own_redis)
            _lose_redis(stack, prometheus, own_redis)
            stack.web.end()
            prometheus.await_alert("ClerkSyncNotScraped")
        finally:
            prometheus.stop()
    assert prometheus.fired == {r["alert"] for r in yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]}


def _knows(prometheus: Prometheus) -> bool:
    try:
        ready = http.get(f"http://127.0.0.1:{prometheus.port}/-/ready").is_success
    except httpx.TransportError:
        return False
    return ready and len(prometheus.ask("clerk_sync_redis_up == 1")) == 1


def _send(stack: Stack, content: bytes, headers: dict[str, str] | None = None) -> int:
    answer = http.post(stack.url, content=content, headers=headers or signed(content), timeout=15)
    return answer.status_code


def _hear_nothing(prometheus: Prometheus, redis: RedisServer) -> None:
    """Let nothing ever have come, for two hours."""
    with Redis.from_url(redis.url) as client:
        client.set(WATCHING_SINCE_KEY, now_ms() - OLD_MS)
        prometheus.await_alert("ClerkSyncSilence")
        client.delete(WATCHING_SINCE_KEY)
    prometheus.await_quiet("ClerkSyncSilence")
    prometheus.fired.clear()


def _forge(stack: Stack, prometheus: Prometheus) -> None:
    for _ in range(8):
        content = body(user_event())
        assert _send(stack, content + b" ", signed(content)) == 400
    prometheus.await_alert("ClerkSyncSignaturesRejected")


def _ignore(stack: Stack, prometheus: Prometheus) -> None:
    assert _send(stack, body(user_event() | {"instance_id": "ins_theirs"})) == 200
    prometheus.await_alert("ClerkSyncForeignInstance")


def _waiting(stack: Stack) -> str:
    """Return the id of a job that waits, for longer than this test lasts."""
    assert stack.settings.redis_url
    with Redis.from_url(stack.settings.redis_url.get_secret_value()) as client:
        client.hset(f"{JOB_PREFIX}waiting", "status", "scheduled")
    return "waiting"


def _degrade(stack: Stack, prometheus: Prometheus, redis: RedisServer) -> None:
    """Let there be what health finds, a worker that is stuck, and no heartbeat of the receiver."""
    with Redis.from_url(redis.url) as client:
        causes = ["redis_lost_data", "two_databases", "clock", "second_instance", "retries", "suspended"]
        client.set(CAUSES_KEY, json.dumps(causes))
        client.zadd(lock_waits.KEY, {_waiting(stack): time.time() - 60})
        alerts = ("RowLocked", "RedisLostData", "TwoDatabases", "Clock", "SecondInstance", "RefusedAgain")
        for name in (*alerts, "Suspended"):
            prometheus.await_alert(f"ClerkSync{name}")
        wait_until(lambda: _stick(client) and "ClerkSyncBatchStuck" in prometheus.firing(), PATIENCE_S)
        client.delete(CAUSES_KEY, lock_waits.KEY, f"{WORKER_PREFIX}stuck")
        wait_until(
            lambda: _forget_receivers(client) and "ClerkSyncNoReceiver" in prometheus.firing(), PATIENCE_S
        )
        prometheus.await_quiet("ClerkSyncBatchStuck")


def _stick(client: Redis) -> bool:
    """Let a worker that has a batch in hand be alive."""
    add_worker(client, "stuck", in_hand_s=60)
    return True


def _forget_receivers(client: Redis) -> bool:
    client.delete(receivers.NAMES_KEY, *client.keys(f"{receivers.KEY_PREFIX}*"), LAST_RECEIVED_KEY)
    return True


def _fail(stack: Stack, prometheus: Prometheus) -> None:
    assert _send(stack, body(user_event(data={"id": 3}))) == 202
    prometheus.await_alert("ClerkSyncFailedJobs")


def _drift(stack: Stack, prometheus: Prometheus, clerk: FakeClerk) -> None:
    """Let a user be here who is not in Clerk, and then the key be wrong."""
    assert _send(stack, body(user_event(data=user("user_ghost")))) == 202
    prometheus.await_alert("ClerkSyncDrift")
    key, clerk.key = clerk.key, "sk_live_another"
    prometheus.await_alert("ClerkSyncReconciliationFails")
    clerk.key = key
    prometheus.await_quiet("ClerkSyncReconciliationFails")


def _exhaust(stack: Stack, prometheus: Prometheus, connection: psycopg.Connection) -> None:
    """Hold a lock that the worker's pruning waits for, with the only connection of its pool."""
    stack.workers[0].end()
    prometheus.await_alert("ClerkSyncNoWorker")
    with connection.transaction():
        connection.execute("LOCK TABLE webhook_events IN SHARE ROW EXCLUSIVE MODE")
        stack.workers[0].start()
        stack.await_ready()
        wait_until(lambda: _blocked(connection), PATIENCE_S)
        assert _send(stack, body(user_event())) == 202
        prometheus.await_alert("ClerkSyncPoolExhausted")
        prometheus.await_alert("ClerkSyncWorkersWait")
    prometheus.await_quiet("ClerkSyncWorkersWait")


def _blocked(connection: psycopg.Connection) -> bool:
    row = connection.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone()
    return row is not None and row[0] > 0


def _lag(settings: config.Settings, stack: Stack, prometheus: Prometheus) -> None:
    """Let deliveries of two hours ago wait, then be applied."""
    stack.workers[0].end()
    queue = delivery_queue(settings)
    then = now_ms() - OLD_MS
    for i in range(40):
        event = body(user_event(data=user(f"user_{i}"))).decode()
        queue.enqueue(Delivery(svix_id(), event, f"user.created user_{i}", then))
    queue.close()
    prometheus.await_alert("ClerkSyncLag")
    prometheus.await_alert("ClerkSyncSilence")
    stack.workers[0].start()
    prometheus.await_alert("ClerkSyncSlow")
    prometheus.await_quiet("ClerkSyncLag")


def _fill_redis(prometheus: Prometheus, redis: RedisServer) -> None:
    with Redis.from_url(redis.url) as client:
        client.config_set("maxmemory", 1)
        prometheus.await_alert("ClerkSyncRedisRefusesWrites")
        client.config_set("maxmemory", 0)
    prometheus.await_quiet("ClerkSyncRedisRefusesWrites")


def _lose_redis(stack: Stack, prometheus: Prometheus, redis: RedisServer) -> None:
    redis.stop()
    prometheus.await_alert("ClerkSyncRedisDown")
    assert _send(stack, body(user_event())) == 503
    redis.start()
    prometheus.await_alert("ClerkSyncDeliveriesRefused")
    prometheus.await_quiet("ClerkSyncRedisDown")

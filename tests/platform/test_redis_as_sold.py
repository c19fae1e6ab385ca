"""Redis as platforms sell it: few connections, certificates of their own, commands that are forbidden."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis

import config
from cli.dev.servers import HOST, free_port
from tests.support import commands, http
from tests.support.certificates import Authority
from tests.support.deliveries import genuine, signed
from tests.support.queue import delivery
from tests.support.redis_servers import BINARY, redis_server
from tests.support.settings import NO_DATABASE, MakeSettings
from tests.support.stack import Stack
from tests.support.waiting import wait_until, within
from worker.monitoring import probes
from worker.queue.producer import EnqueueResult, delivery_queue
from worker.redis_client import IDLE_S, QueueUnavailable, fail_fast_redis, worker_redis

pytestmark = pytest.mark.skipif(BINARY is None, reason="redis-server is not installed")

SMALL_PLAN = 20  # connections


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "certificates")


def test_a_small_plan_takes_every_delivery_of_a_burst_and_answers_afterwards(
    make_settings: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two receivers' processes, a worker and commands share 20 connections; idle ones are given back."""
    monkeypatch.setattr(probes, "LIMIT_S", 20)  # of `status`: the machine may be busy
    with redis_server(tmp_path, "--maxclients", str(SMALL_PLAN)) as port:
        settings = make_settings(redis_url=f"redis://{HOST}:{port}", port=free_port(), web_workers=2)
        with Stack(settings, tmp_path) as stack:
            with ThreadPoolExecutor(30) as threads:
                statuses = list(threads.map(lambda _: _deliver(stack.url), range(90)))
            health = _health(stack.base_url)
            shown = [commands.run(settings, *words) for words in (("status",), ("failed", "list"))]
            assert statuses == [202] * 90, stack.logs()
            assert health.status_code == 200, health.text
            assert [done.returncode for done in shown] == [0, 0], shown
            wait_until(lambda: _clients(port) <= SMALL_PLAN / 2, 4 * IDLE_S)


@pytest.mark.usefixtures("patient_receiver")
def test_too_many_connections_of_ours_cost_no_delivery(make_settings: MakeSettings, tmp_path: Path) -> None:
    """More connections are allowed here than Redis gives: deliveries wait for one that is open."""
    with redis_server(tmp_path, "--maxclients", "5") as port:
        queue = delivery_queue(_settings(make_settings, port, redis_max_connections=50))
        with ThreadPoolExecutor(30) as threads:
            answers = list(threads.map(lambda _: queue.enqueue(delivery()), range(90)))
        assert answers == [EnqueueResult.QUEUED] * 90
        queue.close()


def test_a_receiver_that_takes_deliveries_is_ready_while_redis_accepts_no_more_clients(
    make_settings: MakeSettings, tmp_path: Path
) -> None:
    """Otherwise the load balancer would take it out, and no delivery would arrive."""
    with redis_server(tmp_path) as port, Redis(port=port) as other:
        queue = delivery_queue(_settings(make_settings, port))
        queue.enqueue(delivery())
        other.config_set("maxclients", 2)
        queue.ping()
        queue.close()
        other.config_set("maxclients", 1)
        with pytest.raises(QueueUnavailable, match="too many connections"), within(probes.LIMIT_S):
            queue.ping()
        other.config_set("maxclients", 10)
        queue.ping()
        queue.close()


@pytest.mark.usefixtures("patient_receiver")
def test_a_process_opens_no_more_connections_than_it_may(make_settings: MakeSettings, tmp_path: Path) -> None:
    with redis_server(tmp_path) as port:
        settings = _settings(make_settings, port, redis_max_connections=6)
        queue, other = delivery_queue(settings), [fail_fast_redis(settings) for _ in range(5)]
        with ThreadPoolExecutor(60) as threads:
            pings = threads.map(lambda one: one.ping(), other * 20)
            answers = list(threads.map(lambda _: queue.enqueue(delivery()), range(100)))
        assert all(pings)
        assert answers == [EnqueueResult.QUEUED] * 100
        assert 2 <= _clients(port) - 1 <= 6
        queue.close()
        other[0].connection_pool.disconnect()


def test_connections_that_are_not_used_are_closed(
    make_settings: MakeSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.redis_client.IDLE_S", 0.2)
    with redis_server(tmp_path, "--set-proc-title", "no") as port:
        settings = _settings(make_settings, port)
        queue, other = delivery_queue(settings), fail_fast_redis(settings)
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda _: (queue.enqueue(delivery()), other.ping()), range(50)))
        wait_until(lambda: _clients(port) == 1, 20)
        assert queue.enqueue(delivery()) == EnqueueResult.QUEUED


def test_a_socket_on_the_same_machine_is_taken(make_settings: MakeSettings, tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    with redis_server(tmp_path, "--unixsocket", str(path)):
        _assert_served(make_settings(**NO_DATABASE, redis_url=f"unix://{path}"))


def test_a_certificate_of_its_own_authority_is_taken_with_the_authoritys_file(
    make_settings: MakeSettings, authority: Authority, tmp_path: Path
) -> None:
    with redis_server(tmp_path, certificate=authority.sign("redis")) as port:
        _assert_served(_settings(make_settings, port, "rediss", redis_ssl_ca_certs=str(authority.ca)))


@pytest.mark.parametrize("addresses", ["IP:127.0.0.1", "DNS:another.example"])
def test_without_a_check_any_certificate_is_taken(
    make_settings: MakeSettings, authority: Authority, tmp_path: Path, addresses: str
) -> None:
    with redis_server(tmp_path, certificate=authority.sign("redis", addresses)) as port:
        _assert_served(_settings(make_settings, port, "rediss", redis_ssl_cert_reqs="none"))


@pytest.mark.parametrize(
    ("given", "addresses", "words"),
    [
        ({}, "IP:127.0.0.1", "not trusted: name its CA's file in REDIS_SSL_CA_CERTS"),
        ({"redis_ssl_cert_reqs": "required"}, "IP:127.0.0.1", "or set REDIS_SSL_CERT_REQS=none"),
        ({"redis_ssl_ca_certs": "{ca}"}, "DNS:another.example", "for another host name"),
    ],
)
def test_a_certificate_that_is_not_trusted_is_named_wherever_it_is_met(
    make_settings: MakeSettings, tmp_path: Path, given: dict[str, str], addresses: str, words: str
) -> None:
    authority = Authority(tmp_path / "certificates")
    given = {name: value.format(ca=authority.ca) for name, value in given.items()}
    with redis_server(tmp_path, certificate=authority.sign("redis", addresses)) as port:
        settings = _settings(make_settings, port, "rediss", **given)
        _assert_refused(settings, words)
        done = commands.run(settings.model_copy(update={"database_url": None}), "failed", "list")
        assert words in done.stderr
        assert done.returncode == 1


def test_a_file_of_certificates_that_cannot_serve_ends_the_start(tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.write_text("no certificate")
    for path, words in ((empty, "PEM format"), (tmp_path / "missing.pem", "can be read")):
        with pytest.raises(config.SettingsError, match=f"^REDIS_SSL_CA_CERTS must name a file .*{words}"):
            config.load(_env_file=None, redis_ssl_ca_certs=str(path))


READINESS = [
    (["--rename-command", "HELLO", ""], "Redis does not know HELLO"),
    (["--rename-command", "EVAL", "", "--rename-command", "EVALSHA", ""], "Redis does not know EVALSHA"),
    (["--rename-command", "LMOVE", ""], "use Redis 6.2 or newer"),
    (["--cluster-enabled", "yes"], "Redis runs in cluster mode"),
    (["--replicaof", f"{HOST} 1", "--replica-serve-stale-data", "yes"], "read-only replica"),
    (["--maxmemory", "1"], "Redis is out of memory"),
]


@pytest.mark.parametrize(("options", "words"), READINESS)
def test_readiness_names_a_redis_that_takes_no_delivery(
    make_settings: MakeSettings, tmp_path: Path, options: list[str], words: str
) -> None:
    with redis_server(tmp_path, *options) as port:
        _assert_refused(_settings(make_settings, port), words)


def test_readiness_names_a_user_who_may_not_run_scripts(make_settings: MakeSettings, tmp_path: Path) -> None:
    with redis_server(tmp_path) as port:
        with Redis(port=port) as redis:
            redis.execute_command("ACL", "SETUSER", "plain", "on", ">pw", "~*", "&*", "+@all", "-@scripting")
        _assert_refused(_settings(make_settings, port, user="plain:pw@"), "may not run EVALSHA")


def test_a_probe_stores_the_time_of_the_first_only(make_settings: MakeSettings, redis_url: str) -> None:
    queue = delivery_queue(make_settings(**NO_DATABASE))
    queue.ping()
    with Redis.from_url(redis_url) as redis:
        first = {key: redis.get(key) for key in redis.keys("*")}
        time.sleep(0.01)
        queue.ping()
        assert {key: redis.get(key) for key in redis.keys("*")} == first
        assert len(first) == 1
    queue.close()


def _settings(
    make_settings: MakeSettings, port: int, scheme: str = "redis", user: str = "", **given: Any
) -> config.Settings:
    return make_settings(**NO_DATABASE, redis_url=f"{scheme}://{user}{HOST}:{port}", **given)


def _assert_refused(settings: config.Settings, words: str) -> None:
    queue = delivery_queue(settings)
    with pytest.raises(QueueUnavailable, match=words):
        queue.ping()
    queue.close()


def _assert_served(settings: config.Settings) -> None:
    queue = delivery_queue(settings)
    queue.ping()
    assert queue.enqueue(delivery()) == EnqueueResult.QUEUED
    queue.close()
    with worker_redis(settings) as patient:
        assert patient.ping()
    assert fail_fast_redis(settings).ping()


def _deliver(url: str) -> int:
    content = genuine()
    return http.post(url, content=content, headers=signed(content), timeout=20).status_code


def _health(base_url: str) -> httpx.Response:
    """Return what health says as soon as no part of it was too slow: the machine may be busy."""
    for _ in range(5):
        answer = http.get(f"{base_url}/health", timeout=10)
        if "no answer" not in answer.text:
            break
    return answer


def _clients(port: int) -> int:
    with Redis(port=port) as redis:
        return len(redis.client_list())

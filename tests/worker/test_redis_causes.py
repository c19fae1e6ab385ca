"""Causes of trouble with Redis, produced on a real server, and the words for them.

The others are in test_status_names_the_cause.
"""

import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.exceptions import RedisError

from cli.dev.servers import RedisServer, free_port, port_in_use
from config import Settings
from tests.support.certificates import self_signed
from tests.support.queue import frozen
from tests.support.redis_servers import BINARY, redis_server
from tests.support.service_process import ServiceProcess
from tests.support.settings import NO_DATABASE, MakeSettings
from tests.support.waiting import wait_until
from worker import redis_causes
from worker.redis_causes import explain
from worker.redis_client import fail_fast_redis, worker_redis

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"
Serve = Callable[..., int]
Explain = Callable[..., str]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Start a redis-server with these arguments and return its port."""
    if BINARY is None:
        pytest.skip("redis-server is not installed")
    with ExitStack() as stack:
        yield lambda *options, **tls: stack.enter_context(redis_server(tmp_path, *options, **tls))


@pytest.fixture
def why(make_settings: MakeSettings) -> Explain:
    """Return the words for what Redis answers, at that URL, to a command."""

    def ask(url: str, command: tuple[object, ...] = ("SET", "rq:key", "1")) -> str:
        with fail_fast_redis(make_settings(**NO_DATABASE, redis_url=url)) as redis:
            try:
                redis.execute_command(*command)
            except RedisError as error:
                return explain(error)
            finally:
                redis.connection_pool.disconnect()  # which is shared, and would be used again
        return "no trouble"

    return ask


ACL_CASES = [
    (["-set"], ("SET", "rq:key", "1"), "REDIS_URL's user may not run SET:"),
    (["-client|list"], ("CLIENT", "LIST"), "REDIS_URL's user may not run CLIENT LIST:"),
    (["-set"], ("EVAL", "redis.call('SET', KEYS[1], 1)", 1, "rq:key"), "may not run a command of this serv"),
    (["resetkeys", "~other"], ("SET", "rq:key", "1"), "REDIS_URL's user may not use a key:"),
    (["resetchannels"], ("SUBSCRIBE", "rq:pubsub"), "REDIS_URL's user may not use a channel:"),
]


@pytest.mark.parametrize(("rules", "command", "words"), ACL_CASES)
def test_a_permission_that_is_missing_is_named(
    serve: Serve, why: Explain, rules: list[str], command: tuple[object, ...], words: str
) -> None:
    port = serve()
    with Redis(port=port) as redis:
        redis.execute_command("ACL", "SETUSER", "narrow", "on", ">pw", "~*", "&*", "+@all", *rules)
    assert words in why(f"redis://narrow:pw@127.0.0.1:{port}", command)


NEWER_ACL_CASES = [
    (["~*", "-set"], ("EVAL", "redis.call('SET', KEYS[1], 1)", 1, "rq:key"), "user may not run SET:"),
    (["~rq:key"], ("EVAL", "redis.call('SET', 'other', 1)", 1, "rq:key"), "user may not use a key:"),
    (["~*", "resetchannels"], ("SUBSCRIBE", "rq:pubsub"), "user may not use a channel:"),
    (["~*"], ("EVAL", "redis.call('NOSUCH')", 0), "Redis does not know a command of this service's scripts:"),
]


@pytest.mark.parametrize(("rules", "command", "words"), NEWER_ACL_CASES)
def test_valkey_and_redis_since_7_put_it_otherwise(
    own_redis: RedisServer, why: Explain, rules: list[str], command: tuple[object, ...], words: str
) -> None:
    with Redis.from_url(own_redis.url) as redis:
        redis.execute_command("ACL", "SETUSER", "narrow", "on", ">pw", "&*", "+@all", *rules)
    assert words in why(f"redis://narrow:pw@127.0.0.1:{own_redis.port}", command)


def test_a_file_that_is_not_there_is_said(why: Explain, tmp_path: Path) -> None:
    assert why(f"unix://{tmp_path}/none.sock").startswith("a file that REDIS_URL or REDIS_SSL_CA_CERTS names")


@pytest.mark.parametrize("client", [fail_fast_redis, worker_redis])
def test_a_redis_that_has_ended_is_named_also_where_a_connection_was_open(
    client: Callable[[Settings], Redis], own_redis: RedisServer, make_settings: MakeSettings
) -> None:
    """The closed connection is no cause: it is opened anew, and that fails."""
    with client(make_settings(**NO_DATABASE, redis_url=own_redis.url)) as redis:
        redis.ping()
        own_redis.kill()
        with pytest.raises(RedisError) as raised:
            redis.ping()
        redis.connection_pool.disconnect()
    assert explain(raised.value).startswith("nothing listens where REDIS_URL leads")


def test_a_primary_that_becomes_a_replica_is_named_to_who_waits_there(
    own_redis: RedisServer, make_settings: MakeSettings
) -> None:
    with (
        worker_redis(make_settings(**NO_DATABASE, redis_url=own_redis.url)) as redis,
        ThreadPoolExecutor(1) as thread,
    ):
        waiting = thread.submit(redis.blmove, "rq:from", "rq:to", 10)
        wait_until(lambda: redis.info("clients")["blocked_clients"] == 1, 20)
        redis.replicaof("127.0.0.1", "1")
        with pytest.raises(RedisError) as raised:
            waiting.result()
    assert explain(raised.value).startswith("REDIS_URL leads to a read-only replica")


PASSWORD = ("--requirepass", "right")
WITHOUT_HELLO = ("--rename-command", "HELLO", "")
CAUSES: list[tuple[tuple[str, ...], str, str]] = [
    (PASSWORD, "redis://:right@127.0.0.1:{}", "no trouble"),
    (WITHOUT_HELLO, "redis://127.0.0.1:{}", "Redis does not know HELLO: use Redis 6.2 or newer"),
    (WITHOUT_HELLO, "redis://:pw@127.0.0.1:{}", "Redis does not know HELLO"),
    ((), "redis://127.0.0.1:{}/99", "Redis has no database of that number"),
]


@pytest.mark.parametrize(("options", "url", "words"), CAUSES)
def test_what_the_url_lacks_is_named(
    serve: Serve, why: Explain, options: tuple[str, ...], url: str, words: str
) -> None:
    assert why(url.format(serve(*options))).startswith(words)


def test_a_redis_that_wants_a_certificate_says_so(serve: Serve, why: Explain, tmp_path: Path) -> None:
    wants_certificate = serve(certificate=self_signed(tmp_path), client_certificates=True)
    words = why(f"rediss://127.0.0.1:{wants_certificate}?ssl_cert_reqs=none")
    assert words.startswith(("Redis ended the TLS connection", "Redis closed the connection"))  # it is a race


def test_a_certificate_that_is_not_trusted_names_the_setting(
    serve: Serve, why: Explain, tmp_path: Path
) -> None:
    port = serve(certificate=self_signed(tmp_path, "-addext", "subjectAltName=IP:127.0.0.1"))
    assert why(f"rediss://127.0.0.1:{port}").startswith("Redis's certificate is not trusted")
    trusting = f"?ssl_ca_certs={tmp_path}/cert.pem"
    assert why(f"rediss://127.0.0.1:{port}{trusting}") == "no trouble"
    assert "for another host name" in why(f"rediss://localhost:{port}{trusting}")
    assert "names is not there" in why(f"rediss://127.0.0.1:{port}?ssl_ca_certs={tmp_path}/none.pem")


@pytest.mark.parametrize("command", [("SET", "rq:key", "1"), ("EVAL", "return 1", 2, "rq:a", "rq:b")])
def test_cluster_mode_is_said_with_its_slots_and_without(
    serve: Serve, why: Explain, command: tuple[object, ...]
) -> None:
    port = serve("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf")
    assert why(f"redis://127.0.0.1:{port}").startswith("Redis runs in cluster mode")
    assert why(f"redis://127.0.0.1:{port}/1").startswith("Redis runs in cluster mode")
    with Redis(port=port) as redis:
        redis.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        wait_until(lambda: b"cluster_state:ok" in redis.execute_command("CLUSTER", "INFO"), 20)
    if command[0] == "EVAL":
        assert why(f"redis://127.0.0.1:{port}", command).startswith("Redis runs in cluster mode")


def test_a_redis_that_is_loading_says_so(serve: Serve, why: Explain) -> None:
    with Redis(port=serve()) as redis:
        redis.mset({f"key:{i}": "x" * 100 for i in range(1000)})
        redis.save()
        redis.shutdown(nosave=True)
    slowly = ("--key-load-delay", "20000", "--loading-process-events-interval-bytes", "1024")
    port = serve(*slowly)
    assert why(f"redis://127.0.0.1:{port}").startswith("Redis is loading its data")


def test_what_keeps_it_from_writing_is_distinguished(serve: Serve, why: Explain) -> None:
    port = serve()
    url = f"redis://127.0.0.1:{port}"
    in_script = ("EVAL", "return redis.call('SET', KEYS[1], 1)", 1, "rq:key")
    with Redis(port=port) as redis:
        for damage, restore, words in (
            (("maxmemory", 1), ("maxmemory", 0), "Redis is out of memory"),
            (("min-replicas-to-write", 1), ("min-replicas-to-write", 0), "Redis has too few replicas"),
        ):
            redis.config_set(*damage)
            assert why(url).startswith(words)
            assert why(url, in_script).startswith(words)
            redis.config_set(*restore)
        redis.replicaof("127.0.0.1", "1")
        assert why(url).startswith("REDIS_URL leads to a read-only replica")
        redis.config_set("replica-serve-stale-data", "no")
        assert why(url, ("GET", "rq:key")).startswith("REDIS_URL leads to a replica without its primary")


def test_a_version_that_is_too_old_names_the_command_and_nothing_of_its_arguments(
    serve: Serve, why: Explain
) -> None:
    older = serve("--rename-command", "LMOVE", "")
    moved = ("LMOVE", "rq:a", "user@example.com", "LEFT", "RIGHT")
    assert why(f"redis://127.0.0.1:{older}", moved).startswith("Redis does not know LMOVE: ")
    assert "example" not in why(f"redis://127.0.0.1:{older}", moved)


def test_a_redis_that_hangs_says_so(own_redis: RedisServer, why: Explain) -> None:
    with frozen(own_redis):
        assert why(own_redis.url).startswith("Redis did not answer in time")


def test_the_embedded_redis_says_the_same(own_redis: RedisServer, why: Explain) -> None:
    with Redis.from_url(own_redis.url) as redis:
        for name, value, words in (
            ("maxmemory", 1, "Redis is out of memory"),
            ("maxclients", 1, "Redis has too many connections"),
        ):
            before: Any = redis.config_get(name)
            redis.config_set(name, value)
            assert why(own_redis.url).startswith(words)
            redis.config_set(name, before[name])
    assert why(f"redis://127.0.0.1:{own_redis.port}").startswith("Redis requires a password")
    assert why(f"redis://:no@127.0.0.1:{own_redis.port}").startswith("Redis refused the user or password")


def test_what_is_no_redis_shows_nothing_of_what_it_says(why: Explain, tmp_path: Path) -> None:
    port = free_port()
    with ServiceProcess("http", [sys.executable, "-m", "http.server", str(port)], {}, tmp_path):
        wait_until(lambda: port_in_use(port), 30)
        assert why(f"redis://127.0.0.1:{port}") == "Redis does not answer as expected (InvalidResponse)"


def test_every_cause_is_in_the_run_book() -> None:
    text = " ".join(OPERATIONS.read_text().split())
    tables = (
        redis_causes.BY_CODE.values(),
        redis_causes.BY_TEXT.values(),
        [words for _, words in redis_causes.BY_CLASS],
        redis_causes.VERIFICATIONS.values(),
    )
    causes = {re.split(r":| {", words)[0] for table in tables for words in table}
    assert sorted(cause for cause in causes if cause not in text) == []

"""Every secret is marked, and no log, answer, listing or process list shows the mark."""

import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest
from click.testing import CliRunner
from redis import Redis
from rq import Queue

import config
from cli.dev.servers import PostgresServer, RedisServer, free_port
from cli.main import cli
from db.connection.engine import Database
from tests.support import commands, http
from tests.support.deliveries import signed
from tests.support.fake_clerk import FakeClerk
from tests.support.migrations import migrate
from tests.support.payloads import ANN, body, svix_id, user, user_event
from tests.support.processes import clerk_sync, command_lines
from tests.support.queue import RqView
from tests.support.service_process import ServiceProcess
from tests.support.stack import Stack, environment
from tests.support.waiting import wait_until
from web.app import create_app
from worker.queue.failed_jobs import failed_jobs
from worker.redis_client import fail_fast_redis, worker_redis

MARK = "zqs3cret"
SIGNING = f"whsec_{MARK}KeyForSvix0123456789AbCd"
DATABASE_PASSWORD = f"{MARK}-database"
REDIS_PASSWORD = f"{MARK}-redis"
CONSOLE_PASSWORD = f"{MARK}-console"
PULL_TOKEN = f"{MARK}-pull"
API_KEY = f"sk_test_{MARK}Api"
NOBODY_THERE = "127.0.0.1:1"
PATIENCE_S = 40
A_WHILE_S = 1.5
AT_ONCE = 3
HEALTHY = (
    "/health",
    "/health/live",
    "/health/ready",
    "/metrics",
    "/console",
    f"/console?user={ANN}",
    "/none",
)

COMMANDS = (
    ["status"],
    ["status", "--json"],
    ["db", "current"],
    ["db", "upgrade"],
    ["failed", "list"],
    ["failed", "show", "msg_nowhere"],
    ["failed", "replay", "--all", "--dry-run"],
    ["events"],
    ["backfill"],
    ["reconcile"],
    ["pull", ANN],
    ["send", "user.created"],
)


Said = dict[str, str]


class SecretServers(NamedTuple):
    """A PostgreSQL and a Redis that ask for passwords, and a Clerk that asks for its key."""

    settings: config.Settings
    redis: RedisServer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("secrets")


@pytest.fixture(scope="module")
def servers(_session_directory: Path) -> Iterator[SecretServers]:
    postgres = PostgresServer(_session_directory / "postgres-with-password", free_port(), durable=False)
    redis = RedisServer(_session_directory / "redis-with-password", free_port(), durable=False)
    postgres.start()
    redis.start()
    try:
        _ask_for_passwords(postgres, redis)
        with FakeClerk(key=API_KEY) as clerk:
            clerk.put(user(ANN))
            settings = config.load(
                _env_file=None,
                **_secrets(
                    database_url=_with_password(postgres.url, DATABASE_PASSWORD),
                    redis_url=_with_password(redis.url, REDIS_PASSWORD),
                    clerk_api_url=clerk.url,
                ),
            )
            migrate(settings)
            yield SecretServers(settings, redis)
    finally:
        redis.kill()
        postgres.stop("immediate")


def _ask_for_passwords(postgres: PostgresServer, redis: RedisServer) -> None:
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute(f"ALTER ROLE postgres PASSWORD '{DATABASE_PASSWORD}'")
    with Redis.from_url(redis.url) as client:
        client.config_set("requirepass", REDIS_PASSWORD)


def _secrets(**fields: Any) -> dict[str, Any]:
    return {
        "clerk_webhook_signing_secret": SIGNING,
        "console_password": CONSOLE_PASSWORD,
        "clerk_secret_key": API_KEY,
        "pull_token": PULL_TOKEN,
        "port": free_port(),
        "web_workers": 1,
        "log_level": "DEBUG",
        **fields,
    }


def _with_password(url: str, password: str) -> str:
    parts = urlsplit(url)
    account, _, place = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{account.partition(':')[0]}:{password}@{place}").geturl()


def wrong(settings: config.Settings) -> dict[str, config.Settings]:
    """Return settings with secrets that no server accepts, and with servers that are not there."""
    assert settings.database_url
    assert settings.redis_url
    postgres, redis = (url.get_secret_value() for url in (settings.database_url, settings.redis_url))
    no_database, no_redis = {"database_url": _moved(postgres)}, {"redis_url": _moved(redis)}
    variants = {
        "wrong database password": {"database_url": postgres.replace("-database", "-wrong")},
        "wrong Redis password": {"redis_url": redis.replace("-redis", "-wrong")},
        "no database and no Redis": {**no_database, **no_redis},
        "wrong API key": {"clerk_secret_key": f"sk_test_{MARK}Wrong"},
        "passwords as options": {
            "database_url": f"postgresql://postgres@{NOBODY_THERE}/x?password={MARK}",
            "redis_url": f"redis://{NOBODY_THERE}/0?password={MARK}",
        },
        "options that do not exist": {
            "database_url": f"{postgres}?colour=green",
            "redis_url": f"{redis}?socket_timeout=green",
        },
    }
    return {what: _changed(settings, **fields) for what, fields in variants.items()}


def _moved(url: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=f"{parts.netloc.rpartition('@')[0]}@{NOBODY_THERE}").geturl()


def _changed(settings: config.Settings, **fields: Any) -> config.Settings:
    given = {name: getattr(settings, name) for name in settings.model_fields_set} | {"port": free_port()}
    return config.load(_env_file=None, **(given | fields))


def run(settings: config.Settings, *arguments: str) -> str:
    ran = commands.run(settings, *arguments)
    return ran.stdout + ran.stderr


def what_both_say(settings: config.Settings, directory: Path) -> str:
    """Run a receiver and a worker until each has said something; return logs and what `/health` says."""
    health = ""
    env, run = environment(settings), time.monotonic_ns()
    processes = [
        ServiceProcess(f"{name}-{run}", clerk_sync(name), env, directory) for name in ("web", "worker")
    ]
    with processes[0], processes[1]:
        wait_until(lambda: all(one.text() or not one.running for one in processes), PATIENCE_S)
        time.sleep(A_WHILE_S)
        with suppress(httpx.TransportError):
            url = f"http://127.0.0.1:{settings.port}/health"
            health = http.get(url, timeout=15).text
    return "\n".join([health, *(process.text() for process in processes)])


def run_all(wanted: Mapping[str, tuple[config.Settings, list[str]]]) -> Said:
    return {what: run(settings, *command) for what, (settings, command) in wanted.items()}


def assert_unmarked(said: Mapping[str, str]) -> None:
    for what, text in said.items():
        lines = [line for line in text.splitlines() if MARK.lower() in line.lower()]
        assert not lines, f"{what}: {len(lines)} lines, such as {lines[0]}"


def everything_in(redis: Redis) -> str:
    """Return all keys and values, with what is compressed in them."""
    readers: dict[bytes, Callable[[bytes], Any]] = {
        b"string": redis.get,
        b"list": lambda key: redis.lrange(key, 0, -1),
        b"set": redis.smembers,
        b"zset": lambda key: redis.zrange(key, 0, -1, withscores=True),
        b"hash": redis.hgetall,
        b"stream": redis.xrange,
    }
    found = []
    for key in redis.scan_iter():
        kind: Any = redis.type(key)
        value = readers[kind](key)
        found.append(repr((key, value)))
        if isinstance(value, dict):
            found += [repr(_inflated(part)) for part in value.values()]
    return "\n".join(found)


def _inflated(part: bytes) -> bytes:
    try:
        return zlib.decompress(part)
    except zlib.error:
        return b""


def test_the_service_shows_no_secret_to_anybody(servers: SecretServers, directory: Path) -> None:
    settings = servers.settings
    said: Said = {}
    with Stack(settings, directory) as stack, worker_redis(settings) as redis:
        _make_it_speak(stack, redis)
        for path in HEALTHY:
            auth = ("x", CONSOLE_PASSWORD) if "console" in path else None
            said[path] = _get(stack, path, auth=auth)
        said |= run_all({" ".join(command): (settings, command) for command in COMMANDS})
        for id_ in RqView(redis).ids("failed"):
            said[f"failed show {id_}"] = run(settings, "failed", "show", id_, "--payload")
        said["all that Redis holds"] = everything_in(redis)
        for process in (stack.web, *stack.workers):
            assert process.pid
            said[f"command lines of {process.name}"] = command_lines(process.pid)
        servers.redis.kill()
        said["health without Redis"] = _get(stack, "/health")
        _post(stack, body(user_event()))
        servers.redis.start()
        with Redis.from_url(servers.redis.url) as client:
            client.config_set("requirepass", REDIS_PASSWORD)
        wait_until(lambda: _post(stack, body(user_event())) == 202, PATIENCE_S, stack.logs)
        stack.stop()
        said["log"] = stack.logs()
    assert said["failed list"].count("msg_") >= 1
    assert '"status":"unavailable"' in said["log"]
    assert_unmarked(said)


def _make_it_speak(stack: Stack, redis: Redis) -> None:
    """Use every secret, well and badly."""
    content = body(user_event())
    assert _post(stack, content) == 202
    assert _post(stack, b"{}") == 202, "it is queued, and fails"
    assert _post(stack, content, secret="whsec_c29tZWJvZHkgZWxzZSdzIGtleQ==") == 400
    assert http.post(stack.url, content=content).status_code == 400
    for token, status in ((PULL_TOKEN, 200), (f"{MARK}-other", 401), ("\xff", 401)):
        headers = {b"Authorization": f"Bearer {token}".encode("latin-1")}
        pulled = http.post(f"{stack.base_url}/users/{ANN}/pull", headers=headers, timeout=15)
        assert pulled.status_code == status, pulled.text
    for auth in (("x", f"{MARK}-wrong"), (f"{MARK}-wrong", "")):
        assert "Password" not in _get(stack, "/console", auth=auth)
    _get(stack, "/console", auth=("x", CONSOLE_PASSWORD))
    Queue("clerk", connection=redis, serializer="json").enqueue("os.getenv", "DATABASE_URL", job_id="foreign")
    wait_until(lambda: len(RqView(redis).ids("failed")) >= 2, PATIENCE_S, stack.logs)


def _post(stack: Stack, content: bytes, secret: str = SIGNING) -> int:
    headers = signed(content, id_=svix_id(), secret=secret)
    return http.post(stack.url, content=content, headers=headers, timeout=15).status_code


def _get(stack: Stack, path: str, auth: tuple[str, str] | None = None) -> str:
    answer = http.get(stack.base_url + path, auth=auth, timeout=15)
    return f"{answer.status_code} {answer.headers} {answer.text}"


def test_wrong_secrets_and_servers_that_are_away_are_reported_without_a_secret(
    servers: SecretServers,
) -> None:
    """With the traceback that --debug shows."""
    said = run_all(
        {
            f"{what}: {command}": (settings, ["--debug", *command])
            for what, settings in wrong(servers.settings).items()
            for command in ([["pull", ANN]] if "API" in what else [["failed", "list"], ["db", "current"]])
        }
    )
    assert sum("Traceback" in text for text in said.values()) >= 6
    assert_unmarked(said)


def test_processes_that_cannot_work_say_so_without_a_secret(servers: SecretServers, directory: Path) -> None:
    """Some wait for a server that does not take them, some end with what a library makes of the URL."""
    variants = wrong(servers.settings)
    del (
        variants["wrong API key"],
        variants["no database and no Redis"],
    )  # no Clerk; another has no servers
    ends_at_once = variants.pop("options that do not exist")
    said = {name: run(ends_at_once, "--debug", name) for name in ("web", "worker")}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        outputs = pool.map(lambda settings: what_both_say(settings, directory), variants.values())
        said |= dict(zip(variants, outputs, strict=True))
    assert any("waiting" in text for text in said.values())
    assert_unmarked(said)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("CLERK_WEBHOOK_SIGNING_SECRET", f"{MARK}"),
        ("CLERK_WEBHOOK_SIGNING_SECRET", f"whsec_{MARK}!"),
        ("CLERK_WEBHOOK_SIGNING_SECRET", f"whsec_{MARK}="),
        ("DATABASE_URL", f"mysql://u:{MARK}@host/db"),
        ("DATABASE_URL", f"postgresql://u:{MARK}@host:{MARK}/db"),
        ("DATABASE_URL", f"postgresql://u:{MARK}@[host/db"),
        ("DATABASE_URL_UNPOOLED", f"{MARK}"),
        ("REDIS_URL", f"{MARK}://:{MARK}@host"),
        ("REDIS_URL", f"redis://:{MARK}@host:{MARK}"),
        ("CLERK_SECRET_KEY", f"{MARK} {MARK}"),
        ("CLERK_SECRET_KEY", f"{MARK}\nx"),
        ("PULL_TOKEN", f"{MARK} é"),
        ("PORT", MARK),
        ("WEB_WORKERS", MARK),
        ("LOG_LEVEL", MARK),
        ("RECONCILE_EVERY", MARK),
    ],
)
def test_a_malformed_setting_is_named_and_not_quoted(variable: str, value: str, tmp_path: Path) -> None:
    ran = commands.run_with({variable: value}, "--debug", "web", directory=tmp_path)
    assert ran.returncode == 1
    assert variable in ran.stderr
    assert_unmarked({"its output": ran.stdout + ran.stderr})


def test_no_help_shows_what_is_set(servers: SecretServers) -> None:
    groups = [[], ["db"], ["failed"], ["dev"], ["web"], ["worker"], *COMMANDS]
    runner = CliRunner(env=environment(servers.settings))
    said = {}
    for words in groups:
        shown = runner.invoke(cli, [*words, "--help"])
        assert shown.exit_code == 0
        said[" ".join(words)] = shown.output
    assert_unmarked(said)


def test_objects_that_hold_a_secret_do_not_show_it(servers: SecretServers) -> None:
    settings = servers.settings
    database = Database(settings)
    worker_client, receiver_client = worker_redis(settings), fail_fast_redis(settings)
    app = create_app(settings)
    failed = failed_jobs(settings)
    holders = (settings, database, database.__dict__, worker_client, receiver_client, app, app.config, failed)
    try:
        assert_unmarked({str(type(one)): f"{one!r} {one!s}" for one in holders})
        assert_unmarked({"the settings as JSON": settings.model_dump_json()})
    finally:
        app.extensions["pull_service"].close()
        failed.close()
        worker_client.close()
        receiver_client.close()
        database.dispose()

"""Real servers for every test: started here, or given by TEST_DATABASE_URL and TEST_REDIS_URL."""

import gc
import itertools
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
import redis
import structlog

import config
from cli.dev.servers import PostgresServer, RedisServer, free_port
from cli.main import GC_THRESHOLD
from db import migration
from db.connection.engine import Database
from tests.support.databases import new_database, with_database
from tests.support.directories import memory, open_directory
from tests.support.fake_clerk import FakeClerk
from tests.support.pooler import start_pgbouncer
from tests.support.queue import RqView
from tests.support.settings import NO_DATABASE, SECRET, GivenServer, MakeSettings
from tests.support.sync import api_settings
from worker import redis_client
from worker.queue import producer


def pytest_configure() -> None:
    """Heed SIGINT, as a terminal's commands do: a script that runs the tests in the background ignores it.

    What the tests start would inherit that. Garbage is looked for as often as in a command: with Python's own
    number a fifth of the tests' time looks for it among thousands of collected tests.
    """
    gc.set_threshold(GC_THRESHOLD)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Modules that take longest, as they start many processes or wait: the longest first. A module further back
# may be divided: each part of `test_every_step` would start all its workers.
LONGEST = (
    "test_every_step",
    "test_batch_worker",
    "test_dev",
    "test_interleavings",
    "test_histories",
    "test_console_browser",
    "test_alerts_fire",
    "test_idle",
    "test_application",
    "test_redis_as_sold",
    "test_personal_data",
    "test_planted_jobs",
    "test_wheel",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let each process begin with modules that take long, so that none ends with one while others idle.

    pytest-xdist's `worksteal` gives each process an equal share of the tests in a row, and who has none left
    takes from the end of the longest row.
    """
    processes = getattr(config, "workerinput", {}).get("workercount", 1)
    modules = {name: [item for item in items if item.path.stem == name] for name in LONGEST}
    others = [item for item in items if item.path.stem not in modules]
    rows: list[list[pytest.Item]] = []
    total = len(items)
    for number in range(processes):
        row = [item for name in LONGEST[number::processes] for item in modules[name]]
        share = (total - sum(map(len, rows))) // (processes - number)
        taken = max(0, share - len(row))
        rows.append(row + others[:taken])
        others = others[taken:]
    items[:] = [*itertools.chain.from_iterable(rows), *others]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the settings of the shell that runs it."""
    for field in config.Settings.model_fields:
        monkeypatch.delenv(field, raising=False)
        monkeypatch.delenv(field.upper(), raising=False)
    monkeypatch.setitem(config.Settings.model_config, "env_file", None)


@pytest.fixture(autouse=True)
def _clean_log() -> Iterator[None]:
    """No test is left with the log as a command set it up in the one before."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    structlog.reset_defaults()
    root.handlers = handlers
    root.setLevel(level)


@pytest.fixture
def server_directory() -> Iterator[Path]:
    """A short directory for servers: pytest closes its own to the account that they run as under root."""
    with open_directory() as directory:
        yield directory


@pytest.fixture
def own_redis(server_directory: Path) -> Iterator[RedisServer]:
    """A Redis that the test may stop, fill and damage."""
    server = RedisServer(server_directory / "redis", free_port(), durable=False)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def own_postgres(server_directory: Path) -> Iterator[PostgresServer]:
    """A PostgreSQL that the test may stop and fill."""
    server = PostgresServer(server_directory / "postgres", free_port(), durable=False)
    server.start()
    yield server
    server.stop("immediate")


@pytest.fixture(scope="session")
def _session_directory() -> Iterator[Path]:
    with open_directory(memory()) as directory:
        yield directory


@pytest.fixture(scope="session")
def postgres_server(_session_directory: Path) -> Iterator[PostgresServer | GivenServer]:
    """The PostgreSQL that `database_url` clones its databases in; `url` is a direct one."""
    pooled = os.environ.get("TEST_DATABASE_URL")
    if pooled:
        yield GivenServer(os.environ.get("TEST_DATABASE_URL_UNPOOLED") or pooled)
        return
    server = PostgresServer(_session_directory / "postgres", free_port(), durable=False)
    server.start()
    yield server
    server.stop("immediate")


@pytest.fixture(scope="session")
def redis_server(_session_directory: Path) -> Iterator[RedisServer | GivenServer]:
    """The Redis that `redis_url` takes its logical databases from."""
    given = os.environ.get("TEST_REDIS_URL")
    if given:
        yield GivenServer(given)
        return
    server = RedisServer(_session_directory / "redis", free_port(), durable=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def _pooler_url(
    postgres_server: PostgresServer | GivenServer, _session_directory: Path
) -> Iterator[str | None]:
    """What stands between the tests and PostgreSQL: TEST_PGBOUNCER=1 starts a PgBouncer there."""
    if isinstance(postgres_server, GivenServer):
        yield os.environ["TEST_DATABASE_URL"]
    elif os.environ.get("TEST_PGBOUNCER") == "1":
        process, url = start_pgbouncer(_session_directory / "pgbouncer", postgres_server)
        yield url
        process.end()
    else:
        yield None


@pytest.fixture(scope="session")
def _admin(postgres_server: PostgresServer | GivenServer) -> Iterator[psycopg.Connection]:
    with psycopg.connect(postgres_server.url, autocommit=True, prepare_threshold=None) as connection:
        yield connection


@pytest.fixture(scope="session")
def _template(_admin: psycopg.Connection, postgres_server: PostgresServer | GivenServer) -> Iterator[str]:
    """A database that is migrated once and cloned for every test."""
    name = f"clerk_sync_test_{os.getpid()}"
    with new_database(_admin, name):
        database = Database(
            config.load(_env_file=None, database_url=with_database(postgres_server.url, name))
        )
        migration.upgrade(database)
        database.dispose()
        yield name


@pytest.fixture(scope="session")
def _numbers() -> Iterator[int]:
    return itertools.count(1)


@pytest.fixture
def database_url_unpooled(
    _admin: psycopg.Connection,
    _template: str,
    _numbers: Iterator[int],
    postgres_server: PostgresServer | GivenServer,
) -> Iterator[str]:
    """A fresh, migrated database, reached without a pooler; dropped after the test."""
    name = f"{_template}_{next(_numbers)}"
    # By its files, which takes half of the time: nobody writes to the template.
    strategy = "STRATEGY = FILE_COPY" if _admin.info.server_version >= 150_000 else ""
    with new_database(_admin, name, f"TEMPLATE {_template} {strategy}"):
        yield with_database(postgres_server.url, name)


@pytest.fixture
def database_url(database_url_unpooled: str, _pooler_url: str | None) -> str:
    """The same database as `database_url_unpooled`, through the pooler if there is one."""
    return _through(_pooler_url, database_url_unpooled)


@pytest.fixture
def empty_url(
    _admin: psycopg.Connection, _numbers: Iterator[int], postgres_server: PostgresServer | GivenServer
) -> Iterator[str]:
    """A database without a table, reached without a pooler; dropped after the test."""
    name = f"clerk_sync_empty_{os.getpid()}_{next(_numbers)}"
    with new_database(_admin, name):
        yield with_database(postgres_server.url, name)


@pytest.fixture
def empty_database_url(empty_url: str, _pooler_url: str | None) -> str:
    """The same database as `empty_url`, through the pooler if there is one."""
    return _through(_pooler_url, empty_url)


@pytest.fixture
def redis_url(redis_server: RedisServer | GivenServer, _numbers: Iterator[int]) -> str:
    """An empty logical database: each of Redis's sixteen in turn.

    Of a Redis that is given, the one that TEST_REDIS_URL names, and the next ones for parallel processes.
    """
    there = urlsplit(redis_server.url)
    if isinstance(redis_server, RedisServer):
        number = next(_numbers) % 16
    else:
        number = int(there.path[1:] or 0) + int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    url = there._replace(path=f"/{number}").geturl()
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture
def connection(database_url_unpooled: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection to the test's database, of an operator or the application beside the service."""
    with psycopg.connect(database_url_unpooled, autocommit=True) as opened:
        yield opened


@pytest.fixture
def database(make_settings: MakeSettings) -> Iterator[Database]:
    """The test's database as the service has it."""
    made = Database(make_settings(redis_url=None))
    yield made
    made.dispose()


@pytest.fixture(name="redis")
def redis_of_a_worker(make_settings: MakeSettings) -> Iterator[redis.Redis]:
    """The test's Redis as a worker has it."""
    client = redis_client.worker_redis(make_settings(**NO_DATABASE))
    yield client
    client.close()


@pytest.fixture
def rq(redis: redis.Redis) -> RqView:
    """RQ's view of the queue."""
    return RqView(redis)


@pytest.fixture
def clerk() -> Iterator[FakeClerk]:
    """A fake of Clerk's API, over HTTP."""
    with FakeClerk() as fake:
        yield fake


@pytest.fixture
def settings(make_settings: MakeSettings, clerk: FakeClerk) -> config.Settings:
    """Settings that lead to the fake of Clerk's API, and to the test's database and Redis."""
    return api_settings(make_settings, clerk)


@pytest.fixture
def patient_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no receiver in this process give Redis up because the machine is busy with all its threads."""
    for module in (redis_client, producer):
        monkeypatch.setattr(module, "FAIL_FAST_TIMEOUT_S", 20)
    for limit in ("socket_timeout", "socket_connect_timeout"):
        monkeypatch.setitem(redis_client.FAIL_FAST, limit, 20)


@pytest.fixture
def make_settings(request: pytest.FixtureRequest) -> MakeSettings:
    """Build settings for this test's own database and Redis; keywords replace or add fields.

    A server is only started, and a database only made, when the field that names it is not replaced.
    """

    def make(**overrides: Any) -> config.Settings:
        for field in ("database_url", "database_url_unpooled", "redis_url"):
            if field not in overrides:
                overrides[field] = request.getfixturevalue(field)
        overrides.setdefault("clerk_webhook_signing_secret", SECRET)
        return config.load(_env_file=None, **overrides)

    return make


def _through(pooler_url: str | None, url: str) -> str:
    return url if pooler_url is None else with_database(pooler_url, urlsplit(url).path.removeprefix("/"))

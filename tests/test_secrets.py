"""Every secret is marked, and no log, answer, listing or process list shows the mark."""

import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from click.testing import CliRunner
from redis import Redis

import config
from cli.dev.servers import PostgresServer, RedisServer, free_port
from cli.main import cli
from db.connection.engine import Database
from tests.support import commands, http
from tests.support.databases import with_account, with_place
from tests.support.fake_clerk import FakeClerk
from tests.support.migrations import migrate
from tests.support.payloads import ANN, user
from tests.support.processes import clerk_sync
from tests.support.service_process import ServiceProcess
from tests.support.stack import environment
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


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("secrets")


@pytest.fixture(scope="module")
def settings(_session_directory: Path) -> Iterator[config.Settings]:
    """Settings of a PostgreSQL and a Redis that ask for passwords, and of a Clerk that asks for its key."""
    postgres = PostgresServer(_session_directory / "postgres-with-password", free_port(), durable=False)
    redis = RedisServer(_session_directory / "redis-with-password", free_port(), durable=False)
    postgres.start()
    redis.start()
    try:
        _ask_for_passwords(postgres, redis)
        with FakeClerk(key=API_KEY) as clerk:
            clerk.put(user(ANN))
            made = config.load(
                _env_file=None,
                **_secrets(
                    database_url=with_account(postgres.url, "postgres", DATABASE_PASSWORD),
                    redis_url=with_account(redis.url, "", REDIS_PASSWORD),
                    clerk_api_url=clerk.url,
                ),
            )
            migrate(made)
            yield made
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


def wrong(settings: config.Settings) -> dict[str, config.Settings]:
    """Return settings with secrets that no server accepts, and with servers that are not there."""
    assert settings.database_url
    assert settings.redis_url
    postgres, redis = (url.get_secret_value() for url in (settings.database_url, settings.redis_url))
    no_database, no_redis = (
        {"database_url": with_place(postgres, NOBODY_THERE)},
        {"redis_url": with_place(redis, NOBODY_THERE)},
    )
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


def test_wrong_secrets_and_servers_that_are_away_are_reported_without_a_secret(
    settings: config.Settings,
) -> None:
    """With the traceback that --debug shows."""
    said = run_all(
        {
            f"{what}: {command}": (variant, ["--debug", *command])
            for what, variant in wrong(settings).items()
            for command in ([["pull", ANN]] if "API" in what else [["failed", "list"], ["db", "current"]])
        }
    )
    assert sum("Traceback" in text for text in said.values()) >= 6
    assert_unmarked(said)


def test_processes_that_cannot_work_say_so_without_a_secret(
    settings: config.Settings, directory: Path
) -> None:
    """Some wait for a server that does not take them, some end with what a library makes of the URL."""
    variants = wrong(settings)
    del (
        variants["wrong API key"],
        variants["no database and no Redis"],
    )  # no Clerk; another has no servers
    ends_at_once = variants.pop("options that do not exist")
    said = {name: run(ends_at_once, "--debug", name) for name in ("web", "worker")}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        outputs = pool.map(lambda variant: what_both_say(variant, directory), variants.values())
        said |= dict(zip(variants, outputs, strict=True))
    assert any("waiting" in text for text in said.values())
    assert_unmarked(said)


def test_no_help_shows_what_is_set(settings: config.Settings) -> None:
    groups = [[], ["db"], ["failed"], ["dev"], ["web"], ["worker"], *COMMANDS]
    runner = CliRunner(env=environment(settings))
    said = {}
    for words in groups:
        shown = runner.invoke(cli, [*words, "--help"])
        assert shown.exit_code == 0
        said[" ".join(words)] = shown.output
    assert_unmarked(said)


def test_objects_that_hold_a_secret_do_not_show_it(settings: config.Settings) -> None:
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

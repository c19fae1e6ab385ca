"""`clerk-sync status` names the cause of each fault, produced on real servers, within half a minute.

docs/faults.md has the table: with STATUS_TABLE=FILE in the environment this module writes it.
"""

import json
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import psycopg
import pytest
from redis import Redis

from cli.dev.servers import PostgresServer, free_port
from cli.main import main
from tests.support.certificates import self_signed
from tests.support.failed_jobs import fail
from tests.support.queue import delivery, frozen, put
from tests.support.redis_servers import BINARY, keep_busy, redis_server, refuse_to_save
from tests.support.service import add_service, add_worker
from tests.support.settings import MakeSettings
from tests.support.stack import environment
from tests.support.waiting import wait_until
from worker.monitoring import probes, receivers, recent
from worker.queue import lock_waits, rq_format
from worker.queue.consumer import CONSUMERS_KEY

FAULTS = Path(__file__).parents[2] / "docs" / "faults.md"
LIMIT_S = 30
HOST = "127.0.0.1"

pytestmark = pytest.mark.skipif(BINARY is None, reason="redis-server is not installed")


class FaultyService(NamedTuple):
    """Where a fault is made, and the environment that `status` gets."""

    env: dict[str, str]
    redis: Redis
    directory: Path
    redis_servers: ExitStack
    postgres: PostgresServer
    database: str
    held: list[object]

    def sql(self, *statements: str) -> None:
        """Run statements as the superuser of the server that may be damaged."""
        with psycopg.connect(self.postgres.url, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def admit(self, line: str) -> None:
        """Let the line of pg_hba.conf decide for the role `narrow`."""
        with psycopg.connect(self.postgres.url) as connection:
            [(name,)] = connection.execute("SHOW hba_file").fetchall()
        hba = Path(name)
        rest = [each for each in hba.read_text().splitlines() if "narrow" not in each]
        hba.write_text("\n".join([line, *rest]) + "\n")
        before = self._loaded_at()
        self.sql("SELECT pg_reload_conf()")
        wait_until(lambda: self._loaded_at() != before, 20)

    def _loaded_at(self) -> object:
        with psycopg.connect(self.postgres.url) as connection:
            return connection.execute("SELECT pg_conf_load_time()").fetchone()

    def postgres_url(self, user: str = "narrow:pw", database: str = "postgres", options: str = "") -> None:
        """Let `status` ask that server."""
        at = f"{HOST}:{self.postgres.port}"
        self.env["DATABASE_URL"] = f"postgresql://{user}@{at}/{database}{options}"

    def redis_url(self, *arguments: str, scheme: str = "redis", user: str = "", tls: bool = False) -> str:
        """Let `status` ask a redis-server with these arguments; return where it is."""
        certificate = self_signed(self.directory) if tls else None
        started = redis_server(self.directory, *arguments, certificate=certificate)
        at = f"{HOST}:{self.redis_servers.enter_context(started)}"
        self.env["REDIS_URL"] = f"{scheme}://{user}{at}/0"
        return f"redis://{at}/0"


Fault = Callable[[FaultyService], None]


def _redis(*arguments: str, scheme: str = "redis", user: str = "", tls: bool = False) -> Fault:
    def make(place: FaultyService) -> None:
        place.redis_url(*arguments, scheme=scheme, user=user, tls=tls)

    return make


def _redis_command(*commands: str) -> Fault:
    def make(place: FaultyService) -> None:
        with Redis.from_url(place.redis_url()) as redis:
            for command in commands:
                redis.execute_command(*shlex.split(command))

    return make


def _env(**variables: str) -> Fault:
    return lambda place: place.env.update(variables)


def _few_connections(place: FaultyService) -> None:
    holding = Redis.from_url(place.redis_url())
    holding.config_set("maxclients", 1)
    place.held.append(holding)


def _narrow_redis(place: FaultyService) -> None:
    with Redis.from_url(place.redis_url(user="narrow:pw@")) as redis:
        redis.execute_command("ACL", "SETUSER", "narrow", "on", ">pw", "~*", "&*", "+@all", "-set", "-llen")


def _misconfigured(place: FaultyService) -> None:
    url = place.redis_url("--dbfilename", "taken.rdb")
    with Redis.from_url(url) as redis:
        refuse_to_save(redis, place.directory)


def _busy(place: FaultyService) -> None:
    keep_busy(place.redis_url("--busy-reply-threshold", "20"))


def _postgres(
    line: str = "", *statements: str, user: str = "narrow:pw", database: str = "postgres", options: str = ""
) -> Fault:
    def make(place: FaultyService) -> None:
        place.sql(*statements)
        place.admit(line)
        place.postgres_url(user, database, options)

    return make


def _not_migrated(place: FaultyService) -> None:
    place.env["DATABASE_URL"] = place.postgres.url


def _ours(*statements: str) -> Fault:
    """Damage the migrated database."""

    def make(place: FaultyService) -> None:
        with psycopg.connect(place.database, autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement.encode())

    return make


def _in_redis(damage: Callable[[Redis], object]) -> Fault:
    def make(place: FaultyService) -> None:
        damage(place.redis)

    return make


def _emptied(place: FaultyService) -> None:
    _ours(
        "INSERT INTO webhook_events (svix_id, type, clerk_id, received_at, outcome)"
        " VALUES ('msg_1', 'user.created', 'user_1', now(), 'applied')"
    )(place)


def _waiting(redis: Redis) -> None:
    redis.hset(f"{rq_format.JOB_PREFIX}waiting", "status", "scheduled")
    redis.zadd(lock_waits.KEY, {"waiting": time.time() - 60})


def _refused_again(redis: Redis) -> None:
    meta = json.dumps({"attempts": 2, "reason": "ChangeRefused: RaiseException (SQLSTATE P0001)"})
    for id_ in ("one", "two"):
        redis.hset(f"{rq_format.JOB_PREFIX}{id_}", items=["description", "user.updated user_1", "meta", meta])
        redis.zadd(rq_format.SCHEDULED_KEY, {id_: time.time() + 60})


def _applied_elsewhere(redis: Redis) -> None:
    redis.hset(f"{rq_format.JOB_PREFIX}one", "description", "user.updated user_1")
    redis.zadd(rq_format.FINISHED_KEY, {"one": time.time() + 3600})


def _refused(kind: str) -> Callable[[Redis], None]:
    return lambda redis: recent.add(redis, {kind: 9, recent.GENUINE: 2})


LINE = f"host all narrow {HOST}/32 "
CASES: dict[str, tuple[Fault, str]] = {
    "Redis: stopped": (_env(REDIS_URL="redis://127.0.0.1:1/0"), "nothing listens where REDIS_URL leads"),
    "Redis: wrong host": (_env(REDIS_URL="redis://none.invalid:6379/0"), "the host name in REDIS_URL is not"),
    "Redis: no password": (_redis("--requirepass", "pw"), "Redis requires a password"),
    "Redis: wrong password": (
        _redis("--requirepass", "pw", user=":no@"),
        "Redis refused the user or password",
    ),
    "Redis: speaks TLS only": (_redis(tls=True), "or requires TLS (rediss://)"),
    "Redis: speaks no TLS": (_redis(scheme="rediss"), "Redis does not offer TLS"),
    "Redis: unknown certificate": (_redis(scheme="rediss", tls=True), "Redis's certificate is not trusted"),
    "Redis: all connections taken": (_few_connections, "Redis has too many connections"),
    "Redis: a command is not allowed": (_narrow_redis, "REDIS_URL's user may not run LLEN"),
    "Redis: cluster mode": (
        _redis("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf"),
        "Redis runs in cluster mode",
    ),
    "Redis: full": (_redis_command("CONFIG SET maxmemory 1"), "Redis is out of memory"),
    "Redis: cannot save": (_misconfigured, "Redis cannot write to its disk"),
    "Redis: a replica": (_redis_command("REPLICAOF 127.0.0.1 1"), "REDIS_URL leads to a read-only replica"),
    "Redis: too few replicas": (
        _redis_command("CONFIG SET min-replicas-to-write 1"),
        "Redis has too few replicas",
    ),
    "Redis: too old": (_redis("--rename-command", "HELLO", ""), "Redis does not know HELLO"),
    "Redis: a script that does not end": (_busy, "Redis is busy with a script"),
    "PostgreSQL: stopped": (_env(DATABASE_URL="postgresql://x@127.0.0.1:1/x"), "nothing listens at its host"),
    "PostgreSQL: wrong host": (
        _env(DATABASE_URL="postgresql://x@none.invalid/x"),
        "its host name was not found",
    ),
    "PostgreSQL: no such role": (
        _postgres(f"host all narrow_none {HOST}/32 trust", user="narrow_none"),
        "the role does not exist",
    ),
    "PostgreSQL: no such database": (_postgres(database="none"), "the database does not exist"),
    "PostgreSQL: wrong password": (
        _postgres(f"{LINE} scram-sha-256", user="narrow:no"),
        "the password was refused",
    ),
    "PostgreSQL: no password": (_postgres(f"{LINE} scram-sha-256", user="narrow"), "a password is required"),
    "PostgreSQL: speaks TLS only": (_postgres(f"{LINE} reject"), "the server requires TLS"),
    "PostgreSQL: no TLS": (_postgres(options="?sslmode=require"), "the server does not offer TLS"),
    "PostgreSQL: all connections taken": (
        _postgres("", "ALTER ROLE narrow CONNECTION LIMIT 0"),
        "the server has no connection left",
    ),
    "PostgreSQL: no right on the schema": (
        _postgres("", "REVOKE ALL ON SCHEMA public FROM public, narrow"),
        "lacks USAGE on the schema",
    ),
    "PostgreSQL: not migrated": (_not_migrated, "the schema is missing: run clerk-sync db upgrade"),
    "no worker": (
        _in_redis(lambda redis: redis.delete(rq_format.WORKERS_KEY, CONSUMERS_KEY)),
        "no worker is alive",
    ),
    "no receiver": (_in_redis(lambda redis: redis.delete(receivers.NAMES_KEY)), "no receiver is alive"),
    "workers suspended": (_in_redis(lambda redis: redis.set(rq_format.SUSPENDED_KEY, 1)), "rq resume"),
    "workers wait": (
        _in_redis(lambda redis: add_worker(redis, waiting_for="database", reason="the disk is full")),
        "the worker is waiting for the database: the disk is full",
    ),
    "a batch hangs": (_in_redis(lambda redis: add_worker(redis, in_hand_s=45)), "the same batch for 45"),
    "a row is locked": (_in_redis(_waiting), "another transaction has locked"),
    "a trigger refuses every change": (_in_redis(_refused_again), "2 deliveries were refused more than once"),
    "a worker applies to another database": (
        _in_redis(_applied_elsewhere),
        "a worker uses another DATABASE_URL",
    ),
    "a job failed": (_in_redis(fail), "1 job has failed"),
    "wrong signing secret": (_in_redis(_refused(recent.MISMATCH)), "the signature does not match"),
    "wrong clock": (_in_redis(_refused(recent.STALE)), "the signed time is more than five minutes off"),
    "another instance's deliveries": (_in_redis(_refused(recent.FOREIGN)), "another Clerk instance ignored"),
    "two instances": (
        _ours("INSERT INTO instance_sync (id) VALUES ('ins_1'), ('ins_2')"),
        "2 Clerk instances have written",
    ),
    "Redis emptied": (_emptied, "Redis was emptied"),
    "queue full": (_in_redis(lambda redis: put(redis, delivery())), "the queue is full"),
}


@pytest.fixture(scope="module")
def postgres(_session_directory: Path) -> Iterator[PostgresServer]:
    server = PostgresServer(_session_directory / "damaged", free_port(), durable=False)
    server.start()
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute("CREATE ROLE narrow LOGIN PASSWORD 'pw'")
    yield server
    server.stop("immediate")


@pytest.fixture
def place(
    make_settings: MakeSettings,
    redis_url: str,
    database_url_unpooled: str,
    postgres: PostgresServer,
    tmp_path: Path,
) -> Iterator[FaultyService]:
    settings = make_settings(
        database_url=database_url_unpooled, database_url_unpooled=None, max_queue_depth=1
    )
    with Redis.from_url(redis_url) as redis, ExitStack() as servers:
        add_service(redis)
        yield FaultyService(
            environment(settings), redis, tmp_path, servers, postgres, database_url_unpooled, []
        )
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute("ALTER ROLE narrow CONNECTION LIMIT -1")
        connection.execute("GRANT USAGE ON SCHEMA public TO public")


@pytest.mark.parametrize("fault", CASES)
def test_status_names_the_cause_of(
    fault: str, place: FaultyService, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, words = CASES[fault]
    make(place)
    monkeypatch.setenv("COLUMNS", "500")  # each text in one line
    monkeypatch.setattr(probes, "LIMIT_S", 20)  # the machine may be busy, and nothing hangs
    for name, value in place.env.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with pytest.raises(SystemExit):
        main(["status"])
    took_s = time.monotonic() - began
    out = capsys.readouterr().out
    line = next((line for line in out.splitlines() if words in line), None)
    assert line is not None, out
    assert took_s < LIMIT_S
    assert "Status         ok" not in out
    if table := os.environ.get("STATUS_TABLE"):
        said = re.split(r" {2,}", line.strip(), maxsplit=1)[-1]
        with Path(table).open("a") as file:
            file.write(f"| {fault} | {took_s:.1f} | {said} |\n")


def test_a_server_that_hangs_is_named_in_time(
    place: FaultyService, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _not_migrated(place)
    for name, value in place.env.items():
        monkeypatch.setenv(name, value)
    with frozen(place.postgres), pytest.raises(SystemExit):
        main(["status"])
    assert "no answer within 2.5 s" in capsys.readouterr().out


def test_the_table_of_faults_names_every_one_of_them() -> None:
    text = FAULTS.read_text()
    assert len(CASES) >= 25
    assert [fault for fault in CASES if f"| {fault} |" not in text] == []

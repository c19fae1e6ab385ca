"""Each cause is produced on a real server, and its words quote nothing of what the server says."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import text

from cli.dev.servers import HOST, PostgresServer, free_port
from db.connection import engine
from db.connection.causes import Cause
from db.connection.engine import Database
from db.connection.errors import DatabaseUnavailable
from tests.support.certificates import Authority, Certificate
from tests.support.debian import DEBIAN, DebianServer
from tests.support.pooler import start_pgbouncer
from tests.support.settings import MakeSettings
from tests.support.waiting import wait_until

SECRETS = ("hunter2", "someone", "some_database", "nohost")
HBA = f"""
host    open        all             {HOST}/32 trust
hostssl tls_only    all             {HOST}/32 trust
hostnossl tls_only  all             {HOST}/32 reject
hostssl certified   all             {HOST}/32 scram-sha-256 clientcert=verify-ca
host    refused     all             {HOST}/32 reject
host    all         all             {HOST}/32 scram-sha-256
"""
SETUP = """
    CREATE ROLE someone LOGIN PASSWORD 'hunter2';
    CREATE ROLE single LOGIN PASSWORD 'hunter2' CONNECTION LIMIT 0;
    CREATE DATABASE open; CREATE DATABASE tls_only; CREATE DATABASE closed; CREATE DATABASE certified;
    REVOKE CONNECT ON DATABASE closed FROM PUBLIC;
    ALTER SYSTEM SET ssl = on;
    ALTER SYSTEM SET ssl_ca_file = 'server.crt';
    ALTER SYSTEM SET ssl_min_protocol_version = 'TLSv1.3';
"""


class FaultyServer:
    """A server with TLS, the URLs that lead to it, and a client's certificate that it does not trust."""

    def __init__(self, server: PostgresServer, certificate: Path, stranger: Certificate) -> None:
        self.server = server
        self.certificate = certificate
        self.stranger = stranger

    def url(self, database: str = "postgres", user: str = "someone:hunter2", **options: str) -> str:
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"postgresql://{user}@{HOST}:{self.server.port}/{database}?{query}"

    def admit(self, setup: str = "") -> None:
        """Run statements, and let HBA decide who may connect."""
        with psycopg.connect(self.server.url, autocommit=True) as admin:
            for statement in filter(str.strip, setup.split(";")):
                admin.execute(statement.encode())
            (self.server.directory / "pg_hba.conf").write_text(HBA)
            admin.execute("SELECT pg_reload_conf()")


@pytest.fixture(scope="module")
def place() -> Iterator[FaultyServer]:
    directory = Path(tempfile.mkdtemp(prefix="clerk-sync-"))
    directory.chmod(0o711)
    if not DEBIAN.exists():
        pytest.skip("the embedded PostgreSQL is built without TLS, and Debian's is not installed")
    server = DebianServer(directory / "postgres", free_port(), durable=False)
    certificate = directory / "root.crt"
    place = FaultyServer(server, certificate, Authority(directory / "another").sign("stranger"))
    server.start()
    make_certificate(server.data)
    certificate.write_bytes((server.data / "server.crt").read_bytes())
    place.admit(SETUP)
    yield place
    server.stop("immediate")
    shutil.rmtree(directory)


def make_certificate(data: Path) -> None:
    subject = ["-subj", "/CN=elsewhere.example"]
    files = ["-keyout", str(data / "server.key"), "-out", str(data / "server.crt")]
    subprocess.run(
        ["openssl", "req", "-x509", "-nodes", "-newkey", "rsa:2048", "-days", "2", *subject, *files],
        check=True,
        capture_output=True,
    )
    owner = data.stat()
    for name in ("server.key", "server.crt"):
        path = data / name
        path.chmod(0o600)
        os.chown(path, owner.st_uid, owner.st_gid)


CauseOf = Callable[[str], Cause]


@pytest.fixture
def cause_of(make_settings: MakeSettings) -> CauseOf:
    """Return the cause of what a connection meets; its words hold nothing of the URL or the server's text."""

    def connect(url: str) -> Cause:
        settings = make_settings(redis_url=None, database_url=url, database_url_unpooled=None)
        with Database(settings, attempts=1) as database, pytest.raises(DatabaseUnavailable) as refused:
            database.run(lambda connection: connection.execute(text("SELECT 1")))
        words = str(refused.value)
        assert words.endswith(f": {refused.value.cause.sentence}; {refused.value.cause.next_step}")
        assert "\n" not in words
        assert not any(secret in words for secret in (*SECRETS, HOST))
        return refused.value.cause

    return connect


URLS: dict[Cause, Callable[[FaultyServer], str]] = {
    Cause.NOTHING_LISTENS: lambda _: f"postgresql://someone:hunter2@{HOST}:{free_port()}/some_database",
    Cause.HOST_NOT_FOUND: lambda _: "postgresql://someone:hunter2@nohost.invalid/some_database",
    Cause.PASSWORD_REFUSED: lambda place: place.url(user="someone:hunter22"),
    Cause.PASSWORD_MISSING: lambda place: place.url(user="someone"),
    Cause.ROLE_MISSING: lambda place: place.url("open", user="someone_else"),
    Cause.DATABASE_MISSING: lambda place: place.url("some_database"),
    Cause.NOT_ALLOWED: lambda place: place.url("refused"),
    Cause.TOO_MANY_CONNECTIONS: lambda place: place.url(user="single:hunter2"),
    Cause.DATABASE_RIGHTS: lambda place: place.url("closed"),
    Cause.TLS_REQUIRED_OR_NOT_ALLOWED: lambda place: place.url("tls_only", user="someone", sslmode="disable"),
    Cause.CERTIFICATE_NOT_TRUSTED: lambda place: place.url(sslmode="verify-full", sslrootcert="system"),
    Cause.ROOT_CERTIFICATE_MISSING: lambda place: place.url(sslmode="verify-full", sslrootcert="/none"),
    Cause.CERTIFICATE_OF_ANOTHER_HOST: lambda place: place.url(
        sslmode="verify-full", sslrootcert=str(place.certificate)
    ),
    Cause.CHANNEL_BINDING: lambda place: place.url(sslmode="disable", channel_binding="require"),
    Cause.CLIENT_CERTIFICATE: lambda place: place.url("certified", sslmode="require"),
    Cause.TLS_FAILED: lambda place: place.url(sslmode="require", ssl_max_protocol_version="TLSv1.2"),
    # The broadcast address: Linux refuses it without sending anything.
    Cause.UNREACHABLE: lambda _: "postgresql://someone:hunter2@255.255.255.255/some_database",
}


@pytest.mark.parametrize("cause", URLS, ids=lambda cause: cause.name)
def test_a_connection_that_fails_says_why(cause: Cause, place: FaultyServer, cause_of: CauseOf) -> None:
    assert cause_of(URLS[cause](place)) is cause


def test_a_server_without_tls_a_stranger_and_a_silent_one_are_distinguished(
    cause_of: CauseOf, database_url_unpooled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "CONNECT_TIMEOUT_S", 2)
    with socket.create_server((HOST, 0)) as silent, socket.create_server((HOST, 0)) as stranger:
        threading.Thread(target=answer, args=(stranger,), daemon=True).start()
        for cause, url in (
            (Cause.TLS_NOT_OFFERED, f"{database_url_unpooled}?sslmode=require"),
            (Cause.NOT_POSTGRESQL, f"postgresql://{HOST}:{stranger.getsockname()[1]}/x?sslmode=disable"),
            (Cause.CONNECT_TIMEOUT, f"postgresql://{HOST}:{silent.getsockname()[1]}/x"),
        ):
            assert cause_of(url) is cause


def answer(listener: socket.socket) -> None:
    """Answer one client as a web server does."""
    client, _ = listener.accept()
    with client:
        client.recv(1000)
        client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


REFUSED_OPTIONS = [
    "sslmode=verify-ca&sslrootcert=system",
    "ssl_min_protocol_version=hunter2",
    "load_balance_hosts=hunter2",
    "keepalives=hunter2",
    "service=hunter2",
    "options=-c%20hunter2%3D1",
    "options=-c%20work_mem%3Dhunter2",
    "options=--hunter2",
]


@pytest.mark.skipif(os.environ.get("TEST_PGBOUNCER") == "1", reason="a pooler refuses others")
@pytest.mark.parametrize("options", REFUSED_OPTIONS)
def test_a_refused_option_of_the_url_is_named(options: str, cause_of: CauseOf, database_url: str) -> None:
    assert cause_of(f"{database_url}?{options}") is Cause.URL_OPTION


@pytest.mark.skipif(os.environ.get("TEST_PGBOUNCER") != "1", reason="TEST_PGBOUNCER=1 starts the pooler")
def test_a_pooler_that_refuses_an_option_is_named(cause_of: CauseOf, database_url: str) -> None:
    assert cause_of(f"{database_url}?options=-c%20work_mem%3D1MB") is Cause.STARTUP_OPTION


@pytest.mark.parametrize(
    ("mode", "cause"),
    [
        ("disable", Cause.TLS_REQUIRED_OR_NOT_ALLOWED),
        ("prefer", Cause.NOT_ALLOWED),
        ("require", Cause.NOT_ALLOWED),
    ],
)
def test_an_address_that_is_refused_is_not_said_to_lack_tls_alone(
    mode: str, cause: Cause, place: FaultyServer, cause_of: CauseOf
) -> None:
    assert cause_of(place.url("refused", sslmode=mode)) is cause


def test_an_untrusted_client_certificate_is_named(place: FaultyServer, cause_of: CauseOf) -> None:
    cert, key = (str(path) for path in place.stranger)
    url = place.url("certified", sslmode="require", sslcert=cert, sslkey=key)
    assert cause_of(url) is Cause.CLIENT_CERTIFICATE


def test_a_server_that_waits_for_sessions_is_stopping(place: FaultyServer, cause_of: CauseOf) -> None:
    with psycopg.connect(place.server.url):
        assert place.server.pid
        os.kill(place.server.pid, signal.SIGTERM)
        wait_until(lambda: "stopping" in (place.server.data / "postmaster.pid").read_text(), 30)
        assert cause_of(place.url()) is Cause.STOPPING
    wait_until(lambda: not place.server.running, 30)
    assert cause_of(place.url()) is Cause.NOTHING_LISTENS
    place.server.start()
    place.admit()


@pytest.mark.skipif(shutil.which("pgbouncer") is None, reason="PgBouncer is not installed")
@pytest.mark.parametrize(
    ("option", "cause"),
    [
        ("query_wait_timeout = 1", Cause.POOLER),
        ("client_login_timeout = 1", Cause.POOLER),
        ("max_client_conn = 0", Cause.TOO_MANY_CONNECTIONS),
    ],
)
def test_a_pooler_without_a_server_or_without_room_says_which(
    option: str, cause: Cause, server_directory: Path, cause_of: CauseOf
) -> None:
    away = PostgresServer(server_directory / "away", free_port())
    process, url = start_pgbouncer(server_directory / "pgbouncer", away, option)
    try:
        assert cause_of(url) is cause
    finally:
        process.end()


@pytest.mark.skipif(shutil.which("pgbouncer") is None, reason="PgBouncer is not installed")
def test_a_pooler_in_statement_mode_is_named(
    postgres_server: PostgresServer, server_directory: Path, cause_of: CauseOf
) -> None:
    process, url = start_pgbouncer(server_directory / "pgbouncer", postgres_server, "pool_mode = statement")
    try:
        assert cause_of(url) is Cause.POOL_MODE
    finally:
        process.end()


WORDS = {
    "SSL required": Cause.TLS_REQUIRED,
    "connection is insecure (try using `sslmode=require`)": Cause.TLS_REQUIRED,
    "The requested endpoint could not be found, or you don't have access to it.": Cause.ENDPOINT,
    "The endpoint has been disabled. Enable it using the API and retry.": Cause.ENDPOINT,
    "Your account or project has exceeded the compute time quota.": Cause.ENDPOINT,
    'database "some_database" is disabled': Cause.POOLER,
    "database removed": Cause.POOLER,
    "login rejected": Cause.NOT_ALLOWED,
    "someone has fallen asleep": Cause.NO_CONNECTION,
    "": Cause.NO_ANSWER,
}


@pytest.mark.parametrize(("words", "cause"), WORDS.items(), ids=WORDS)
def test_messages_of_poolers_or_providers_are_understood(words: str, cause: Cause, cause_of: CauseOf) -> None:
    with refusing(words) as port:
        url = f"postgresql://someone:hunter2@{HOST}:{port}/some_database?sslmode=disable"
        assert cause_of(url) is cause


@contextmanager
def refusing(words: str) -> Iterator[int]:
    """Answer each client with an ErrorResponse of PostgreSQL's protocol, or without words with nothing."""
    fields = f"SFATAL\0C08000\0M{words}\0\0".encode()

    def serve(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                with client:
                    client.recv(1000)
                    client.sendall(b"E" + (len(fields) + 4).to_bytes(4, "big") + fields if words else b"")

    with socket.create_server((HOST, 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_a_replica_is_named_and_no_connection_to_it_is_kept(
    own_postgres: PostgresServer, make_settings: MakeSettings
) -> None:
    settings = make_settings(redis_url=None, database_url=own_postgres.url, database_url_unpooled=None)
    connections = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'clerk-sync'"
    with Database(settings, attempts=1) as database, Database(settings, attempts=1) as started_later:
        database.ping()
        own_postgres.stop()
        (own_postgres.data / "standby.signal").touch()
        own_postgres.start()
        with psycopg.connect(own_postgres.url, autocommit=True) as admin:
            for asked in (database, started_later):
                with pytest.raises(DatabaseUnavailable) as refused:
                    asked.ping()
                assert refused.value.cause is Cause.READ_ONLY
                wait_until(lambda: admin.execute(connections).fetchone() == (0,), 10)
            admin.execute("SELECT pg_promote()")
        database.ping()
        started_later.ping()


RAISED = "DO $$ BEGIN RAISE 'hunter2' USING ERRCODE = '{}'; END $$"
STATEMENTS: dict[str, tuple[Cause, list[str]]] = {
    "a table": (Cause.TABLE_RIGHTS, ["SET LOCAL ROLE pg_monitor", "SELECT FROM users"]),
    "a schema": (
        Cause.SCHEMA_USAGE,
        ["CREATE SCHEMA s", "CREATE TABLE s.t ()", "SET LOCAL ROLE pg_monitor", "SELECT FROM s.t"],
    ),
    "another role's transaction": (
        Cause.END_RIGHTS,
        ["SET LOCAL ROLE pg_monitor", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"],
    ),
    "an owner": (Cause.CREATE_RIGHTS, ["SET LOCAL ROLE pg_monitor", "ALTER TABLE users ADD x int"]),
    "another right": (
        Cause.RIGHTS,
        [
            "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
            "REVOKE EXECUTE ON FUNCTION f FROM PUBLIC",
            "SET LOCAL ROLE pg_monitor",
            "SELECT f()",
        ],
    ),
    "missing": (Cause.TABLE_MISSING, ["SELECT FROM nowhere"]),
    "read-only": (Cause.READ_ONLY, ["SET TRANSACTION READ ONLY", "DELETE FROM users"]),
    "slow": (Cause.STATEMENT_TIMEOUT, ["SET LOCAL statement_timeout = 50", "SELECT pg_sleep(9)"]),
    "ended": (Cause.STOPPING, ["SELECT pg_terminate_backend(pg_backend_pid())"]),
    "anything else": (Cause.REFUSED, ["SELECT FROM FROM"]),
    "disk": (Cause.DISK_FULL, [RAISED.format("53100")]),
    "memory": (Cause.OUT_OF_RESOURCES, [RAISED.format("53200")]),
    "starting": (Cause.STARTING, [RAISED.format("57P03")]),
}


@pytest.mark.parametrize(("cause", "statements"), STATEMENTS.values(), ids=STATEMENTS)
def test_failed_statements_say_why(cause: Cause, statements: list[str], make_settings: MakeSettings) -> None:
    def work(connection: Any) -> None:
        for statement in statements:
            connection.execute(text(statement))

    with (
        Database(make_settings(redis_url=None), attempts=1) as database,
        pytest.raises(DatabaseUnavailable) as refused,
    ):
        database.run(work)
    assert refused.value.cause is cause
    assert not any(secret in str(refused.value) for secret in SECRETS)

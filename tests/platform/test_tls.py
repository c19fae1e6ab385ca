"""TLS to PostgreSQL, PgBouncer and Redis, with certificates that are made on the spot."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psycopg
import pytest

from cli.dev.servers import HOST, free_port
from db.connection.engine import Database
from db.connection.errors import DatabaseUnavailable
from tests.support import commands
from tests.support.certificates import Authority
from tests.support.debian_servers import PGBOUNCER, POSTGRES, URL_PASSWORD, pgbouncer, postgres, server_folder
from tests.support.deliveries import genuine, signed
from tests.support.redis_servers import BINARY, redis_server
from tests.support.settings import MakeSettings
from tests.support.stack import Stack
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(POSTGRES is None, reason="no PostgreSQL with TLS is installed")
STRANGER = "DNS:another.example"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def ours(authority: Authority) -> Iterator[int]:
    """The port of a PostgreSQL whose certificate is for its address."""
    with server_folder() as folder, postgres(folder, authority.sign("postgres", f"IP:{HOST}")) as port:
        yield port


@pytest.fixture(scope="module")
def strangers(authority: Authority) -> Iterator[int]:
    """The port of a PostgreSQL whose certificate is for another host name."""
    with server_folder() as folder, postgres(folder, authority.sign("other", STRANGER)) as port:
        yield port


def _url(port: int, options: str) -> str:
    return f"postgresql://postgres:{URL_PASSWORD}@{HOST}:{port}/postgres?{options}"


def _ping(make_settings: MakeSettings, url: str) -> None:
    database = Database(make_settings(database_url=url, database_url_unpooled=None, redis_url=None))
    try:
        for seconds in (0.5, 1, 2):  # a server that has just started may still say so
            try:
                return database.ping()
            except DatabaseUnavailable as error:
                if "starting up" not in str(error):
                    raise
            time.sleep(seconds)
        database.ping()
    finally:
        database.dispose()


@pytest.mark.parametrize(
    "options",
    [
        "sslmode=require",
        "sslmode=require&channel_binding=require",
        "sslmode=verify-ca&sslrootcert={ca}",
        "sslmode=verify-full&sslrootcert={ca}",
        "sslmode=verify-full&sslrootcert={ca}&channel_binding=require",
    ],
)
def test_postgresql_is_reached_over_tls(
    make_settings: MakeSettings, authority: Authority, ours: int, options: str
) -> None:
    _ping(make_settings, _url(ours, options.format(ca=authority.ca)))


def test_verify_ca_takes_any_host(make_settings: MakeSettings, authority: Authority, strangers: int) -> None:
    _ping(make_settings, _url(strangers, f"sslmode=verify-ca&sslrootcert={authority.ca}"))


@pytest.mark.skipif(not (PGBOUNCER and BINARY), reason="needs pgbouncer and redis-server")
def test_a_delivery_goes_its_way_with_tls_on_every_connection(
    make_settings: MakeSettings, authority: Authority, ours: int, tmp_path: Path
) -> None:
    """The way is receiver, Redis, worker, PgBouncer, PostgreSQL; migrations go to PostgreSQL alone."""
    verified = f"sslmode=verify-full&sslrootcert={authority.ca}"
    with (
        server_folder() as folder,
        pgbouncer(folder, ours, authority.sign("pgbouncer", f"IP:{HOST}"), authority) as pooled,
        redis_server(tmp_path, certificate=authority.sign("redis")) as redis,
    ):
        direct = _url(ours, f"{verified}&channel_binding=require")
        settings = make_settings(
            database_url=_url(pooled, verified),
            database_url_unpooled=direct,
            redis_url=f"rediss://{HOST}:{redis}",
            redis_ssl_ca_certs=str(authority.ca),
            port=free_port(),
            web_workers=1,
        )
        upgraded = commands.run(settings, "db", "upgrade")
        assert upgraded.returncode == 0, upgraded.stderr
        with Stack(settings, tmp_path) as stack, psycopg.connect(direct, autocommit=True) as database:
            content = genuine()
            sent = httpx.post(
                stack.url, content=content, headers=signed(content), timeout=20, trust_env=False
            )
            assert sent.status_code == 202, stack.logs()
            wait_until(lambda: database.execute("SELECT 1 FROM users").fetchone(), 20, stack.logs)

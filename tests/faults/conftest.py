"""Servers that the tests of this package break, and a house that has to live through all of it."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from tests.faults.house import House
from tests.faults.servers import Servers
from tests.jobs import RqView
from tests.stack import wait_until

TABLES = "users, user_sync, webhook_events, membership_sync, organization_sync"
KNOWN_AGAIN_S = 15
MAX_QUEUE_DEPTH = 1000


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """PostgreSQL and Redis, which may be broken."""
    with Servers() as servers:
        yield servers


@pytest.fixture
def directory() -> Iterator[Path]:
    """Where processes write their logs."""
    with tempfile.TemporaryDirectory(prefix="clerk-sync-") as path:
        yield Path(path)


@pytest.fixture(scope="session")
def _house(servers: Servers) -> Iterator[House]:
    settings = servers.fresh(max_queue_depth=MAX_QUEUE_DEPTH, web_workers=2, batch_size=25)
    with tempfile.TemporaryDirectory(prefix="clerk-sync-") as path:
        with House(settings, Path(path), workers=2) as house:
            yield house
        assert "Traceback" not in house.logs()


@pytest.fixture
def house(servers: Servers, _house: House) -> Iterator[House]:
    """A receiver of two processes and two workers, the same ones for every test, all empty.

    None of them may end because of what a test breaks.
    """
    servers.ensure_running()
    servers.database = _house.database
    with servers.connection() as connection, servers.client() as client:
        connection.execute(f"TRUNCATE {TABLES}")
        client.flushall()
        wait_until(lambda: are_known(client, _house), KNOWN_AGAIN_S, _house.logs)
    before = [member.pid for member in _house.members]
    yield _house
    assert [member.pid for member in _house.members] == before, _house.logs()


@pytest.fixture
def redis(servers: Servers) -> Iterator[Redis]:
    """A client of Redis, past the line."""
    with servers.client() as client:
        yield client


def are_known(client: Redis, house: House) -> bool:
    """Say whether the workers, and nobody else, have registered."""
    return {worker.pid for worker in RqView(client).workers()} == {worker.pid for worker in house.workers}

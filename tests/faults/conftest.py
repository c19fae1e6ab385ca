"""Servers that the tests of this package break, and a service that has to live through all of it."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.faults.servers import Servers
from tests.faults.service import Service, what_is_left
from tests.support.queue import RqView
from tests.support.waiting import wait_until
from worker.queue.consumer import CONSUMERS_KEY
from worker.queue.rq_format import WORKER_PREFIX, WORKERS_KEY

TABLES = "users, user_sync, user_profiles, webhook_events, membership_sync, organization_sync, instance_sync"
KNOWN_AGAIN_S = 40
IN_HAND = {"queued", "held", "started"}
MAX_QUEUE_DEPTH = 1000
REDIS_NUMBER = 14  # its workers must not take what other trials put on their queue
OTHER_REDIS_NUMBER = 13


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
def _service(servers: Servers) -> Iterator[Service]:
    with inhabited(servers, REDIS_NUMBER) as service:
        yield service


@pytest.fixture(scope="module")
def _membership_service(servers: Servers) -> Iterator[Service]:
    with inhabited(servers, OTHER_REDIS_NUMBER, organization_source="membership") as service:
        yield service


@pytest.fixture
def service(servers: Servers, _service: Service) -> Iterator[Service]:
    """A receiver of two processes and two workers, the same ones for every test, all empty.

    None of them may end because of what a test breaks.
    """
    with emptied(servers, _service):
        yield _service


@pytest.fixture
def membership_service(servers: Servers, _membership_service: Service) -> Iterator[Service]:
    """The same beside it, only that memberships say who is in which organization."""
    with emptied(servers, _membership_service):
        yield _membership_service


@contextmanager
def inhabited(servers: Servers, redis_number: int, **overrides: Any) -> Iterator[Service]:
    """Start a service for the block; `overrides` are settings. No process may write a traceback."""
    settings = servers.fresh(
        redis_number=redis_number, max_queue_depth=MAX_QUEUE_DEPTH, web_workers=2, batch_size=25, **overrides
    )
    with tempfile.TemporaryDirectory(prefix="clerk-sync-") as path:
        with Service(settings, Path(path), workers=2) as service:
            yield service
        assert "Traceback" not in service.logs()


@contextmanager
def emptied(servers: Servers, service: Service) -> Iterator[None]:
    """Let a service begin a test with nothing in it; no process may end during the block."""
    servers.ensure_running()
    servers.database = service.database
    wait_until(lambda: not IN_HAND & what_is_left(service.redis).keys(), KNOWN_AGAIN_S, service.logs)
    with servers.connection() as connection:
        connection.execute(f"TRUNCATE {TABLES}")
    forget_jobs(service)
    wait_until(lambda: are_known(service), KNOWN_AGAIN_S, service.logs)
    before = [process.pid for process in service.processes]
    yield
    assert [process.pid for process in service.processes] == before, service.logs()


def forget_jobs(service: Service) -> None:
    """Empty Redis, except for what it knows of workers: they would not be known before their next beats.

    When there is anybody else's name among theirs, all goes.
    """
    if not are_known(service):
        service.redis.flushdb()
    stays = (WORKERS_KEY.encode(), b"rq:workers", CONSUMERS_KEY.encode())
    for key in list(service.redis.scan_iter()):
        if key not in stays and not key.startswith(WORKER_PREFIX.encode()):
            service.redis.delete(key)


def are_known(service: Service) -> bool:
    """Say whether the workers have registered, and no others."""
    known = {worker.pid for worker in RqView(service.redis).workers()}
    return known == {worker.pid for worker in service.workers}

"""Servers to inject faults into, and a service that must survive every test."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from db.models import Base
from tests.faults.servers import Servers
from tests.faults.service import Service, what_is_left
from tests.support.directories import open_directory
from tests.support.queue import RqView
from tests.support.waiting import wait_until
from worker.queue.consumer import CONSUMERS_KEY
from worker.queue.rq_format import WORKER_PREFIX, WORKERS_KEY

TABLES = ", ".join(Base.metadata.tables)
KNOWN_AGAIN_S = 40
IN_HAND = {"queued", "held", "started"}  # jobs of workers, or soon to be
MAX_QUEUE_DEPTH = 1000
REDIS_NUMBER = 14  # so that its workers take no jobs of other trials
OTHER_REDIS_NUMBER = 13


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    with Servers() as servers:
        yield servers


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory for the logs of processes."""
    with open_directory() as path:
        yield path


@pytest.fixture(scope="session")
def _service(servers: Servers) -> Iterator[Service]:
    with shared_service(servers, REDIS_NUMBER) as service:
        yield service


@pytest.fixture(scope="module")
def _membership_service(servers: Servers) -> Iterator[Service]:
    with shared_service(servers, OTHER_REDIS_NUMBER, organization_source="membership") as service:
        yield service


@pytest.fixture
def service(servers: Servers, _service: Service) -> Iterator[Service]:
    """A receiver of two processes and two workers, the same for every test, all empty. None may end."""
    with emptied(servers, _service):
        yield _service


@pytest.fixture
def membership_service(servers: Servers, _membership_service: Service) -> Iterator[Service]:
    """The same, with ORGANIZATION_SOURCE=membership."""
    with emptied(servers, _membership_service):
        yield _membership_service


@contextmanager
def shared_service(servers: Servers, redis_number: int, **overrides: Any) -> Iterator[Service]:
    """Run a service for the length of the block; `overrides` are settings. No process may log a traceback."""
    settings = servers.fresh(
        redis_number=redis_number, max_queue_depth=MAX_QUEUE_DEPTH, web_workers=2, batch_size=25, **overrides
    )
    with open_directory() as path:
        with Service(settings, path, workers=2) as service:
            yield service
        assert "Traceback" not in service.logs()


@contextmanager
def emptied(servers: Servers, service: Service) -> Iterator[None]:
    """Empty a service before the block; no process may end during the block."""
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
    """Empty Redis, but keep the registrations of the workers, which would be missing until their next beats.

    If other workers are registered too, delete all.
    """
    if not are_known(service):
        service.redis.flushdb()
    stays = (WORKERS_KEY.encode(), b"rq:workers", CONSUMERS_KEY.encode())
    for key in list(service.redis.scan_iter()):
        if key not in stays and not key.startswith(WORKER_PREFIX.encode()):
            service.redis.delete(key)


def are_known(service: Service) -> bool:
    """Return whether exactly these workers are registered."""
    known = {worker.pid for worker in RqView(service.redis).workers()}
    return known == {worker.pid for worker in service.workers}

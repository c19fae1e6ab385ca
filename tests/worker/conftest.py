"""A queue of the test's own, from the receiver's side, a worker's side and RQ's."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from redis import Redis

import config
from tests.support.service import AskHealth
from tests.support.settings import NO_DATABASE, MakeSettings
from tests.support.sync import open_context
from worker.monitoring.health import Status
from worker.queue.consumer import ReservedJobs
from worker.queue.producer import DeliveryQueue, delivery_queue
from worker.sync.context import SyncContext


@pytest.fixture
def queue(make_settings: MakeSettings) -> Iterator[DeliveryQueue]:
    """The receiver's side of the queue."""
    receiver = delivery_queue(make_settings(**NO_DATABASE))
    yield receiver
    receiver.close()


@pytest.fixture
def consumer(redis: Redis) -> Callable[[str], ReservedJobs]:
    """Make a worker's side of the queue, under a name."""
    return lambda name: ReservedJobs(redis, name)


@pytest.fixture
def reserved(redis: Redis) -> ReservedJobs:
    """The side of a worker whose name is `w`."""
    return ReservedJobs(redis, "w")


@pytest.fixture
def report(make_settings: MakeSettings) -> Iterator[AskHealth]:
    """Return what /health says; keywords are settings, and calls with the same ones share connections."""
    made: dict[str, Status] = {}

    def ask(**overrides: Any) -> dict[str, Any]:
        key = repr(overrides)
        if key not in made:
            made[key] = Status(make_settings(**overrides))
        return made[key].report()

    yield ask
    for status in made.values():
        status.close()


@pytest.fixture
def both(settings: config.Settings) -> Iterator[SyncContext]:
    """Clerk and the tables that `settings` names."""
    with open_context(settings) as made:
        yield made

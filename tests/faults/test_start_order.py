"""The service starts before its servers, before its tables, or on another schema."""

from collections.abc import Callable
from pathlib import Path
from random import Random

import httpx

from tests.faults.chaos import await_settled, compare
from tests.faults.random_histories import some_deliveries
from tests.faults.servers import Servers
from tests.faults.service import Service, takes_deliveries
from tests.faults.svix import Svix
from tests.support.migrations import migrate
from tests.support.waiting import wait_until
from worker.redis_causes import CLOSED

SOON_S = 30
OLDEST = "0001"
NO_ANSWER = (
    "no connection to the database (DATABASE_URL): the connection was lost, or no answer came in time;"
    " wait: the worker reconnects; if it lasts, look at the server's log and at the pooler"
)
SHORT_WAITS = "tests.faults.short_waits_worker"  # instead of a worker's longest pauses


def test_started_before_everything_it_waits_says_what_for_and_then_works(
    servers: Servers, directory: Path
) -> None:
    deliveries = some_deliveries(301, 60)
    settings = servers.fresh(migrated=False)
    servers.postgres.stop()
    servers.redis.stop()
    with (
        Service(settings, directory, is_awaited=False, worker=SHORT_WAITS) as service,
        Svix(service.ports, Random(0)) as svix,
    ):
        (worker,) = service.workers
        svix.send(deliveries)
        # the proxy accepts each connection, and closes it, as nothing listens behind
        worker.await_line("waiting", SOON_S, reason=CLOSED)
        await_health(service, lambda errors: errors.get("redis") == CLOSED)
        wait_until(lambda: svix.answers["503"] > 0, SOON_S, service.logs)
        servers.redis.start()
        wait_until(lambda: takes_deliveries(service.ports[0]), SOON_S, service.logs)
        worker.await_line("waiting", SOON_S, reason=NO_ANSWER)
        await_health(service, lambda errors: errors.get("database") == NO_ANSWER)
        servers.postgres.start()
        missing = "the schema is missing: run clerk-sync db upgrade"
        worker.await_line("waiting", SOON_S, reason=missing)
        await_health(service, {"schema": missing}.__eq__)
        migrate(settings, OLDEST)
        old = "the schema is old: run clerk-sync db upgrade"
        worker.await_line("waiting", SOON_S, reason=old)
        await_health(service, {"schema": old}.__eq__)
        migrate(settings)
        await_settled(service, svix)
        await_health(service, {}.__eq__)
        assert [process.running for process in service.processes] == [True, True]
    compare(settings, deliveries)


def test_a_schema_that_is_newer_is_said_and_does_not_stop_the_version_that_is_being_replaced(
    servers: Servers, directory: Path
) -> None:
    deliveries = some_deliveries(302, 60)
    settings = servers.fresh()
    with servers.connection() as connection:
        connection.execute("UPDATE clerk_sync_version SET version_num = 'newer'")
    with Service(settings, directory) as service, Svix(service.ports, Random(0)) as svix:
        svix.send(deliveries)
        await_settled(service, svix)
        newer = "the schema is newer than this version: deploy the version that made it"
        (worker,) = service.workers
        assert worker.lines(newer)
        await_health(service, {"schema": newer}.__eq__)
    compare(settings, deliveries)


def await_health(service: Service, holds: Callable[[dict[str, str]], object]) -> None:
    """Wait until that holds for the errors of /health."""
    wait_until(lambda: holds(errors_of_health(service)), SOON_S, lambda: str(errors_of_health(service)))


def errors_of_health(service: Service) -> dict[str, str]:
    """Return the error of each failing check of /health; the receiver may still be starting."""
    with httpx.Client(transport=httpx.HTTPTransport(retries=5), timeout=20, trust_env=False) as client:
        checks = client.get(service.url("/health")).json()["checks"]
    return {name: check["error"] for name, check in checks.items() if check["error"]}

"""A server is unavailable for long, or hangs; no delivery is lost."""

import time
from pathlib import Path
from random import Random

from tests.faults.chaos import await_settled, compare
from tests.faults.damage import FAULTS, Scene
from tests.faults.outage import (
    ANSWER_S,
    BACK_S,
    check_outage,
    check_redis_outage,
    without_postgres,
    without_redis,
)
from tests.faults.random_histories import some_deliveries
from tests.faults.servers import Servers
from tests.faults.service import Service, takes_deliveries
from tests.faults.svix import Svix
from tests.support.stack import environment
from tests.support.supervised_process import has_begun, running, supervised_worker
from tests.support.waiting import wait_until

OUTAGE_S = 10  # in which the worker with short waits waits as often as others in ten minutes
TEN_MINUTES_OF_WAITS = 50
AWAY_S = 5
HANGS_S = 3


def test_ten_minutes_without_postgres_stop_no_intake_fail_no_job_and_burn_no_retry(
    servers: Servers, service: Service, directory: Path
) -> None:
    deliveries = some_deliveries(201, 600)
    worker = supervised_worker(
        "worker", environment(service.settings), directory, "tests.faults.short_waits_worker"
    )
    with running(worker):
        wait_until(lambda: has_begun(worker), BACK_S, worker.text)
        outage = without_postgres(servers, service, deliveries, OUTAGE_S)
        assert worker.text().count('"waiting"') > TEN_MINUTES_OF_WAITS
        assert worker.running
    compare(service.settings, deliveries)
    check_outage(outage)
    assert outage.applied_in_s < BACK_S


def test_connections_that_are_forgotten_on_their_way_are_given_up(servers: Servers, service: Service) -> None:
    deliveries = some_deliveries(204, 400)
    with Svix(service.ports, Random(0)) as svix:
        svix.send(deliveries[:200])
        servers.postgres_proxy.forget()
        svix.send(deliveries[200:])
        await_settled(service, svix)
    assert any("database retry" in worker.text() for worker in service.workers)
    compare(service.settings, deliveries)


def test_while_redis_is_away_the_answer_is_503_health_says_so_and_what_was_queued_is_there_after(
    servers: Servers, service: Service
) -> None:
    deliveries = some_deliveries(203, 200)
    check_redis_outage(without_redis(servers, service, deliveries, AWAY_S))
    compare(service.settings, deliveries)


def test_while_redis_hangs_the_answer_is_503_within_five_seconds_and_all_comes_back_by_itself(
    servers: Servers, service: Service
) -> None:
    deliveries = some_deliveries(202, 150)
    with Svix(service.ports, Random(0)) as svix:
        with FAULTS["redis hangs"].damage(Scene(servers, service, 0)):
            svix.send(deliveries, over_s=HANGS_S)
            time.sleep(HANGS_S)
            assert set(svix.answers) == {"503"}
            assert not takes_deliveries(service.ports[0])
        began = time.monotonic()
        await_settled(service, svix)
        assert time.monotonic() - began < BACK_S
        assert max(svix.answered_in) < ANSWER_S
    compare(service.settings, deliveries)

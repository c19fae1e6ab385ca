"""A server is away for long, and nobody but the deliveries waits for it."""

import time
from pathlib import Path
from random import Random

import pytest

from tests.faults.chaos import await_settled, compare
from tests.faults.damage import FAULTS, Scene
from tests.faults.house import House, has_begun, running, takes_deliveries, worker_member
from tests.faults.outage import without_postgres
from tests.faults.past import some_deliveries
from tests.faults.servers import Servers
from tests.faults.svix import Svix
from tests.stack import environment, wait_until
from worker.rq_layout import RETRY_INTERVALS_S

OUTAGE_S = 10  # and the hurried worker waits as often as others do in ten minutes
TEN_MINUTES_OF_WAITS = 50
GROWTH_MB = 15
ANSWER_S = 5
AWAY_S = 3
BACK_S = 20


def test_ten_minutes_without_postgres_stop_no_intake_fail_no_job_and_burn_no_retry(
    servers: Servers, house: House, directory: Path
) -> None:
    deliveries = some_deliveries(201, 600)
    hurried = worker_member("hurried", environment(house.settings), directory, "tests.faults.hurried")
    with running(hurried):
        wait_until(lambda: has_begun(hurried), BACK_S, hurried.read_log)
        outage = without_postgres(servers, house, deliveries, OUTAGE_S)
        assert hurried.read_log().count('"waiting"') > TEN_MINUTES_OF_WAITS
        assert hurried.process.running
    compare(house.settings, deliveries)
    assert set(outage.answers) == {"202"}
    assert outage.slowest_answer_s < ANSWER_S
    assert set(outage.retries_left) == {len(RETRY_INTERVALS_S)}
    assert outage.waits > 0
    growth = {name: after - outage.memory_before[name] for name, after in outage.memory_after.items()}
    assert max(growth.values()) < GROWTH_MB, growth
    assert outage.applied_in_s < BACK_S


@pytest.mark.parametrize("fault", ["redis stopped", "redis hangs"])
def test_without_redis_the_answer_is_503_within_five_seconds_and_all_comes_back_by_itself(
    servers: Servers, house: House, fault: str
) -> None:
    deliveries = some_deliveries(202, 150)
    with Svix(house.ports, Random(0)) as svix:
        with FAULTS[fault].damage(Scene(servers, house, 0)):
            svix.send(deliveries, over_s=AWAY_S)
            time.sleep(AWAY_S)
            assert set(svix.answers) == {"503"}
            assert not takes_deliveries(house.ports[0])
        began = time.monotonic()
        await_settled(house, svix)
        assert time.monotonic() - began < BACK_S
        assert max(svix.answered_in) < ANSWER_S
    compare(house.settings, deliveries)

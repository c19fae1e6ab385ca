"""A short chaos trial."""

from tests.faults import chaos
from tests.faults.plan import plan
from tests.faults.servers import Servers

SECONDS = 14
SEED = 2132  # its short plan has faults of all four tracks, and a frozen worker


def test_the_same_seed_is_the_same_plan() -> None:
    assert plan(3, 60) == plan(3, 60)
    assert plan(3, 60) != plan(4, 60)


def test_whatever_breaks_the_tables_end_as_the_model_says_and_no_job_fails(servers: Servers) -> None:
    report = chaos.run(servers, SEED, SECONDS, print)
    assert report.histories > 50
    assert report.deliveries > 500
    assert len(report.recoveries) > 10

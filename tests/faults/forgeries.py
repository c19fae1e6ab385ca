"""A flood of forged deliveries, and genuine ones among them."""

import time
from statistics import median
from typing import NamedTuple

from cli.dev.servers import HOST
from tests.bench.load import Spec
from tests.faults.overload import offered
from tests.faults.raw_requests import taken_in
from tests.faults.service import Service
from tests.support import http
from tests.support.waiting import wait_until

WRONG_SECRET = "whsec_bm90IHRoZSBzZWNyZXQgb2YgdGhpcyBlbmRwb2ludA=="
CONNECTIONS = 64
MOST_PER_S = 8000  # more than two processes can refuse
REFUSED = "clerk_sync_rejected_signatures_total"
COUNTED_WITHIN_S = 30
# on a machine that others use too
MANY_PER_S = 100
GENUINE_PER_S = 1
SLOW_S = 5


class Flood(NamedTuple):
    """What was seen: the forged deliveries, each of them refused, and the genuine ones sent meanwhile.

    One genuine delivery is sent after the other, each over a connection of its own; `taken` counts also those
    that were sent before the flood had begun.
    """

    lasted_s: float
    forged: int
    forged_per_s: float
    genuine: int
    median_s: float
    slowest_s: float
    taken: int


def flood(service: Service, seconds: float) -> Flood:
    """Send as many forged deliveries as can be answered, for so long, and genuine ones beside them."""
    spec = Spec(
        service.ports[0],
        WRONG_SECRET,
        seed=1,
        deliveries=round(MOST_PER_S * seconds),
        seconds=seconds,
        connections=CONNECTIONS,
    )
    refused_before = refused(service)
    took: list[tuple[float, float]] = []
    with offered(spec) as offer:
        while offer.goes_on:
            took.append((time.time(), taken_in(service)))
        report = offer.report()
    assert report.answered == 0, "a forged one was taken"
    forged = report.failed
    wait_until(lambda: refused(service) - refused_before >= forged, COUNTED_WITHIN_S, service.logs)
    began, ended = report.sent_at[0], report.sent_at[-1]
    times = [took_s for at, took_s in took if began <= at <= ended]
    lasted_s = ended - began
    return Flood(lasted_s, forged, forged / lasted_s, len(times), median(times), max(times), len(took))


def check(seen: Flood) -> None:
    """Fail unless it was a flood, and genuine deliveries were taken all the time, and soon."""
    assert seen.forged_per_s > MANY_PER_S, seen
    assert seen.genuine > GENUINE_PER_S * seen.lasted_s, seen
    assert seen.slowest_s < SLOW_S, seen


def refused(service: Service) -> float:
    """Return how many deliveries the receiver has counted as forged."""
    shown = http.get(f"http://{HOST}:{service.ports[0]}/metrics", timeout=10).text
    return sum(float(line.split()[-1]) for line in shown.splitlines() if line.startswith(REFUSED))

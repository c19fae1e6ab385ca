"""A flood of forged deliveries, with genuine ones among them."""

import time
from statistics import median
from typing import NamedTuple

from tests.bench.load import Spec
from tests.bench.load_process import load_process
from tests.faults.raw_requests import taken_in
from tests.faults.service import Service
from tests.support import http
from tests.support.waiting import wait_until

WRONG_SECRET = "whsec_bm90IHRoZSBzZWNyZXQgb2YgdGhpcyBlbmRwb2ludA=="
CONNECTIONS = 64
MOST_PER_S = 8000  # more than two processes can refuse
REFUSED = "clerk_sync_rejected_signatures_total"
COUNTED_WITHIN_S = 30
# On a machine with other load
MANY_PER_S = 100
GENUINE_PER_S = 1
SLOW_S = 5


class Flood(NamedTuple):
    """What was measured: the forged deliveries, each refused, and the genuine ones sent during the flood.

    The genuine deliveries are sent one after the other, each over a connection of its own. `taken` also
    counts those that were sent before the flood.
    """

    lasted_s: float
    forged: int
    forged_per_s: float
    genuine: int
    median_s: float
    slowest_s: float
    taken: int


def flood(service: Service, seconds: float) -> Flood:
    """Send as many forged deliveries as the receiver can answer, and genuine ones beside them."""
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
    with load_process(spec) as client:
        while client.running:
            took.append((time.time(), taken_in(service)))
        report = client.report()
    assert report.answered == 0, "a forged delivery was accepted"
    forged = report.failed
    wait_until(lambda: refused(service) - refused_before >= forged, COUNTED_WITHIN_S, service.logs)
    began, ended = report.sent_at[0], report.sent_at[-1]
    times = [took_s for at, took_s in took if began <= at <= ended]
    lasted_s = ended - began
    return Flood(lasted_s, forged, forged / lasted_s, len(times), median(times), max(times), len(took))


def check(seen: Flood) -> None:
    """Fail unless there were many forged deliveries, and the genuine ones were accepted steadily and soon."""
    assert seen.forged_per_s > MANY_PER_S, seen
    assert seen.genuine > GENUINE_PER_S * seen.lasted_s, seen
    assert seen.slowest_s < SLOW_S, seen


def refused(service: Service) -> float:
    """Return the number of deliveries that the receiver has counted as forged."""
    shown = http.get(service.url("/metrics"), timeout=10).text
    return sum(float(line.split()[-1]) for line in shown.splitlines() if line.startswith(REFUSED))

"""The sustained rate: the highest at which rows keep pace with deliveries."""

import time
from collections.abc import Callable

from cli.dev.process import Process
from tests.bench.cpu import OWN, WORKER, CpuClock, cores_allow
from tests.bench.figures import ComparedCase, Figures
from tests.bench.harness import Bench, Endpoint
from tests.bench.plan import BenchPlan, Setting
from tests.bench.receiver import INLINE, closed_loop
from worker.queue.rq_format import QUEUE_KEY

PART = "sustained rate"
OURS = "clerk-sync web and worker"
RATE = "events/s"
CONNECTIONS = 64
LOWEST, HIGHEST = 0.7, 1.1  # of the first estimate: the limits of the search
NEAR = 1.08  # the search ends when the rate that failed is at most this multiple of the rate that did not
STEP = 0.95
LIMIT_S = 60

Trial = Callable[[float, float], dict[str, float] | None]


def measure(bench: Bench, plan: BenchPlan, figures: Figures) -> None:
    """Search with short trials, then confirm the rate over the full time."""
    for setting in Setting:
        bench.clear()
        ours, inline = ComparedCase(PART, OURS, setting), ComparedCase(PART, INLINE, setting)
        with bench.web(setting) as web, bench.workers(bench.urls(setting)) as worker:
            estimate = _estimate(bench, web, plan)
            figures.add(ours, _search(plan, estimate, _trial(bench, web, worker)))
        bench.clear()
        with bench.gunicorn("inline_app", setting) as web:
            report, _ = closed_loop(bench, web, plan.load_s)
            figures.add(inline, _search(plan, report.rate, _trial(bench, web, None)))
        is_local = setting is Setting.LOCAL
        at_least = 1.5 if is_local else None
        figures.compare("sustained : inline Flask handler", ours, inline, RATE, at_least=at_least)
        if is_local:
            most = cores_allow(figures, ours)
            figures.check("sustained, were every core always busy", setting, most, "events/s")


def _estimate(bench: Bench, endpoint: Endpoint, plan: BenchPlan) -> float:
    """Deliver as fast as possible for a while; return the events/s until the last row is there."""
    before = bench.finished()
    report, _ = closed_loop(bench, endpoint, plan.load_s)
    bench.await_finished(before + report.answered, LIMIT_S)
    return report.answered / (time.time() - report.sent_at[0])


def _search(plan: BenchPlan, estimate: float, trial: Trial) -> dict[str, float]:
    """Return the highest rate found, and the CPU time per event at it."""
    low, high = estimate * LOWEST, estimate * HIGHEST
    while high / low > NEAR:
        middle = (low * high) ** 0.5
        if trial(middle, plan.probe_s):
            low = middle
        else:
            high = middle
    while (cpu_us := trial(low, plan.sustained_s)) is None:
        low *= STEP
    return {RATE: low, **cpu_us}


def _trial(bench: Bench, endpoint: Endpoint, worker: Process | None) -> Trial:
    """Return a function that delivers at a rate (deliveries/s) for some seconds.

    If every row came in time, it returns the CPU time per event, else None. Without a worker, the row is
    there when the delivery is answered.
    """

    def deliver(rate: float, seconds: float) -> dict[str, float] | None:
        tolerance_s = max(seconds / 30, 0.25)  # how late the last row may be
        hopeless_s = 2 * tolerance_s + 0.5  # the trial ends early when it is so late
        before = bench.finished()
        clock = CpuClock(bench, {OWN: endpoint.process.pid, WORKER: worker.pid if worker else None})
        report = bench.load(
            endpoint,
            rate=rate,
            seconds=seconds,
            connections=CONNECTIONS,
            give_up_s=hopeless_s,
            watch=lambda: not worker or int(str(bench.redis.llen(QUEUE_KEY))) <= rate * hopeless_s,
            every_s=0.05,
        )
        in_time = not (report.gave_up or report.failed) and report.late_s <= tolerance_s
        if worker:
            left_s = tolerance_s - (time.time() - report.sent_at[0] - seconds)
            in_time &= bench.await_finished(before + report.answered, max(left_s, 0))
            bench.await_finished(before + report.answered, LIMIT_S)
        return clock.per_delivery(report) if in_time else None

    return deliver

"""The sustained rate: the highest at which rows keep pace with deliveries."""

import time
from collections.abc import Callable

from cli.dev.process import Process
from tests.bench.cpu import CLIENT, OWN, WORKER, CpuClock, cores_allow
from tests.bench.figures import ComparedCase, Figures
from tests.bench.harness import Bench, Endpoint
from tests.bench.load import LoadReport
from tests.bench.plan import BenchPlan, Setting
from tests.bench.receiver import INLINE, closed_loop
from worker.queue.rq_format import QUEUE_KEY

PART = "sustained rate"
OURS = "clerk-sync web and worker"
RATE = "events/s"
CONNECTIONS = 64
LOWEST, HIGHEST = 0.7, 1.1  # of a first estimate: where the search begins
NEAR = 1.08  # the probes end when what fails is that little above what does not
STEP = 0.95
LIMIT_S = 60
POLL_S = 0.01

KeepsPace = Callable[[float, float], dict[str, float] | None]


def measure(bench: Bench, plan: BenchPlan, figures: Figures) -> None:
    """Search with short probes, then confirm over the full time."""
    for setting in Setting:
        bench.clear()
        ours, inline = ComparedCase(PART, OURS, setting), ComparedCase(PART, INLINE, setting)
        with bench.web(setting) as web, bench.workers(bench.urls(setting)) as worker:
            estimate = _estimate(bench, web, plan)
            figures.add(ours, _search(plan, estimate, _rows_keep_pace(bench, web, worker)))
        bench.clear()
        with bench.gunicorn("inline_app", setting) as web:
            report, _ = closed_loop(bench, web, plan.load_s)
            figures.add(inline, _search(plan, report.rate, _answers_keep_pace(bench, web)))
        is_local = setting is Setting.LOCAL
        ratio = figures.ratio(ours, inline, RATE)
        figures.check("sustained : inline Flask handler", setting, ratio, at_least=1.5 if is_local else None)
        if is_local:
            most = cores_allow(figures, ours)
            figures.check("sustained, were every core always busy", setting, most, "events/s")


def _estimate(bench: Bench, endpoint: Endpoint, plan: BenchPlan) -> float:
    """Return how many events/s go all the way: taken as fast as possible for a while, then worked off."""
    before = bench.finished()
    report, _ = closed_loop(bench, endpoint, plan.load_s)
    await_finished(bench, before + report.answered, LIMIT_S)
    return report.answered / (time.time() - report.sent_at[0])


def _search(plan: BenchPlan, estimate: float, keeps_pace: KeepsPace) -> dict[str, float]:
    """Return the highest rate found, and the CPU time per event at it."""
    low, high = estimate * LOWEST, estimate * HIGHEST
    while high / low > NEAR:
        middle = (low * high) ** 0.5
        if keeps_pace(middle, plan.probe_s):
            low = middle
        else:
            high = middle
    while (cpu_us := keeps_pace(low, plan.sustained_s)) is None:
        low *= STEP
    return {RATE: low, **cpu_us}


def _rows_keep_pace(bench: Bench, endpoint: Endpoint, worker: Process) -> KeepsPace:
    """Return what tries a rate (deliveries/s) for some seconds.

    If every row came in time, that returns the CPU time per event, else None.
    """

    def keeps_pace(rate: float, seconds: float) -> dict[str, float] | None:
        before, behind_s = bench.finished(), _tolerance_s(seconds)
        clock = CpuClock(bench, {OWN: endpoint.process.pid, WORKER: worker.pid})
        report = _open_loop(
            bench,
            endpoint,
            rate,
            seconds,
            lambda: int(str(bench.redis.llen(QUEUE_KEY))) <= rate * _hopeless_s(seconds),
        )
        left_s = behind_s - (time.time() - report.sent_at[0] - seconds)
        is_done = await_finished(bench, before + report.answered, max(left_s, 0))
        await_finished(bench, before + report.answered, LIMIT_S)
        if not (is_done and _was_in_time(report, behind_s)):
            return None
        return {**clock.per_event(report.answered), CLIENT: report.cpu_us}

    return keeps_pace


def _answers_keep_pace(bench: Bench, endpoint: Endpoint) -> KeepsPace:
    """Return the same for a handler whose row is there when it answers."""

    def keeps_pace(rate: float, seconds: float) -> dict[str, float] | None:
        clock = CpuClock(bench, {OWN: endpoint.process.pid})
        report = _open_loop(bench, endpoint, rate, seconds, lambda: True)
        if not _was_in_time(report, _tolerance_s(seconds)):
            return None
        return {**clock.per_event(report.answered), CLIENT: report.cpu_us}

    return keeps_pace


def _open_loop(
    bench: Bench, endpoint: Endpoint, rate: float, seconds: float, watch: Callable[[], bool]
) -> LoadReport:
    return bench.load(
        endpoint,
        rate=rate,
        seconds=seconds,
        deliveries=int(rate * seconds),
        connections=CONNECTIONS,
        give_up_s=_hopeless_s(seconds),
        watch=watch,
        every_s=0.05,
    )


def _was_in_time(report: LoadReport, behind_s: float) -> bool:
    return not (report.gave_up or report.failed) and report.late_s <= behind_s


def _tolerance_s(seconds: float) -> float:
    """Return how far behind the deliveries the rows may be at the end: a second in 30."""
    return max(seconds / 30, 0.25)


def _hopeless_s(seconds: float) -> float:
    """Return how far behind a try is given up before its end."""
    return 2 * _tolerance_s(seconds) + 0.5


def await_finished(bench: Bench, count: int, limit_s: float) -> bool:
    """Wait until RQ knows so many jobs as finished; return whether that came within the limit."""
    deadline = time.monotonic() + limit_s
    while bench.finished() < count:
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True

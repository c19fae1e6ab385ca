"""The time to start, and the memory of each process before and after many events."""

import time

from tests.bench.drain import put_deliveries
from tests.bench.figures import ComparedCase, Figures
from tests.bench.harness import Bench, Endpoint
from tests.bench.plan import BenchPlan, Setting
from tests.bench.receiver import CONNECTIONS
from tests.support.processes import clerk_sync, family, pss_mb, rss_mb
from tests.support.service_process import ServiceProcess
from tests.support.waiting import wait_until
from worker.queue.rq_format import QUEUE_KEY

START_PART = "start-up"
MEMORY_PART = "memory"
READY_S, RSS_MB = "ready after s", "MB in all"
STEPS = 4
WARM = 20  # a 20th of the events comes before the first measurement, and fills caches and pools
LIMIT_S = 300


def measure(bench: Bench, plan: BenchPlan, figures: Figures) -> None:
    _measure_starts(bench, plan, figures)
    _measure_memory(bench, plan, figures)


def _measure_starts(bench: Bench, plan: BenchPlan, figures: Figures) -> None:
    receiver = ComparedCase(START_PART, "clerk-sync web, until it takes deliveries", Setting.LOCAL)
    worker = ComparedCase(START_PART, "clerk-sync worker, until its first event is applied", Setting.LOCAL)
    for _ in range(plan.starts):
        bench.clear()
        began = time.monotonic()
        with bench.web(Setting.LOCAL) as web:
            figures.add(receiver, {READY_S: time.monotonic() - began, RSS_MB: _total_mb(web.process)})
        put_deliveries(bench.next_seed())(bench.redis_server.url, 1)
        began = time.monotonic()
        with bench.running(clerk_sync("worker"), bench.urls(Setting.LOCAL)) as process:
            if not bench.await_finished(1, LIMIT_S):
                raise RuntimeError("the worker applied nothing")
            figures.add(worker, {READY_S: time.monotonic() - began, RSS_MB: _total_mb(process)})
    figures.check(
        "start-up of the receiver", Setting.LOCAL, figures.median(receiver, READY_S), "s", at_most=1.5
    )
    figures.check("start-up of the worker", Setting.LOCAL, figures.median(worker, READY_S), "s")


def _measure_memory(bench: Bench, plan: BenchPlan, figures: Figures) -> None:
    bench.clear()
    warm = plan.memory_events // WARM
    step = (plan.memory_events - warm) // STEPS
    with bench.web(Setting.LOCAL) as web, bench.workers(bench.urls(Setting.LOCAL)) as worker:
        parent, *children = family(web.process.living_pid)
        servers = {f"receiver, process {i}": pid for i, pid in enumerate(children, 1)}
        processes = {"receiver, parent": parent, **servers, "worker": worker.living_pid}
        _note(figures, processes, "MB at the start")
        _deliver(bench, web, warm)
        before = f"MB after {warm:,}"
        _note(figures, processes, before)
        for _ in range(STEPS):
            _deliver(bench, web, step)
        after = f"MB after {plan.memory_events:,}"
        _note(figures, processes, after)
        pss = sum(map(pss_mb, family(parent)))
        figures.check("receiver, two processes, PSS", Setting.LOCAL, pss, "MB", at_most=120)
    for subject in processes:
        case = ComparedCase(MEMORY_PART, subject, Setting.LOCAL)
        growth = figures.median(case, after) / figures.median(case, before)
        figures.check(f"memory of {subject}, after : before", Setting.LOCAL, growth, at_most=1.1)


def _note(figures: Figures, processes: dict[str, int], name: str) -> None:
    for subject, pid in processes.items():
        figures.add(ComparedCase(MEMORY_PART, subject, Setting.LOCAL), {name: rss_mb(pid)})


def _deliver(bench: Bench, web: Endpoint, count: int) -> None:
    report = bench.load(web, seconds=LIMIT_S, deliveries=count, connections=CONNECTIONS)
    if report.answered < count:
        raise RuntimeError(f"{report.answered} of {count} deliveries were taken")
    wait_until(lambda: not bench.redis.exists(QUEUE_KEY), LIMIT_S, lambda: "the queue is not empty")


def _total_mb(process: ServiceProcess) -> float:
    return sum(map(rss_mb, family(process.living_pid)))

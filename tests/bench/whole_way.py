"""The whole way at full load, from the first delivery to the last row, beside an inline Node handler."""

import time
from collections.abc import Mapping

from tests.bench.cpu import OWN, WORKER, CpuClock
from tests.bench.figures import ComparedCase, Figures
from tests.bench.harness import Bench
from tests.bench.node import is_there, node_handler
from tests.bench.plan import BenchPlan, Setting, rounds
from tests.bench.receiver import closed_loop

PART = "whole way"
OURS = "clerk-sync web and worker"
OURS_CONNECTED = "clerk-sync web and worker, REDIS_MAX_CONNECTIONS=16"
NODE = "inline Node handler, express, svix and pg"
RATE = "events/s"
LIMIT_S = 120
GOALS = {Setting.LOCAL: 0.75, Setting.BOTH: 1.4}


def measure(bench: Bench, plan: BenchPlan, figures: Figures) -> None:
    """Measure closed loops of 16 connections, the programs in turn."""
    for setting in (Setting.LOCAL, Setting.BOTH):
        ours, node = ComparedCase(PART, OURS, setting), ComparedCase(PART, NODE, setting)
        connected = ComparedCase(PART, OURS_CONNECTED, setting)
        for _ in range(rounds(plan, setting)):
            figures.add(ours, _ours(bench, plan, setting))
            if setting is Setting.BOTH:
                figures.add(connected, _ours(bench, plan, setting, {"REDIS_MAX_CONNECTIONS": "16"}))
            if is_there():
                figures.add(node, _node(bench, plan, setting))
        if is_there():
            text = "whole way : inline Node handler"
            figures.compare(text, ours, node, RATE, at_least=GOALS[setting])
            if setting is Setting.BOTH:
                text = "whole way, REDIS_MAX_CONNECTIONS=16 : inline Node handler"
                figures.compare(text, connected, node, RATE)


def _ours(
    bench: Bench, plan: BenchPlan, setting: Setting, env: Mapping[str, str] | None = None
) -> dict[str, float]:
    bench.clear()
    with bench.web(setting, env) as web, bench.workers(bench.urls(setting), env=env) as worker:
        clock = CpuClock(bench, {OWN: web.process.pid, WORKER: worker.pid})
        report, _ = closed_loop(bench, web, plan.load_s)
        if not bench.await_finished(report.answered, LIMIT_S):
            raise RuntimeError("the worker does not empty the queue")
        rate = report.answered / (time.time() - report.sent_at[0])
        return {RATE: rate, **clock.per_delivery(report)}


def _node(bench: Bench, plan: BenchPlan, setting: Setting) -> dict[str, float]:
    bench.clear()
    with node_handler(bench, setting) as node:
        report, cpu_us = closed_loop(bench, node, plan.load_s)
        return {RATE: report.rate, **cpu_us, "failed": report.failed}

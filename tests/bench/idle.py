"""The commands that an idle service sends to Redis in a minute."""

import time

from tests.bench.figures import ComparedCase, Figures
from tests.bench.harness import Bench
from tests.bench.plan import BenchPlan, Setting
from tests.support.queue import commands

PART = "idle"
OURS = "clerk-sync web (two processes) and worker"
COMMANDS = "commands to Redis a minute"
SETTLED_S = 8  # for the work that each process does once at its start
MINUTE_S = 60


def measure(bench: Bench, _plan: BenchPlan, figures: Figures) -> None:
    """Count for one minute."""
    bench.clear()
    with bench.web(Setting.LOCAL), bench.workers(bench.urls(Setting.LOCAL)):
        time.sleep(SETTLED_S)
        bench.redis.config_resetstat()
        time.sleep(MINUTE_S)
        total = sum(commands(bench.redis).values())
    figures.add(ComparedCase(PART, OURS, Setting.LOCAL), {COMMANDS: total})
    figures.check("commands to Redis in an idle minute", Setting.LOCAL, total, "", at_most=60)

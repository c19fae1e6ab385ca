"""The drain under other settings: pool size, overflow, batch size, worker processes, at 0, 5 and 10 ms.

A part to call by hand (`make bench BENCH="--only sweep"`): it takes long, and answers how to tune.
"""

from functools import partial

from tests.bench import drain
from tests.bench.drain import Backlog, Contender
from tests.bench.figures import ComparedCase, Figures
from tests.bench.harness import Bench, Urls
from tests.bench.plan import BenchPlan, Setting
from worker.queue.rq_format import QUEUE

PART = "settings of the worker"
DELAYS_MS = (0, 5, 10)  # to PostgreSQL and Redis
DEFAULTS = {"DB_POOL_SIZE": 5, "DB_MAX_OVERFLOW": 5, "BATCH_SIZE": 100, "processes": 1}
VALUES = {
    "DB_POOL_SIZE": (1, 2, 5, 10),
    "DB_MAX_OVERFLOW": (0, 5),
    "BATCH_SIZE": (10, 50, 100, 200, 400),
    "processes": (1, 2),
}


def measure(bench: Bench, plan: BenchPlan, figures: Figures) -> None:
    """Change one setting at a time, and leave the others as they are by default."""
    backlog = Backlog(bench, 1, QUEUE)
    backlog.fill(drain.put_deliveries(bench.next_seed()), plan.backlog)
    for delay_ms in DELAYS_MS:
        with bench.delayed(delay_ms) as urls:
            for name, values in VALUES.items():
                for value in values:
                    subject = f"{delay_ms} ms, {name}={value}"
                    contender = _contender(bench, backlog, urls, subject, {**DEFAULTS, name: value})
                    for _ in range(plan.rounds):
                        figures.add(ComparedCase(PART, subject, Setting.LOCAL), drain.drain(bench, contender))


def _contender(bench: Bench, backlog: Backlog, urls: Urls, subject: str, values: dict[str, int]) -> Contender:
    env = {name: str(value) for name, value in values.items() if name.isupper()}
    processes = values["processes"]
    return Contender(subject, backlog, processes, partial(bench.workers, urls, processes, env))

"""The drain under other settings: pool size, overflow, batch size, worker processes, at 0, 5 and 10 ms.

It shows how to tune a worker. It takes ten minutes, so only `--only sweep` runs it.
"""

from functools import partial

from tests.bench import drain
from tests.bench.drain import Backlog, Contender
from tests.bench.figures import ComparedCase, Figures
from tests.bench.harness import Bench
from tests.bench.plan import BenchPlan, Setting
from worker.queue.rq_format import QUEUE

PART = "settings of the worker"
DELAYS_MS = (0, 5, 10)  # to PostgreSQL and Redis
ENVIRONMENTS = (
    *({"DB_POOL_SIZE": n} for n in ("1", "2", "10")),
    *({"DB_POOL_SIZE": n, "DB_MAX_OVERFLOW": "0"} for n in ("1", "2")),
    *({"BATCH_SIZE": n} for n in ("10", "50", "100", "200", "400")),
)
# The environment and the number of processes of each variant
VARIANTS: dict[str, tuple[dict[str, str], int]] = {
    "the defaults": ({}, 1),
    **{", ".join(f"{name}={value}" for name, value in env.items()): (env, 1) for env in ENVIRONMENTS},
    "two processes": ({}, 2),
}


def measure(bench: Bench, plan: BenchPlan, figures: Figures) -> None:
    """Change one setting at a time, all of them in turn, and compare each with the defaults."""
    backlog = Backlog(bench, 1, QUEUE)
    backlog.fill(drain.put_deliveries(bench.next_seed()), plan.backlog)
    for delay_ms in DELAYS_MS:
        cases = [ComparedCase(PART, f"{delay_ms} ms, {name}", Setting.LOCAL) for name in VARIANTS]
        with bench.delayed(delay_ms) as urls:
            for _ in range(plan.rounds):
                for case, (env, processes) in zip(cases, VARIANTS.values(), strict=True):
                    start = partial(bench.workers, urls, processes, env)
                    figures.add(case, drain.drain(bench, Contender(case.subject, backlog, processes, start)))
        for case in cases[1:]:
            figures.compare(f"{case.subject} : the defaults", case, cases[0], drain.RATE)

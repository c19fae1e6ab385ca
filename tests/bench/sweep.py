"""The drain under other settings: pool size, overflow, batch size, worker processes, at 0, 5 and 10 ms.

A part to call by hand (`make bench BENCH="--only sweep"`): it takes long, and answers how to tune.
"""

from functools import partial
from typing import NamedTuple

from tests.bench import drain
from tests.bench.drain import Backlog, Contender
from tests.bench.figures import ComparedCase, Figures
from tests.bench.harness import Bench
from tests.bench.plan import BenchPlan, Setting
from worker.queue.rq_format import QUEUE

PART = "settings of the worker"
DELAYS_MS = (0, 5, 10)  # to PostgreSQL and Redis


class Variant(NamedTuple):
    """What differs from the defaults."""

    name: str
    env: dict[str, str]
    processes: int = 1


VARIANTS = (
    Variant("the defaults", {}),
    *(Variant(f"DB_POOL_SIZE={n}", {"DB_POOL_SIZE": n}) for n in ("1", "2", "10")),
    Variant("DB_POOL_SIZE=1, DB_MAX_OVERFLOW=0", {"DB_POOL_SIZE": "1", "DB_MAX_OVERFLOW": "0"}),
    Variant("DB_POOL_SIZE=2, DB_MAX_OVERFLOW=0", {"DB_POOL_SIZE": "2", "DB_MAX_OVERFLOW": "0"}),
    *(Variant(f"BATCH_SIZE={n}", {"BATCH_SIZE": n}) for n in ("10", "50", "100", "200", "500")),
    Variant("two processes", {}, 2),
)


def measure(bench: Bench, plan: BenchPlan, figures: Figures) -> None:
    """Change one setting at a time, all of them in turn, and compare each with the defaults."""
    backlog = Backlog(bench, 1, QUEUE)
    backlog.fill(drain.put_deliveries(bench.next_seed()), plan.backlog)
    for delay_ms in DELAYS_MS:
        cases = [ComparedCase(PART, f"{delay_ms} ms, {each.name}", Setting.LOCAL) for each in VARIANTS]
        with bench.delayed(delay_ms) as urls:
            for _ in range(plan.rounds):
                for each, case in zip(VARIANTS, cases, strict=True):
                    start = partial(bench.workers, urls, each.processes, each.env)
                    figures.add(
                        case, drain.drain(bench, Contender(each.name, backlog, each.processes, start))
                    )
        for case in cases[1:]:
            figures.check(
                f"{case.subject} : the defaults", Setting.LOCAL, figures.ratio(case, cases[0], drain.RATE)
            )

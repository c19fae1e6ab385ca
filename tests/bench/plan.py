"""The sizes of the measurements."""

from enum import StrEnum
from typing import NamedTuple


class Setting(StrEnum):
    """Where the servers are."""

    LOCAL = "local"
    POSTGRES = "5 ms to PostgreSQL"
    BOTH = "5 ms to both"


ROUND_TRIP_MS = 5.0


class BenchPlan(NamedTuple):
    """The sizes of a run; times in s. Slow programs are measured with fewer events."""

    rounds: int
    far_rounds: int  # with the servers far away
    load_s: float  # one closed loop at CONNECTIONS
    backlog: int
    loop: dict[Setting, int]  # events for the psycopg loop
    simple: dict[Setting, int]  # for SimpleWorker
    forking: dict[Setting, int]  # for rq worker
    big_table: int
    growth: int  # the same for --only growth
    sustained_s: float
    probe_s: float
    lag_s: dict[int, float]  # by rate
    memory_events: int
    starts: int


FULL = BenchPlan(
    rounds=3,
    far_rounds=2,
    load_s=3.5,
    backlog=20_000,
    loop={Setting.LOCAL: 5_000, Setting.POSTGRES: 1_000, Setting.BOTH: 1_000},
    simple={Setting.LOCAL: 600, Setting.POSTGRES: 300, Setting.BOTH: 30},
    forking={Setting.LOCAL: 60, Setting.POSTGRES: 30, Setting.BOTH: 10},
    big_table=1_000_000,
    growth=10_000_000,
    sustained_s=30,
    probe_s=4,
    lag_s={50: 12, 500: 6},
    memory_events=100_000,
    starts=3,
)
QUICK = BenchPlan(
    rounds=1,
    far_rounds=1,
    load_s=1.5,
    backlog=5_000,
    loop={Setting.LOCAL: 1_500, Setting.POSTGRES: 200, Setting.BOTH: 200},
    simple={Setting.LOCAL: 200, Setting.POSTGRES: 60, Setting.BOTH: 8},
    forking={Setting.LOCAL: 15, Setting.POSTGRES: 10, Setting.BOTH: 4},
    big_table=100_000,
    growth=1_000_000,
    sustained_s=3,
    probe_s=1.5,
    lag_s={50: 3, 500: 2},
    memory_events=8_000,
    starts=1,
)


def rounds(plan: BenchPlan, setting: Setting) -> int:
    return plan.rounds if setting is Setting.LOCAL else plan.far_rounds

"""The lag: the time from when a delivery is due until a reader sees its row."""

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg

from tests.bench.events import svix_id
from tests.bench.figures import ComparedCase, Figures
from tests.bench.harness import Bench, Endpoint
from tests.bench.load import percentile
from tests.bench.plan import BenchPlan, Setting

PART = "lag from delivery to row"
P50, P99, MAX = "p50 ms", "p99 ms", "max ms"
LOOK_EVERY_S = 0.003  # a row is seen at most this late
LIMIT_S = 20
CONNECTIONS = 64
AT_ONCE = timedelta(seconds=1)
NEW_ROWS = "SELECT svix_id, applied_at FROM webhook_events WHERE applied_at > %s"


class Watcher:
    """Records when it first sees each row of the ledger, which is committed with the user's row.

    It queries a range of `applied_at`, the beginning of a row's transaction, as the transaction that began
    first may end last.
    """

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.seen_at: dict[str, float] = {}
        self._connection = connection
        self._newest = datetime.fromtimestamp(AT_ONCE.total_seconds(), UTC)

    def look(self) -> bool:
        """Record the new rows. Always True."""
        rows = self._connection.execute(NEW_ROWS, (self._newest - AT_ONCE,)).fetchall()
        now = time.time()
        for id_, applied_at in rows:
            self.seen_at.setdefault(id_, now)
            self._newest = max(self._newest, applied_at)
        return True


def measure(bench: Bench, plan: BenchPlan, figures: Figures) -> None:
    """Deliver at steady rates to a receiver and one worker."""
    for setting in Setting:
        with bench.web(setting) as web, bench.workers(bench.urls(setting)), bench.connect() as connection:
            for rate, seconds in plan.lag_s.items():
                connection.execute("TRUNCATE webhook_events")
                lags = _lags_ms(bench, web, Watcher(connection), rate, seconds)
                case = ComparedCase(PART, f"at {rate}/s", setting)
                figures.add(case, {P50: percentile(lags, 50), P99: percentile(lags, 99), MAX: lags[-1]})
                goal = 100.0 if (rate, setting) == (50, Setting.LOCAL) else None
                p99 = figures.median(case, P99)
                figures.check(f"lag at {rate}/s, p99", setting, p99, "ms", at_most=goal)


def _lags_ms(bench: Bench, web: Endpoint, watcher: Watcher, rate: int, seconds: float) -> list[float]:
    """Return the lag of every delivery, in ascending order."""
    seed = bench.next_seed()
    report = bench.load(
        web,
        seed=seed,
        rate=rate,
        seconds=seconds,
        connections=CONNECTIONS,
        watch=watcher.look,
        every_s=LOOK_EVERY_S,
    )
    _await_rows(watcher, report.answered)
    due_at = [report.sent_at[0] + i / rate for i in range(len(report.sent_at))]
    return sorted((watcher.seen_at[svix_id(seed, i)] - due) * 1000 for i, due in enumerate(due_at))


def _await_rows(watcher: Watcher, count: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while len(watcher.seen_at) < count:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{len(watcher.seen_at)} of {count} rows came")
        watcher.look()
        time.sleep(LOOK_EVERY_S)

"""`make faults`: chaos trials of many seeds, then outages, overload, forgeries, locks and crowds.

The same seed gives the same plan. The exit status is 1 if a trial or a part fails.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any, TypeVar

import click

from tests.faults import application_locks, chaos, crowd, forgeries
from tests.faults.forgeries import Flood, flood
from tests.faults.outage import check_outage, check_redis_outage, without_postgres, without_redis
from tests.faults.overload import ROW_S, TIMES_TOO_MUCH, Overload, check, overload, slow_database
from tests.faults.random_histories import some_deliveries
from tests.faults.servers import Servers
from tests.faults.service import Service, what_is_left
from tests.support.directories import open_directory
from tests.support.reference_model import SentEvent
from tests.support.waiting import wait_until

STEADY_PER_S = 20
WORKERS = 2
MAX_QUEUE_DEPTH = 5000
BATCH_SIZE = 25  # a transaction of 25 slow rows is no longer than real ones may be
DRAINED_WITHIN_S = 120

Part = tuple[str, float, Callable[[Servers, float], object]]
Seen = TypeVar("Seen")


@click.command()
@click.option("--seeds", default=20, show_default=True, help="Number of chaos trials.")
@click.option("--first", default=1, show_default=True, help="Seed of the first trial.")
@click.option("--seconds", default=60.0, show_default=True, help="Length of each trial.")
@click.option("--outage", default=600.0, show_default=True, help="Seconds without PostgreSQL; 0 for none.")
@click.option("--redis-outage", default=120.0, show_default=True, help="Seconds without Redis; 0 for none.")
@click.option("--overload", "overloaded", default=60.0, show_default=True, help="Seconds; 0 for none.")
@click.option("--forgeries", "flooded", default=20.0, show_default=True, help="Seconds; 0 for none.")
@click.option("--crowds", "crowded", default=10.0, show_default=True, help="Seconds each; 0 for none.")
@click.option("--locks", "locked", default=1.0, show_default=True, help="0 for no locks of the application.")
def main(
    *,
    seeds: int,
    first: int,
    seconds: float,
    outage: float,
    redis_outage: float,
    overloaded: float,
    flooded: float,
    crowded: float,
    locked: float,
) -> None:
    """Inject faults, and compare the tables with the model."""
    failures = []
    with Servers() as servers:
        reports = []
        for seed in range(first, first + seeds):
            try:
                reports.append(chaos.run(servers, seed, seconds, click.echo))
                click.echo(f"seed {seed}: {_summary(reports[-1:])}\n")
            except AssertionError as error:
                failures.append(f"seed {seed}")
                click.echo(f"seed {seed} FAILED: {str(error)[:20_000]}")
        if reports:
            click.echo(f"{_summary(reports)}\n{_recoveries(reports)}\n")
        parts: tuple[Part, ...] = (
            ("a long outage of PostgreSQL", outage, partial(_outage, 1001, without_postgres, check_outage)),
            (
                "a long outage of Redis",
                redis_outage,
                partial(_outage, 1002, without_redis, check_redis_outage),
            ),
            ("overload", overloaded, _overload),
            ("a flood of forgeries", flooded, _flood),
            ("locks of the application", locked, _locks),
            *((f"a crowd, {way}", crowded, partial(_crowd, way)) for way in crowd.WAYS),
        )
        for name, length, run in parts:
            try:
                if length:
                    click.echo(f"{name}: {run(servers, length)}\n")
            except AssertionError as error:
                failures.append(name)
                click.echo(f"{name} FAILED: {str(error)[:20_000]}")
    if failures:
        click.echo(f"FAILED: {', '.join(failures)}")
        sys.exit(1)


@contextmanager
def _service(servers: Servers, **overrides: Any) -> Iterator[Service]:
    """Run a receiver of two processes and WORKERS workers, all empty; no process may end during the block."""
    settings = servers.fresh(web_workers=2, **overrides)
    with open_directory() as directory, Service(settings, directory, workers=WORKERS) as service:
        yield service
        assert all(process.running for process in service.processes), service.logs()


def _outage(
    seed: int,
    without: Callable[[Servers, Service, Sequence[SentEvent], float], Seen],
    check: Callable[[Seen], None],
    servers: Servers,
    seconds: float,
) -> Seen:
    """Let a server be away for `seconds`, under a steady load."""
    deliveries = some_deliveries(seed, round(seconds * STEADY_PER_S))
    with _service(servers) as service:
        seen = without(servers, service, deliveries, seconds)
    chaos.compare(service.settings, deliveries)
    check(seen)
    return seen


def _flood(servers: Servers, seconds: float) -> Flood:
    """Send as many forged deliveries as the receiver can refuse, with genuine ones among them."""
    with _service(servers) as service:
        seen = flood(service, seconds)
        _await_applied(servers, service, seen.taken)
    forgeries.check(seen)
    return seen


def _crowd(way: str, servers: Servers, seconds: float) -> crowd.SeenBesideCrowd:
    """Hold a crowd of connections in this way, and deliver beside it."""
    with _service(servers) as service:
        seen = crowd.beside(service, way, seconds)
    crowd.check(seen)
    return seen


def _locks(servers: Servers, _: float) -> str:
    """Update sixty users beside each lock, trigger and policy of the application."""
    settings = servers.fresh()
    with (
        open_directory() as directory,
        Service(settings, directory, receivers=0) as service,
        servers.connection() as connection,
    ):
        return f"others applied, after; the rest, after the end\n{application_locks.run(service, connection)}"


def _overload(servers: Servers, seconds: float) -> Overload:
    """Send far more than the workers can drain, then wait until everything accepted is applied."""
    with _service(servers, max_queue_depth=MAX_QUEUE_DEPTH, batch_size=BATCH_SIZE) as service:
        with slow_database(servers):
            seen = overload(service, TIMES_TOO_MUCH * WORKERS / ROW_S, seconds)
        _await_applied(servers, service, seen.taken)
    check(seen, MAX_QUEUE_DEPTH)
    return seen


def _await_applied(servers: Servers, service: Service, accepted: int) -> None:
    """Wait until every job is finished, and compare the ledger with the number of accepted deliveries."""
    wait_until(lambda: not what_is_left(service.redis), DRAINED_WITHIN_S, service.logs)
    with servers.connection() as connection:
        rows = connection.execute("SELECT count(*) FROM webhook_events").fetchall()
    assert rows == [(accepted,)], "exactly the accepted deliveries are applied"


def _summary(reports: Sequence[chaos.ChaosReport]) -> str:
    answers = sum((report.answers for report in reports), Counter[str]())
    return (
        f"{len(reports)} trials, {sum(r.histories for r in reports)} histories, "
        f"{sum(r.deliveries for r in reports)} deliveries in {answers.total()} attempts "
        f"({', '.join(f'{answer} {count}' for answer, count in sorted(answers.items()))}), "
        f"{sum(len(r.recoveries) for r in reports)} faults, {sum(r.restarts for r in reports)} restarts; "
        f"slowest answer {max(r.slowest_answer_s for r in reports):.1f} s; "
        f"settled after {max(r.settled_in_s for r in reports):.1f} s at most; "
        "0 differences, 0 failed jobs"
    )


def _recoveries(reports: Sequence[chaos.ChaosReport]) -> str:
    took = [recovery for report in reports for recovery in report.recoveries]
    by_fault: dict[str, list[float]] = {"any": [recovery.took_s for recovery in took]}
    for fault, took_s in sorted(took):
        by_fault.setdefault(fault, []).append(took_s)
    lines = [
        f"  {fault:42} {len(times):4} times   median {median(times):5.1f} s   worst {max(times):5.1f} s"
        for fault, times in by_fault.items()
    ]
    return "\n".join(["all applied again after the end of a fault:", *lines])


if __name__ == "__main__":
    main()

"""`make faults`: the trials of many seeds, one after the other, and what they have survived.

    python -m tests.faults [--seeds 20] [--first 1] [--seconds 60]

The same seed is the same plan. Ends with status 1 when anything differs.
"""

import sys
from collections import Counter
from collections.abc import Sequence
from statistics import median

import click

from tests.faults import chaos
from tests.faults.servers import Servers


@click.command()
@click.option("--seeds", default=20, show_default=True, help="How many trials.")
@click.option("--first", default=1, show_default=True, help="The seed of the first.")
@click.option("--seconds", default=60.0, show_default=True, help="How long each breaks things.")
def main(seeds: int, first: int, seconds: float) -> None:
    """Break the service in every way, and compare the tables with the model."""
    reports, failures = [], []
    with Servers() as servers:
        for seed in range(first, first + seeds):
            try:
                reports.append(chaos.run(servers, seed, seconds, click.echo))
            except AssertionError as error:
                failures.append(seed)
                click.echo(f"seed {seed} FAILED: {str(error)[:20_000]}")
            else:
                click.echo(f"seed {seed}: {_summary(reports[-1:])}\n")
    click.echo(_summary(reports))
    click.echo(_recoveries(reports))
    if failures:
        click.echo(f"FAILED seeds: {failures}")
        sys.exit(1)


def _summary(reports: Sequence[chaos.Report]) -> str:
    answers = sum((report.answers for report in reports), Counter[str]())
    faults = sum(len(report.recoveries) for report in reports)
    return (
        f"{len(reports)} trials, {sum(r.histories for r in reports)} histories, "
        f"{sum(r.deliveries for r in reports)} deliveries in {answers.total()} attempts "
        f"({', '.join(f'{answer} {count}' for answer, count in sorted(answers.items()))}), "
        f"{faults} faults, {sum(r.restarts for r in reports)} restarts; "
        f"slowest answer {max((r.slowest_answer_s for r in reports), default=0):.1f} s; "
        f"settled after {max((r.settled_in_s for r in reports), default=0):.1f} s at most"
    )


def _recoveries(reports: Sequence[chaos.Report]) -> str:
    by_fault: dict[str, list[float]] = {}
    for recovery in (recovery for report in reports for recovery in report.recoveries):
        by_fault.setdefault(recovery.fault, []).append(recovery.took_s)
    lines = [
        f"  {fault:42} {len(times):4} times   median {median(times):5.1f} s   worst {max(times):5.1f} s"
        for fault, times in sorted(by_fault.items())
    ]
    return "\n".join(["all applied again after the end of a fault:", *lines])


if __name__ == "__main__":
    main()

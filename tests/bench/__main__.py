"""`python -m tests.bench`: start the stack, measure, print the tables."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console

from cli.dev.process import interrupted_by_signals
from tests.bench import (
    big_table,
    drain,
    idle,
    lag,
    machine,
    memory,
    receiver,
    sustained,
    sweep,
    table,
    whole_way,
)
from tests.bench.figures import Figures
from tests.bench.harness import Bench
from tests.bench.plan import FULL, QUICK, BenchPlan
from tests.support.directories import open_directory

PARTS: dict[str, Callable[[Bench, BenchPlan, Figures], None]] = {
    "receiver": receiver.measure,
    "drain": drain.measure,
    "table": big_table.measure,
    "whole": whole_way.measure,
    "sustained": sustained.measure,
    "lag": lag.measure,
    "memory": memory.measure,
    "idle": idle.measure,
}
BY_HAND = {"growth": big_table.measure_growth, "sweep": sweep.measure}  # too long to run without --only


@click.command()
@click.option("--quick", is_flag=True, help="Three minutes instead of fifteen, and rough figures.")
@click.option(
    "--only", multiple=True, type=click.Choice([*PARTS, *BY_HAND]), help="This part; may be repeated."
)
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write a file too."
)
@click.option(
    "--write",
    "markdown_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Replace the tables in a Markdown file, between its two markers.",
)
def bench(quick: bool, only: tuple[str, ...], json_file: Path | None, markdown_file: Path | None) -> None:
    """Measure speed, lag and memory, and print tables with ratios."""
    console, progress = Console(width=None if sys.stdout.isatty() else 140), Console(stderr=True)
    load_before = os.getloadavg()[0]
    figures = Figures()
    with open_directory() as directory, interrupted_by_signals(), Bench(directory) as stack:
        facts = machine.facts(stack, is_quick=quick, load_before=load_before)
        for name in only or PARTS:
            began = time.monotonic()
            (PARTS | BY_HAND)[name](stack, QUICK if quick else FULL, figures)
            progress.print(f"{name}: measured in {time.monotonic() - began:.0f} s", highlight=False)
    table.show(console, facts, figures)
    if json_file:
        json_file.write_text(table.to_json(facts, figures), encoding="utf-8")
    if markdown_file:
        table.write(markdown_file, facts, figures)


if __name__ == "__main__":
    bench()

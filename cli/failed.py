"""`failed`: the jobs that failed, why, and what to do with them."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from functools import wraps
from typing import Any, NamedTuple

import click
from rich.console import Console
from rich.progress import track

from cli.options import TimeParam
from cli.output import printable, show_json, show_rows
from config import load
from worker.monitoring.words import ago, counted
from worker.queue.failed_jobs import (
    TYPES,
    UNKNOWN,
    FailedJob,
    FailedJobFilter,
    FailedJobs,
    ReplayResult,
    UnknownJob,
    failed_jobs,
)
from worker.queue.rq_format import ForeignJobError

SHOWN = 100
WIDE = 150  # columns; a terminal of fewer would break the ids
MANY = 500  # from here on a progress bar shows that something happens


class Selection(NamedTuple):
    """The jobs that a command acts on: those of the ids, or all that are wanted."""

    ids: tuple[str, ...]
    every: bool
    wanted: FailedJobFilter
    dry_run: bool
    yes: bool
    as_json: bool


def _filters(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that become its `wanted`."""

    @wraps(command)
    def collected(type_: str | None, clerk_id: str | None, since: datetime | None, **rest: Any) -> None:
        command(wanted=FailedJobFilter(type_, clerk_id, since), **rest)

    options = (
        click.option(
            "--type",
            "type_",
            type=click.Choice([*TYPES, UNKNOWN]),
            help=f"Only of this type; {UNKNOWN}: those whose type is not known.",
        ),
        click.option(
            "--since", type=TimeParam(), help="Only what failed since then: 30m, 2h, 1d ago, or a time."
        ),
        click.option("--user", "clerk_id", help="Only of this Clerk id."),
    )
    return _with_options(collected, options)


def _selection(command: Callable[[Selection], None]) -> Callable[..., None]:
    """Give a command the argument and the options that become its selection."""

    @_filters
    @wraps(command)
    def collected(ids: tuple[str, ...], every: bool, wanted: FailedJobFilter, **flags: bool) -> None:
        if bool(ids) == every:
            raise click.UsageError("name the ids of failed jobs, or say --all")
        if ids and wanted != FailedJobFilter():
            raise click.UsageError("--type, --since and --user go with --all")
        command(Selection(tuple(dict.fromkeys(ids)), every, wanted, **flags))

    options = (
        click.argument("ids", nargs=-1, metavar="[ID]..."),
        click.option("--all", "every", is_flag=True, help="All failed jobs that match the options."),
        click.option("--dry-run", is_flag=True, help="List them; change nothing."),
        click.option("--yes", is_flag=True, help="Do not ask."),
        click.option("--json", "as_json", is_flag=True, help="As JSON: an array of id and outcome."),
    )
    return _with_options(collected, options)


def _with_options(command: Callable[..., None], options: Iterable[Callable[..., Any]]) -> Callable[..., None]:
    for option in reversed(tuple(options)):
        command = option(command)
    return command


@click.group()
def failed() -> None:
    """Show, replay or discard the jobs that failed."""


@failed.command("list")
@_filters
@click.option(
    "--limit", type=click.IntRange(1), help=f"How many at most.  [default: {SHOWN}; with --json all]"
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def list_(wanted: FailedJobFilter, limit: int | None, as_json: bool) -> None:
    """List the failed jobs, the newest failure first."""
    with closing(failed_jobs(load("redis_url"))) as jobs:
        if as_json:
            _stream_json(job._asdict() for job in jobs.newest(wanted, limit))
        else:
            _show_page(jobs, wanted, limit or SHOWN)


@failed.command()
@click.argument("id_", metavar="ID")
@click.option("--payload", is_flag=True, help="Also the delivery's body: it holds personal data.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def show(id_: str, payload: bool, as_json: bool) -> None:
    """Show one failed job with its traceback."""
    with closing(failed_jobs(load("redis_url"))) as jobs:
        details = jobs.show(id_)
    facts: dict[str, object] = details.job._asdict()
    if payload:
        facts |= {"traceback": details.raw_traceback, "payload": details.body}
    else:
        facts["traceback"] = details.traceback
    if as_json:
        show_json(facts)
    else:
        for name, value in facts.items():
            click.echo(_entry(name, value))
        click.echo(_next_step(details.job))


@failed.command()
@_selection
def replay(selection: Selection) -> None:
    """Put failed jobs back into the queue, with all their retries."""
    with closing(failed_jobs(load("redis_url"))) as jobs:
        chosen = _chosen(jobs, selection, "would be replayed")
        if chosen and selection.every and not selection.yes and sys.stdin.isatty():
            click.confirm(f"Replay {counted(len(chosen), 'failed job')}?", abort=True, err=True)
        _report(jobs.replay(chosen), len(chosen), selection)


@failed.command()
@_selection
def discard(selection: Selection) -> None:
    """Delete failed jobs for good."""
    with closing(failed_jobs(load("redis_url"))) as jobs:
        chosen = _chosen(jobs, selection, "would be discarded")
        if chosen and selection.every and not selection.yes:
            what = f"{counted(len(chosen), 'failed job')} with the delivery in each"
            if not sys.stdin.isatty():
                raise click.UsageError(f"discard --all deletes {what} for good: say --yes as well")
            click.confirm(f"Delete {what} for good?", abort=True, err=True)
        _report(jobs.discard(chosen), len(chosen), selection)


def _chosen(jobs: FailedJobs, selection: Selection, what: str) -> Sequence[str]:
    """Return the ids to treat; after a dry run, which names them here, there are none."""
    chosen = jobs.ids(selection.wanted) if selection.every else selection.ids
    if not selection.dry_run:
        return chosen
    if selection.as_json:
        show_json([{"id": id_, "outcome": what} for id_ in chosen])
    else:
        for id_ in chosen:
            click.echo(printable(id_))
        click.echo(f"{len(chosen)} {what}", err=True)
    raise click.exceptions.Exit(0)


def _report(fates: Iterator[tuple[str, ReplayResult]], total: int, selection: Selection) -> None:
    """Say what became of each job, also of those before one at which `fates` raises an error.

    Raises UnknownJob when one that was named is not there.
    """
    if total == 0 and not selection.as_json:
        click.echo("no failed jobs")
    if total >= MANY and not selection.as_json:
        fates = iter(track(fates, "Working", total, transient=True, console=Console(stderr=True)))
    done: dict[str, ReplayResult] = {}
    try:
        done.update(fates)  # which keeps what came before an error
    finally:
        _show_results(done, selection)
    unknown = [printable(id_) for id_, fate in done.items() if fate is ReplayResult.GONE]
    if unknown and not selection.every:
        raise UnknownJob(f"no failed job {', '.join(unknown)}")


def _show_results(done: dict[str, ReplayResult], selection: Selection) -> None:
    if selection.as_json:
        show_json([{"id": id_, "outcome": fate} for id_, fate in done.items()])
        return
    told = [(id_, fate) for id_, fate in done.items() if selection.every or fate is not ReplayResult.GONE]
    for id_, fate in told[:SHOWN]:
        click.echo(f"{printable(id_)}: {fate}")
    if len(told) > SHOWN:
        click.echo(f"… and {len(told) - SHOWN} more")
    if selection.every and done:
        counts = Counter(done.values())
        click.echo(", ".join(f"{counts[fate]} {fate}" for fate in ReplayResult if fate in counts))


def _show_page(jobs: FailedJobs, wanted: FailedJobFilter, limit: int) -> None:
    rows = list(jobs.newest(wanted, limit + 1))
    if not rows:
        click.echo("no failed jobs")
    else:
        shown = [_shown(job) for job in rows[:limit]]
        show_rows("Failed jobs", FailedJob._fields, shown, columns=WIDE, block=_block)
    if len(rows) > limit:
        click.echo(
            f"There are more: {counted(jobs.count(), 'failed job')} in all. --limit shows more of them."
        )


def _block(job: FailedJob) -> str:
    return (
        f"{job.id}  {job.type or '-'}\n  {job.clerk_id or '-'}\n  {job.reason}\n"
        f"  {counted(job.attempts, 'attempt')}, the first {job.first_failed_at}, the last {job.failed_at}"
    )


def _shown(job: FailedJob) -> FailedJob:
    """Return the job with its times as how long ago."""
    return job._replace(first_failed_at=_ago(job.first_failed_at), failed_at=_ago(job.failed_at))


def _ago(moment: str | None) -> str:
    return ago(moment, datetime.now(UTC)) if moment else "at an unknown time"


def _next_step(job: FailedJob) -> str:
    id_ = printable(job.id)
    if job.reason.startswith(ForeignJobError.__name__):
        return f"Next: clerk-sync failed discard {id_}"
    return f"Next, once the cause is repaired: clerk-sync failed replay {id_}"


def _entry(name: str, value: object) -> str:
    text = "-" if value is None else printable(str(value))
    return f"{name}: {text}" if "\n" not in text else f"{name}:\n{text}"


def _stream_json(rows: Iterable[dict[str, Any]]) -> None:
    """Print an array as its rows come, so that no number of them has to be in memory."""
    before = "["
    for row in rows:
        click.echo(f"{before}\n  {json.dumps(row)}", nl=False)
        before = ","
    click.echo("[]" if before == "[" else "\n]")

"""`failed`: lists, shows, replays and discards the jobs that failed."""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from typing import Any, NamedTuple

import click

from cli.options import WHEN, TimeParam
from cli.output import exact, show_json, wrapped
from config import load
from worker.clerk.payloads import ALL_TYPES
from worker.monitoring.words import ago, counted, printable
from worker.queue.failed_jobs import (
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
MANY = 500  # from this number of jobs on a progress bar is shown

# The options that become a FailedJobFilter
FILTERS = (
    click.Option(
        ["--type"],
        type=click.Choice([*ALL_TYPES, UNKNOWN]),
        metavar="TYPE",
        help=f"Only jobs of this event type ({UNKNOWN}: the type cannot be read).",
    ),
    click.Option(["--since"], type=TimeParam(), help=f"Only jobs that failed since then: {WHEN}."),
    click.Option(["--user", "clerk_id"], help="Only jobs about this Clerk user id."),
)
# Those that become a Selection
SELECTION = (
    click.Argument(["ids"], nargs=-1, metavar="[ID]..."),
    click.Option(["--all", "every"], is_flag=True, help="All failed jobs that match the options."),
    click.Option(["--dry-run"], is_flag=True, help="List them; change nothing."),
    click.Option(["--yes"], is_flag=True, help="Do not ask for confirmation."),
    click.Option(["--json", "as_json"], is_flag=True, help="Print a JSON array of id and outcome."),
    *FILTERS,
)


class Selection(NamedTuple):
    """The jobs that a command acts on: those with these ids, or all that match `wanted`."""

    ids: tuple[str, ...]
    every: bool
    wanted: FailedJobFilter
    dry_run: bool
    yes: bool
    as_json: bool


def _selection(
    *, ids: tuple[str, ...], every: bool, dry_run: bool, yes: bool, as_json: bool, **filters: Any
) -> Selection:
    """Return what the options of SELECTION say. Raises click.UsageError if they exclude each other."""
    wanted = FailedJobFilter(**filters)
    if bool(ids) == every:
        raise click.UsageError("give the ids of failed jobs, or --all")
    if ids and wanted != FailedJobFilter():
        raise click.UsageError("--type, --since and --user require --all")
    return Selection(tuple(dict.fromkeys(ids)), every, wanted, dry_run, yes, as_json)


@click.group()
def failed() -> None:
    """Show, replay or discard the jobs that failed."""


@failed.command("list", params=[*FILTERS])
@click.option(
    "--limit", type=click.IntRange(1), help=f"Maximum number of jobs.  [default: {SHOWN}; with --json: all]"
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def list_(limit: int | None, as_json: bool, **filters: Any) -> None:
    """List the failed jobs, newest failure first."""
    wanted = FailedJobFilter(**filters)
    with closing(failed_jobs(load("redis_url"))) as jobs:
        if as_json:
            _stream_json(job._asdict() for job in jobs.newest(wanted, limit))
        else:
            _show_page(jobs, wanted, limit or SHOWN)


@failed.command()
@click.argument("id_", metavar="ID")
@click.option("--payload", is_flag=True, help="Show the delivery's body too. It contains personal data.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def show(id_: str, payload: bool, as_json: bool) -> None:
    """Show one failed job with its traceback, and the next command."""
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


@failed.command(params=[*SELECTION])
def replay(**options: Any) -> None:
    """Queue failed jobs again, each with its full number of retries."""
    selection = _selection(**options)
    with closing(failed_jobs(load("redis_url"))) as jobs:
        chosen = _chosen(jobs, selection, "would be replayed")
        if chosen and selection.every and not selection.yes and sys.stdin.isatty():
            click.confirm(f"Replay {counted(len(chosen), 'failed job')}?", abort=True, err=True)
        _report(jobs.replay(chosen), len(chosen), selection)


@failed.command(params=[*SELECTION])
def discard(**options: Any) -> None:
    """Delete failed jobs permanently, each with its delivery."""
    selection = _selection(**options)
    with closing(failed_jobs(load("redis_url"))) as jobs:
        chosen = _chosen(jobs, selection, "would be discarded")
        if chosen and selection.every and not selection.yes:
            what = counted(len(chosen), "failed job with its delivery", "failed jobs with their deliveries")
            if not sys.stdin.isatty():
                raise click.UsageError(f"discard --all deletes {what} permanently: add --yes to confirm")
            click.confirm(f"Delete {what} permanently?", abort=True, err=True)
        _report(jobs.discard(chosen), len(chosen), selection)


def _chosen(jobs: FailedJobs, selection: Selection, what: str) -> Sequence[str]:
    """Return the ids to act on. A dry run prints them and ends the command.

    Raises UnknownJob if a dry run names a job that is not a failed one.
    """
    chosen = jobs.ids(selection.wanted) if selection.every else selection.ids
    if not selection.dry_run:
        return chosen
    found = chosen if selection.every else jobs.failed(chosen)
    if selection.as_json:
        show_json([{"id": id_, "outcome": what} for id_ in found])
    else:
        for id_ in found:
            click.echo(printable(id_))
        click.echo(f"{counted(len(found), 'failed job')} {what}", err=True)
    known = set(found)
    _require_known([id_ for id_ in chosen if id_ not in known])
    raise click.exceptions.Exit(0)


def _require_known(unknown: Sequence[str]) -> None:
    if unknown:
        raise UnknownJob(f"no failed job {', '.join(map(printable, unknown))}")


def _report(results: Iterator[tuple[str, ReplayResult]], total: int, selection: Selection) -> None:
    """Print the result of each job, also if `results` raises an error after some of them.

    Raises UnknownJob if a job that was named does not exist.
    """
    if total == 0 and not selection.as_json:
        click.echo(_none(selection.wanted))
    is_silent = total < MANY or selection.as_json or not sys.stderr.isatty()
    done: dict[str, ReplayResult] = {}
    try:
        with click.progressbar(results, total, "Working", hidden=is_silent, file=sys.stderr) as shown:
            done.update(shown)  # which keeps the results before an error
    finally:
        _show_results(done, selection)
    if not selection.every:
        _require_known([id_ for id_, result in done.items() if result is ReplayResult.GONE])


def _show_results(done: dict[str, ReplayResult], selection: Selection) -> None:
    if selection.as_json:
        show_json([{"id": id_, "outcome": result} for id_, result in done.items()])
        return
    listed = [
        (id_, result) for id_, result in done.items() if selection.every or result is not ReplayResult.GONE
    ]
    for id_, result in listed[:SHOWN]:
        click.echo(f"{printable(id_)}: {result}")
    if len(listed) > SHOWN:
        click.echo(f"… and {len(listed) - SHOWN:,} more")
    if selection.every and done:
        counts = Counter(done.values())
        click.echo(", ".join(f"{counts[result]} {result}" for result in ReplayResult if result in counts))


def _show_page(jobs: FailedJobs, wanted: FailedJobFilter, limit: int) -> None:
    rows = list(jobs.newest(wanted, limit + 1))
    if not rows:
        click.echo(_none(wanted))
    else:
        now = datetime.now(UTC)
        for job in rows[:limit]:
            click.echo(_block(job, now))
    if len(rows) > limit:
        click.echo(f"{counted(jobs.count(), 'failed job')} in all; use --limit to show more.")


def _none(wanted: FailedJobFilter) -> str:
    return "no failed jobs" if wanted == FailedJobFilter() else "no failed jobs match the options"


def _block(job: FailedJob, now: datetime) -> str:
    """Return a job in lines of at most 80 columns."""
    tries = f"{counted(job.attempts, 'attempt')}, "
    if job.attempts > 1 and job.first_failed_at != job.failed_at:
        tries += f"the first {_ago(job.first_failed_at, now)}, the last "
    reason = "\n  ".join(wrapped(job.reason, 2))
    head = printable(f"{job.id}  {job.type or '-'}\n  {job.clerk_id or '-'}")
    return f"{head}\n  {reason}\n  {tries}{_ago(job.failed_at, now)}"


def _ago(moment: str | None, now: datetime) -> str:
    return ago(moment, now) if moment else "at an unknown time"


def _next_step(job: FailedJob) -> str:
    id_ = printable(job.id)
    if job.reason.startswith(ForeignJobError.__name__):
        return f"Next: clerk-sync failed discard {id_}"
    return f"Next, after fixing the cause: clerk-sync failed replay {id_}"


def _entry(name: str, value: object) -> str:
    if name.endswith("failed_at") and isinstance(value, str):
        value = exact(datetime.fromisoformat(value))
    text = "-" if value is None else printable(str(value))
    return f"{name}: {text}" if "\n" not in text else f"{name}:\n{text}"


def _stream_json(rows: Iterable[dict[str, Any]]) -> None:
    """Print an array row by row, so that the rows need not fit into memory."""
    before = "["
    for row in rows:
        click.echo(f"{before}\n  {json.dumps(row)}", nl=False)
        before = ","
    click.echo("[]" if before == "[" else "\n]")

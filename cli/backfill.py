"""`backfill`: every user that Clerk has, into the table."""

import sys
from datetime import datetime
from functools import partial

import click

from cli.clerk import UserBar, bridge_from_environment
from cli.options import TimeParam
from db.times import to_ms
from worker.shutdown import Stopped
from worker.sync.backfill import Backfill, BackfillStats


class Interrupted(Exception):
    """The command was stopped; the message says what comes next."""

    retryable = True


@click.command()
@click.option("--since", type=TimeParam(), help="Only users updated since then: 30m, 2h, 1d ago, or a time.")
@click.option("--restart", is_flag=True, help="Start over instead of resuming an interrupted run.")
def backfill(since: datetime | None, restart: bool) -> None:
    """Read every user of Clerk into the tables. An interrupted run resumes where it stopped."""
    with bridge_from_environment() as bridge, UserBar("Users") as bar:
        task = Backfill(bridge, partial(_progress, bar))
        try:
            if since is not None:
                done = task.since(to_ms(since))
            else:
                _announce(None if restart else task.resumable())
                done = task.everything(restart=restart)
        except Stopped:
            raise Interrupted(_after_stop(since, task.resumable())) from None
    _show(done)
    sys.exit(1 if done.is_cut_short or done.refused else 0)


def _progress(bar: UserBar, done: BackfillStats) -> None:
    if done.memberships_expected:
        bar.show(done.memberships, done.memberships_expected, "Memberships")
    else:
        bar.show(done.seen, done.expected)


def _announce(done: BackfillStats | None) -> None:
    if done is not None:
        click.echo(f"Resuming after {done.seen:,} users (--restart starts over)", err=True)


def _after_stop(since: datetime | None, done: BackfillStats | None) -> str:
    if since is not None:
        return "stopped: what was read is kept; the next run starts over"
    return f"stopped after {done.seen if done else 0:,} users: the next backfill resumes there"


def _show(done: BackfillStats) -> None:
    for trouble in done.troubles:
        click.echo(trouble, err=True)
    left_out = done.invalid + done.refused
    counts = {"created": done.created, "updated": done.updated, "unchanged": done.unchanged}
    if left_out:
        counts["left out"] = left_out
    parts = ", ".join(f"{count:,} {what}" for what, count in counts.items())
    members = f"; {done.memberships:,} memberships" if done.memberships_expected else ""
    click.echo(f"{done.seen:,} users: {parts}{members}")
    if done.is_cut_short:
        users, memberships = f"{done.expected:,} users", f"{done.memberships_expected:,} memberships"
        counted = users if done.seen < done.expected else memberships
        click.echo(f"The listing ended early, Clerk counts {counted}: run it again", err=True)

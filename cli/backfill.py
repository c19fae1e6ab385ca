"""`backfill`: reads every user from Clerk's API into the tables."""

import sys
from collections.abc import Callable
from datetime import datetime
from functools import partial

import click

from cli.clerk import context_from_environment, progress_bar
from cli.options import WHEN, TimeParam
from db.times import to_ms
from worker.monitoring.words import counted
from worker.shutdown import Stopped
from worker.sync.backfill import Backfill, BackfillStats


@click.command()
@click.option("--since", type=TimeParam(), help=f"Only users updated since then: {WHEN}.")
@click.option("--restart", is_flag=True, help="Start over instead of resuming an interrupted run.")
def backfill(since: datetime | None, restart: bool) -> None:
    """Read every user from Clerk's API into the tables.

    An interrupted run resumes where it stopped. Live deliveries may arrive meanwhile.
    """
    with context_from_environment() as context, progress_bar("Users") as show:
        task = Backfill(context, partial(_progress, show))
        try:
            if since is not None:
                done = task.since(to_ms(since))
            else:
                if not restart and (before := task.resumable()):
                    click.echo(
                        f"Resuming after {counted(before.seen, 'user')} (--restart starts over)", err=True
                    )
                done = task.everything(restart=restart)
        except Stopped:
            raise Stopped(_after_stop(since, task.resumable())) from None
    _show(done)
    sys.exit(1 if done.is_cut_short or done.refused else 0)


def _progress(show: Callable[..., None], done: BackfillStats) -> None:
    if done.memberships_expected:
        show(done.memberships, done.memberships_expected, "Memberships")
    else:
        show(done.seen, done.expected)


def _after_stop(since: datetime | None, done: BackfillStats | None) -> str:
    if since is not None:
        return "stopped: what was read is kept; the next run starts over"
    return f"stopped after {counted(done.seen if done else 0, 'user')}: the next backfill resumes there"


def _show(done: BackfillStats) -> None:
    for trouble in done.troubles:
        click.echo(trouble, err=True)
    left_out = done.invalid + done.refused
    counts = {"created": done.created, "updated": done.updated, "unchanged": done.unchanged}
    if left_out:
        counts["left out"] = left_out
    parts = ", ".join(f"{count:,} {what}" for what, count in counts.items())
    members = f"; {counted(done.memberships, 'membership')}" if done.memberships_expected else ""
    click.echo(f"{counted(done.seen, 'user')}: {parts}{members}")
    if done.is_cut_short:
        users, memberships = counted(done.expected, "user"), counted(done.memberships_expected, "membership")
        total = users if done.seen < done.expected else memberships
        click.echo(f"The listing ended early: Clerk counts {total}. Run backfill again.", err=True)

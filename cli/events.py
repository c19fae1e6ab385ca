"""`events`: shows the ledger."""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import click

from cli.options import WHEN, TimeParam
from cli.output import event_at, event_block, plain, show_json
from config import load
from db import ledger
from db.connection.engine import Database
from db.connection.errors import DatabaseUnavailable
from db.ledger import LedgerFilter, LedgerRow
from db.merge.incoming import Outcome
from db.times import to_datetime
from worker.clerk.payloads import ALL_TYPES

LOOK_EVERY_S = 1.0
# A row has the time at which its transaction began, and becomes visible when the transaction ends. So each
# query overlaps the one before: usually by the usual duration of a transaction, every FAR_EVERY queries by
# its maximum. From PostgreSQL 17 on that is 20 s. Older versions limit only single statements: a row of a
# transaction that takes longer than the overlap is shown only by `events` without --follow.
USUAL_TRANSACTION = timedelta(seconds=3)
LONGEST_TRANSACTION = timedelta(seconds=40)
FAR_EVERY = 10  # queries


@click.command()
@click.option("--user", "clerk_id", help="Only deliveries about this Clerk user id.")
@click.option(
    "--type",
    type=click.Choice(ALL_TYPES),
    metavar="TYPE",
    help="Only this event type, such as user.updated.",
)
@click.option(
    "--outcome", type=click.Choice([outcome.value for outcome in Outcome]), help="Only this outcome."
)
@click.option("--since", type=TimeParam(), help=f"Only deliveries applied since then: {WHEN}.")
@click.option("--until", type=TimeParam(), help="Only deliveries applied before then.")
@click.option(
    "--limit",
    default=50,
    show_default=True,
    type=click.IntRange(1, 10_000),
    help="Maximum number of deliveries.",
)
@click.option("--follow", "-f", is_flag=True, help="Keep showing new deliveries, oldest first, until Ctrl-C.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print a JSON array; with --follow one JSON object per line."
)
def events(limit: int, follow: bool, as_json: bool, **filters: Any) -> None:
    """Show the deliveries that workers have applied.

    The newest comes first. Its outcome is `applied` (it changed something), `stale` (it was known, or
    something newer was) or `ignored` (it says nothing about the user).
    """
    wanted = LedgerFilter(**filters)
    if follow and wanted.until:
        raise click.UsageError("--follow and --until exclude each other")
    with Database(load("database_url")) as database:
        if not follow:
            _show(ledger.recent(database, wanted, limit=limit), as_json)
            return
        with suppress(KeyboardInterrupt):
            for row in following(database, wanted, limit):
                click.echo(json.dumps(row._asdict(), default=plain) if as_json else event_at(row))


def _show(rows: list[LedgerRow], as_json: bool) -> None:
    if as_json:
        show_json([row._asdict() for row in rows])
    elif not rows:
        click.echo("no deliveries applied")
    else:
        now = datetime.now(UTC)
        for row in rows:
            click.echo(event_block(row, now))


def following(database: Database, wanted: LedgerFilter, limit: int) -> Iterator[LedgerRow]:
    """Yield the newest `limit` rows, oldest first, then each new row, each once."""
    last = ledger.last_applied_at(database) or to_datetime(0)
    begin = _back(wanted, last, LONGEST_TRANSACTION)
    window = ledger.recent(database, begin, limit=None)
    before = ledger.recent(database, wanted._replace(until=begin.since), limit=max(0, limit - len(window)))
    yield from reversed([*window[:limit], *before])
    seen = {row.svix_id for row in window}
    for look in count(1):
        time.sleep(LOOK_EVERY_S)
        is_far = look % FAR_EVERY == 0
        try:
            newest = ledger.last_applied_at(database) or last
            found = ledger.recent(
                database,
                _back(wanted, last, LONGEST_TRANSACTION if is_far else USUAL_TRANSACTION),
                limit=None,
            )
        except DatabaseUnavailable as error:
            click.echo(f"{error}; looking again", err=True)
            continue
        yield from (row for row in reversed(found) if row.svix_id not in seen)
        ids = {row.svix_id for row in found}
        seen = ids if is_far else seen | ids
        last = newest


def _back(wanted: LedgerFilter, last: datetime, by: timedelta) -> LedgerFilter:
    """Return the filter limited to rows applied since `by` before `last`."""
    since = last - by
    return wanted._replace(since=max(since, wanted.since) if wanted.since else since)

"""`events`: the ledger of what came."""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import click

from cli.options import Moment
from cli.output import plain, printable, show_json, show_table
from config import load
from db import ledger
from db.engine import Database
from db.errors import DatabaseUnavailable
from db.ledger import LedgerRow, Outcome, Wanted
from worker.events import HANDLED_TYPES, ORGANIZATION_TYPES

LOOK_EVERY_S = 1.0
# A row bears the time at which its transaction began, and is seen when that has ended: no transaction of ours
# is longer than this.
LONGEST_TRANSACTION = timedelta(seconds=40)


@click.command()
@click.option("--user", "clerk_id", help="Only this Clerk id.")
@click.option(
    "--type", "type_", type=click.Choice([*HANDLED_TYPES, *ORGANIZATION_TYPES]), help="Only this type."
)
@click.option(
    "--outcome", type=click.Choice([outcome.value for outcome in Outcome]), help="Only this outcome."
)
@click.option("--since", type=Moment(), help="Only what was applied since then: 30m, 2h, 1d ago, or a time.")
@click.option("--until", type=Moment(), help="Only what was applied before then.")
@click.option("--limit", default=50, show_default=True, type=click.IntRange(1, 10_000))
@click.option("--follow", "-f", is_flag=True, help="Go on with what comes, the oldest first, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="As JSON; with --follow an object a line.")
def events(  # noqa: PLR0913, PLR0917 - click hands over every option by its name
    clerk_id: str | None,
    type_: str | None,
    outcome: str | None,
    since: datetime | None,
    until: datetime | None,
    limit: int,
    follow: bool,
    as_json: bool,
) -> None:
    """Show the deliveries that were applied, newest first, with their outcome."""
    wanted = Wanted(clerk_id, type_, outcome, since, until)
    if follow and until:
        raise click.UsageError("--follow has no end: --until does not go with it")
    database = Database(load("database_url"))
    try:
        if follow:
            with suppress(KeyboardInterrupt):
                for row in _following(database, wanted, limit):
                    click.echo(_line(row, as_json))
        else:
            _show(ledger.recent(database, wanted, limit=limit), as_json)
    finally:
        database.dispose()


def _show(rows: list[LedgerRow], as_json: bool) -> None:
    if as_json:
        show_json([row._asdict() for row in rows])
    else:
        show_table("Deliveries applied", LedgerRow._fields, rows)


def _following(database: Database, wanted: Wanted, limit: int) -> Iterator[LedgerRow]:
    """Yield the newest `limit` rows, and then each row that comes; in their order, and each once."""
    newest = ledger.recent(database, wanted, limit=1)
    begin = _window(wanted, newest[0].applied_at if newest else datetime.now(UTC))
    window = ledger.recent(database, begin, limit=None)
    before = ledger.recent(database, wanted._replace(until=begin.since), limit=max(0, limit - len(window)))
    yield from reversed([*window[:limit], *before])
    while True:
        seen = {row.svix_id for row in window}
        time.sleep(LOOK_EVERY_S)
        last = window[0].applied_at if window else begin.since
        found = _look(database, begin if last is None else _window(wanted, last))
        yield from (row for row in reversed(found) if row.svix_id not in seen)
        window = found or window


def _window(wanted: Wanted, newest: datetime) -> Wanted:
    """Return those wanted that may still become visible once `newest` is the newest seen."""
    since = newest - LONGEST_TRANSACTION
    return wanted._replace(since=max(since, wanted.since) if wanted.since else since)


def _look(database: Database, wanted: Wanted) -> list[LedgerRow]:
    try:
        return ledger.recent(database, wanted, limit=None)
    except DatabaseUnavailable as error:
        click.echo(f"{error}; looking again", err=True)
        return []


def _line(row: LedgerRow, as_json: bool) -> str:
    if as_json:
        return json.dumps(row._asdict(), default=plain)
    at = row.applied_at.strftime("%Y-%m-%d %H:%M:%S")
    return printable(f"{at}  {row.outcome:<8} {row.type:<16} {row.clerk_id}  {row.svix_id}")

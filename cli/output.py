"""How listings look: a table for people, JSON for machines."""

import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from db.ledger import LedgerRow
from worker.monitoring.words import ago, span

PIPED_WIDTH = 240  # where no terminal sets one, an id stays in one piece for grep
LABEL_WIDTH = 13

Row = TypeVar("Row", bound=Sequence[object])


def show_json(value: object) -> None:
    """Print a value as JSON."""
    click.echo(json.dumps(value, default=plain, indent=2))


def show_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; times as how long ago, nothing for None."""
    now = datetime.now(UTC)
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value, now) for value in row))
    Console(width=None if sys.stdout.isatty() else PIPED_WIDTH).print(table)


def show_rows(
    title: str, headings: Sequence[str], rows: Sequence[Row], *, columns: int, block: Callable[[Row], str]
) -> None:
    """Print a table, or on a terminal of less than `columns`, where it would break the ids, row by row."""
    if sys.stdout.isatty() and shutil.get_terminal_size().columns < columns:
        for row in rows:
            click.echo(printable(block(row)))
    else:
        show_table(title, headings, rows)


def show_entry(label: str, text: str, width: int = LABEL_WIDTH) -> None:
    """Print a label and a text that is wrapped beside it."""
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else PIPED_WIDTH
    indent = " " * (width + 2)
    lines = textwrap.wrap(printable(text), columns - width - 2, break_on_hyphens=False) or [""]
    click.echo(f"{label:<{width}}  {lines[0]}")
    for line in lines[1:]:
        click.echo(indent + line)


def event_block(row: LedgerRow, now: datetime) -> str:
    """Return a delivery in two lines of at most 80 columns."""
    lag = span((row.applied_at - row.received_at).total_seconds())
    return (
        f"{ago(row.applied_at, now):<12} {row.outcome:<9} {row.type}, {lag} after it was received\n"
        f"  {row.clerk_id}  {row.svix_id}"
    )


def printable(text: str) -> str:
    """Return text that came from elsewhere so that it cannot steer the terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()


def _cell(value: object, now: datetime) -> Text:
    if isinstance(value, datetime):
        return Text(ago(value, now))
    return Text("" if value is None else printable(str(value)))


def plain(value: Any) -> str:
    """Return a value that JSON has no form for as text, times in ISO 8601."""
    return value.isoformat() if isinstance(value, datetime) else str(value)

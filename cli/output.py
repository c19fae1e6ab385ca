"""How listings look: a table for people, JSON for machines."""

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

PIPED_WIDTH = 240  # where no terminal sets one, an id stays in one piece for grep

Row = TypeVar("Row", bound=Sequence[object])


def show_json(value: object) -> None:
    """Print a value as JSON."""
    click.echo(json.dumps(value, default=plain, indent=2))


def show_table(title: str, headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table; times to the second, nothing for None."""
    table = Table(title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
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


def printable(text: str) -> str:
    """Return text that came from elsewhere so that it cannot steer the terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()


def _cell(value: object) -> Text:
    if isinstance(value, datetime):
        return Text(value.strftime("%Y-%m-%d %H:%M:%S"))
    return Text("" if value is None else printable(str(value)))


def plain(value: Any) -> str:
    """Return a value that JSON has no form for as text, times in ISO 8601."""
    return value.isoformat() if isinstance(value, datetime) else str(value)

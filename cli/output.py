"""Prints listings: at most 80 columns for people, JSON for programs."""

import json
import shutil
import textwrap
from datetime import UTC, datetime
from typing import Any

import click

from db.ledger import LedgerRow
from worker.monitoring.words import ago, printable, span

LABEL_WIDTH = 13


def show_json(value: object) -> None:
    """Print a value as JSON."""
    click.echo(json.dumps(value, default=plain, indent=2))


def show_entry(label: str, text: str, width: int = LABEL_WIDTH) -> None:
    """Print a label and a text that is wrapped to the terminal's width."""
    lines = wrapped(text, width + 2)
    click.echo(f"{label:<{width}}  {lines[0]}")
    for line in lines[1:]:
        click.echo(" " * (width + 2) + line)


def wrapped(text: str, indent: int) -> list[str]:
    """Return the lines of a text that starts `indent` columns from the left.

    Without a terminal a line has 80 columns, or the number in COLUMNS.
    """
    columns = max(shutil.get_terminal_size().columns - indent, 20)
    return textwrap.wrap(printable(text), columns, break_on_hyphens=False) or [""]


def event_block(row: LedgerRow, now: datetime) -> str:
    """Return a delivery in two lines of at most 80 columns, with its time as how long ago."""
    lag = span((row.applied_at - row.received_at).total_seconds())
    return _block(f"{ago(row.applied_at, now):<11}", row, f", {lag} after receipt")


def event_at(row: LedgerRow) -> str:
    """Return a delivery in two lines of at most 80 columns, with its exact time."""
    return _block(exact(row.applied_at), row)


def _block(when: str, row: LedgerRow, lag: str = "") -> str:
    return printable(f"{when}  {row.outcome:<8} {row.type}{lag}\n  {row.clerk_id}  {row.svix_id}")


def exact(moment: datetime) -> str:
    """Return a moment with its time zone: UTC, or with --local-time that of this machine or of TZ."""
    is_local = click.get_current_context().find_root().params.get("local_time")
    return moment.astimezone(None if is_local else UTC).strftime("%Y-%m-%d %H:%M:%S %Z")


def plain(value: Any) -> str:
    """Return a value that JSON does not support as text, times in ISO 8601."""
    return value.isoformat() if isinstance(value, datetime) else str(value)

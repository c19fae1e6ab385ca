"""The demo: some forty deliveries over HTTP, what was answered, and the rows that they became."""

import os
import secrets
import shutil
import string
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, TypeVar

import click
from rich.console import Console
from rich.table import Table

from cli import samples
from cli.dev.command import DATA
from cli.dev.demo_events import Story, StoryStep
from cli.send import DeliveryResponse, Sender
from config import Settings, decode_signing_secret, load
from db import ledger
from db.connection.engine import Database
from db.models import User
from db.times import now_ms
from web.webhook import PATH

TIMEOUT_S = 30
POLL_S = 0.005
TAG_LETTERS = string.ascii_lowercase + string.digits
LEDGER_LIMIT = 500
ANSWER_COLUMNS = {"delivered": 40, "answer": 28, "outcome": 7}
USER_COLUMNS = dict.fromkeys(("email", "name", "role", "organization", "last_login_at"))
STRANGERS_KEY = b"a key that Clerk does not have"
T = TypeVar("T")


class Played(NamedTuple):
    """A delivery, and what the receiver answered."""

    step: StoryStep
    answer: DeliveryResponse

    @property
    def is_awaited(self) -> bool:
        """Whether a worker will apply it."""
        return self.answer.word == "queued" and self.step.is_readable


def play(url: str, secret: str, database_url: str) -> None:
    """Deliver the story to `url`, signed with `secret`, and print the answers and the rows that they became.

    Waits until the workers have applied all of it, TIMEOUT_S at most. Every run has users of its own. Raises
    NotDelivered or DatabaseUnavailable.
    """
    settings = load(database_url=database_url)
    story = _new_story(settings)
    database = Database(settings)
    try:
        database.ping()  # a connection is there then, and does not count as the service's time
        played, first_row_ms = _deliver(story, url, decode_signing_secret(secret), database)
        outcomes = _await_outcomes(database, played)
        _show_answers(played, outcomes)
        _show_users(_users(database, story))
        click.echo(f"\n{_timing(first_row_ms)}{_backlog(played, outcomes)}\n{_next_steps(url, story)}")
    finally:
        database.dispose()


def _new_story(settings: Settings) -> Story:
    tag = secrets.choice(string.digits) + "".join(secrets.choice(TAG_LETTERS) for _ in range(3))
    return Story(tag, now_ms(), settings.clerk_instance_id or samples.INSTANCE)


def _deliver(story: Story, url: str, key: bytes, database: Database) -> tuple[list[Played], float | None]:
    """Return every delivery with its answer, and the time until the first had become a row, in ms."""
    first, *others = story.steps()
    with Sender(url, key) as clerk, Sender(url, STRANGERS_KEY) as stranger:
        began = time.perf_counter()
        played = [_played(clerk, first)]
        is_there = _poll(lambda: _users(database, story), bool)
        first_row_ms = (time.perf_counter() - began) * 1000 if is_there else None
        played += [_played(stranger if step.is_forged else clerk, step) for step in others]
    return played, first_row_ms


def _played(sender: Sender, step: StoryStep) -> Played:
    return Played(step, sender.deliver(step.svix_id, step.body, age_s=step.age_s))


def _await_outcomes(database: Database, played: Sequence[Played]) -> dict[str, str]:
    """Wait until the ledger has what is awaited; return the outcome of each svix-id that it has."""
    awaited = {item.step.svix_id for item in played if item.is_awaited}

    def look() -> dict[str, str]:
        newest = ledger.recent(database, limit=LEDGER_LIMIT)
        return {row.svix_id: row.outcome for row in newest if row.svix_id in awaited}

    return _poll(look, lambda outcomes: len(outcomes) == len(awaited))


def _users(database: Database, story: Story) -> list[tuple[object, ...]]:
    rows = User.__table__.select().where(User.clerk_id.in_(story.clerk_ids)).order_by(User.clerk_id)
    return database.run(
        lambda connection: [
            tuple(row[name] for name in USER_COLUMNS) for row in connection.execute(rows).mappings()
        ]
    )


def _poll(look: Callable[[], T], is_enough: Callable[[T], bool]) -> T:
    """Look until it is enough, or for TIMEOUT_S; return what was seen last."""
    deadline = time.monotonic() + TIMEOUT_S
    while not is_enough(seen := look()) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return seen


def _show_answers(played: Sequence[Played], outcomes: Mapping[str, str]) -> None:
    rows = [
        (item.step.line, item.answer, outcomes.get(item.step.svix_id) if item.is_awaited else None)
        for item in played
    ]
    _show(f"{len(played)} deliveries", ANSWER_COLUMNS, rows)


def _show_users(rows: Iterable[Sequence[object]]) -> None:
    _show("The rows of users that they became (times are UTC)", USER_COLUMNS, rows)


def _show(title: str, columns: Mapping[str, int | None], rows: Iterable[Sequence[object]]) -> None:
    """Print a table, one line a row; `columns` are the headings with their greatest widths."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading, width in columns.items():
        table.add_column(heading, no_wrap=True, max_width=width)
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    console = Console()
    console.print()
    console.print(table)


def _cell(value: object) -> str:
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%H:%M:%S")
    return "" if value is None else str(value)


def _timing(first_row_ms: float | None) -> str:
    if first_row_ms is None:
        return f"No row after {TIMEOUT_S} s: does a worker run, and what does it say?"
    return f"First row after {first_row_ms:.0f} ms."


def _backlog(played: Sequence[Played], outcomes: Mapping[str, str]) -> str:
    missing = sum(item.is_awaited for item in played) - len(outcomes)
    return f" {missing} deliveries were not applied within {TIMEOUT_S} s." if missing else ""


def _next_steps(url: str, story: Story) -> str:
    command = _command()
    environment = f"  . {DATA / 'env'}\n" if (DATA / "env").exists() else ""
    return (
        "\nTry next, in another terminal:\n"
        f"{environment}"
        f"  curl {url.removesuffix(PATH)}/health\n"
        f"  {command} send user.created\n"
        f"  {command} events --user {story.clerk_id('ann')}\n"
    )


def _command() -> str:
    """Return how a shell calls us: by name, or by path where the virtual environment is not active."""
    if shutil.which("clerk-sync"):
        return "clerk-sync"
    return os.path.relpath(Path(sys.executable).with_name("clerk-sync"))

"""The demo: some forty deliveries over HTTP, their answers, and the rows that they become."""

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from itertools import groupby
from typing import NamedTuple, TypeVar

import click

from cli import samples
from cli.dev.demo_events import Story, StoryStep
from cli.output import show_entry
from cli.send import DeliveryResponse, deliver, http_client
from config import Settings
from db import ledger
from db.connection.engine import Database
from db.models import User
from db.times import now_ms
from worker.queue.failed_jobs import FailedJobs, failed_jobs

TIMEOUT_S = 30
POLL_S = 0.005
LEDGER_LIMIT = 500
LINE_WIDTH = 40
USER_COLUMNS = ("email", "name", "role", "organization", "last_login_at")
FORGED_KEY = b"a key that Clerk does not have"
T = TypeVar("T")


class Played(NamedTuple):
    """A delivery and the receiver's answer."""

    step: StoryStep
    answer: DeliveryResponse

    @property
    def is_awaited(self) -> bool:
        """Whether a worker will apply or fail it."""
        return self.answer.word == "queued"


def play(settings: Settings, url: str) -> str:
    """Deliver the story to `url`, print the answers and the rows, and return the Clerk id of one user.

    Waits at most TIMEOUT_S until workers have applied or failed all of it. Every run has its own users.
    Raises NotDelivered, DatabaseUnavailable or QueueUnavailable.
    """
    tag = f"{secrets.randbelow(10)}{secrets.token_hex(2)[1:]}"
    story = Story(tag, now_ms(), settings.clerk_instance_id or samples.INSTANCE)
    with Database(settings) as database, closing(failed_jobs(settings)) as failed:
        database.ping()  # so that the time of connecting is not counted below
        played, first_row_ms = _deliver(story, url, settings.signing_keys[0], database)
        outcomes = _await_outcomes(database, failed, played)
        _show_answers(played, outcomes)
        click.echo("\nThe rows of users that they became (times are UTC)\n")
        _show_users(_users(database, story))
        click.echo("\nstale: it was known, or something newer was.")
        click.echo("ignored: it says nothing about the user.")
        click.echo(_timing(first_row_ms, sum(item.is_awaited for item in played) - len(outcomes)))
    return story.clerk_id("ann")


def _deliver(story: Story, url: str, key: bytes, database: Database) -> tuple[list[Played], float | None]:
    """Return every delivery with its answer, and the time until the first had become a row, in ms."""
    played, first_row_ms = [], None
    with http_client() as client:
        began = time.perf_counter()
        for step in story.steps():
            signed_at = int(time.time()) - step.age_s
            signing_key = FORGED_KEY if step.is_forged else key
            headers = samples.signed_headers(signing_key, step.svix_id, signed_at, step.body)
            played.append(Played(step, deliver(client, url, headers, step.body)))
            if len(played) == 1 and _poll(lambda: _users(database, story), bool):
                first_row_ms = (time.perf_counter() - began) * 1000
    return played, first_row_ms


def _await_outcomes(database: Database, failed: FailedJobs, played: Sequence[Played]) -> dict[str, str]:
    """Wait until all awaited deliveries were applied or failed; return the outcome by svix-id."""
    awaited = {item.step.svix_id for item in played if item.is_awaited}

    def look() -> dict[str, str]:
        outcomes = {row.svix_id: row.outcome for row in ledger.recent(database, limit=LEDGER_LIMIT)}
        outcomes |= {job.id: f"failed: {job.reason}" for job in failed.newest(limit=LEDGER_LIMIT)}
        return {id_: outcome for id_, outcome in outcomes.items() if id_ in awaited}

    return _poll(look, lambda outcomes: len(outcomes) == len(awaited))


def _users(database: Database, story: Story) -> list[tuple[object, ...]]:
    rows = User.__table__.select().where(User.clerk_id.in_(story.clerk_ids)).order_by(User.clerk_id)
    return database.run(
        lambda connection: [
            tuple(row[name] for name in USER_COLUMNS) for row in connection.execute(rows).mappings()
        ]
    )


def _poll(look: Callable[[], T], is_enough: Callable[[T], bool]) -> T:
    """Call `look` until `is_enough`, or for TIMEOUT_S; return its last result."""
    deadline = time.monotonic() + TIMEOUT_S
    while not is_enough(seen := look()) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return seen


def _show_answers(played: Sequence[Played], outcomes: Mapping[str, str]) -> None:
    click.echo(f"\n{len(played)} deliveries: what the receiver answered → what the worker did with it")
    for chapter, items in groupby(played, lambda item: item.step.chapter):
        click.echo(f"\n{chapter}")
        for item in items:
            show_entry(item.step.line, _result(item, outcomes), LINE_WIDTH)


def _result(item: Played, outcomes: Mapping[str, str]) -> str:
    outcome = outcomes.get(item.step.svix_id) if item.is_awaited else None
    return f"{item.answer} → {outcome}" if outcome else str(item.answer)


def _show_users(rows: Iterable[Sequence[object]]) -> None:
    lines = [USER_COLUMNS, *(tuple(map(_cell, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = (text.ljust(width) for text, width in zip(line, widths, strict=True))
        click.echo("  ".join(padded).rstrip())


def _cell(value: object) -> str:
    if isinstance(value, datetime):
        return value.astimezone(UTC).strftime("%H:%M:%S")
    return "" if value is None else str(value)


def _timing(first_row_ms: float | None, missing: int) -> str:
    late = f" {missing} deliveries were not applied within {TIMEOUT_S} s." if missing else ""
    if first_row_ms is None:
        return f"No row after {TIMEOUT_S} s: check that a worker runs, and read its log.{late}"
    return f"First row after {first_row_ms:.0f} ms.{late}"

"""Shared by the commands that read Clerk's API: the context of a sync, and a progress bar."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

from config import ServiceError, load
from db import schema
from db.connection.engine import Database
from worker.shutdown import StopSignal
from worker.sync.context import SyncContext, sync_context


@contextmanager
def context_from_environment() -> Iterator[SyncContext]:
    """Yield the context of a sync from Clerk's API, which stops on Ctrl-C and SIGTERM.

    Raises SettingsError, and ServiceError if migrations are missing.
    """
    settings = load("clerk_secret_key", "database_url")
    stopping = StopSignal()
    stopping.listen()
    with Database(settings) as database:
        if trouble := schema.state(database).trouble:
            raise ServiceError(trouble)
        with sync_context(settings, database, stopping) as context:
            yield context


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[..., None]]:
    """Yield a function that shows how many of `expected` (0: unknown) were seen, with another title if given.

    Without a terminal it prints nothing.
    """
    with click.progressbar(
        length=0, label=title, show_pos=True, file=sys.stderr, hidden=not sys.stderr.isatty()
    ) as bar:

        def show(seen: int, expected: int, title: str | None = None) -> None:
            bar.label, bar.length = title or bar.label, max(seen, expected) if expected else None
            bar.pos, bar.finished = seen, False
            bar.make_step(0)  # computes the time that is left
            bar.render_progress()

        yield show

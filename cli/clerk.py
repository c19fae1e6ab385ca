"""Shared by the commands that read Clerk's API: the context of a sync, and a progress bar."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from config import load
from db.connection.engine import Database
from worker.monitoring.health import schema_facts
from worker.shutdown import StopSignal
from worker.sync.context import SyncContext, sync_context


@contextmanager
def context_from_environment() -> Iterator[SyncContext]:
    """Yield the context of a sync from Clerk's API, which stops on Ctrl-C and SIGTERM.

    Raises SettingsError, and ProbeFailed if migrations are missing.
    """
    settings = load("clerk_secret_key", "database_url")
    stopping = StopSignal()
    stopping.listen()
    with Database(settings) as database:
        schema_facts(database)
        with sync_context(settings, database, stopping) as context:
            yield context


class UserBar(Progress):
    """A progress bar with the rate and the time left; without a terminal it prints nothing."""

    def __init__(self, title: str) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self.add_task(title, total=None)

    def show(self, seen: int, expected: int, title: str | None = None) -> None:
        """Show how many of `expected` (0: unknown) were seen, from now on with `title` if there is one."""
        total = max(seen, expected) if expected else None
        self.update(self._task, description=title, completed=seen, total=total)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        """Return the current number of users per second."""
        return Text(f"{task.speed:,.0f}/s" if task.speed else "")

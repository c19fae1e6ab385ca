"""`db`: migrations, development data, and locks on the tables."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from cli.output import show_entry, show_json, wrapped
from config import ServiceError, Settings, load
from db import locks, migration, schema
from db.connection.engine import Database
from db.connection.errors import UTF8
from db.connection.url import hosts
from db.seed import seed_users
from worker.monitoring.words import counted, span

PID_WIDTH = 7
UNSEEN = "state not visible (GRANT pg_read_all_stats to the role)"
BAD_ENCODING = (
    "warning: the database's encoding is {}, not UTF8: deliveries with characters outside it will fail"
)
VIEW_MISSING = (
    "warning: the view {} was not created, because the application has a table or view of that name:"
    " set DATABASE_SCHEMA to a schema of its own"
)
LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1"}


class NotLocal(ServiceError):
    """A command that deletes data was called for a database that is not on this machine."""


@click.group()
def db() -> None:
    """Migrations, development data, and locks on the tables."""


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Load the settings when the command runs: `--help` works without them."""

    @wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        command(load("database_url"), *arguments, **options)

    return run


@db.command()
@click.argument("revision", default="head")
@_with_settings
def upgrade(settings: Settings, revision: str) -> None:
    """Create the tables, or run the migrations that have not run yet.

    With REVISION it stops there.
    """
    with Database(settings, unpooled=True) as database:
        migration.upgrade(database, revision)
        if database.encoding != UTF8:
            click.echo(BAD_ENCODING.format(database.encoding), err=True)
        if settings.organization_source == "membership":
            for name in schema.missing_views(database):
                click.echo(VIEW_MISSING.format(name), err=True)
        click.echo(f"schema at {schema.current_revision(database)}")


def _destroys(command: Callable[..., None]) -> Callable[..., None]:
    command = click.option("--force", is_flag=True, help="Also for a database on another machine.")(command)
    return click.option("--yes", is_flag=True, help="Do not ask for confirmation.")(command)


@db.command()
@click.argument("revision", default="-1")
@_destroys
@_with_settings
def downgrade(settings: Settings, revision: str, yes: bool, force: bool) -> None:
    """Undo the last migration, or all after REVISION.

    REVISION `base` undoes every migration and so drops every table. The command lists what is lost and asks
    for confirmation.
    """
    _require_local(settings, force)
    with Database(settings, unpooled=True) as database:
        _confirm_loss(database, revision, yes)
        migration.downgrade(database, revision)
        click.echo(f"schema at {schema.current_revision(database) or 'base'}")


@db.command()
@_with_settings
def current(settings: Settings) -> None:
    """Show the revision of the schema, and whether it is the newest."""
    with Database(settings, unpooled=True) as database:
        click.echo(f"{schema.current_revision(database) or 'no revision'} ({schema.state(database)})")


@db.command()
@_destroys
@_with_settings
def reset(settings: Settings, yes: bool, force: bool) -> None:
    """Drop the tables with all rows, and create them again."""
    _require_local(settings, force)
    with Database(settings, unpooled=True) as database:
        _confirm_loss(database, "base", yes)
        migration.downgrade(database, "base")
        migration.upgrade(database)
        click.echo(f"schema at {schema.current_revision(database)}, tables empty")


@db.command()
@click.option(
    "--users", default=20, show_default=True, type=click.IntRange(1, 100_000), help="Number of users."
)
@_with_settings
def seed(settings: Settings, users: int) -> None:
    """Add sample users with addresses at example.com."""
    with Database(settings, unpooled=True) as database:
        click.echo(f"{counted(seed_users(database, users), 'user')} added")


@db.command("locks")
@click.option("--end", "pid", type=int, metavar="PID", help="End this transaction and close its connection.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
@_with_settings
def locks_(settings: Settings, pid: int | None, yes: bool, as_json: bool) -> None:
    """List the transactions that hold locks on the tables.

    The oldest comes first. With --end it ends one of them: the database closes its connection and undoes
    what it has not committed.
    """
    with Database(settings, unpooled=True) as database:
        found = locks.holders(database)
        if pid is not None:
            _end(database, found, pid, yes=yes)
        elif as_json:
            show_json([holder._asdict() for holder in found])
        else:
            _show_locks(found)


def _end(database: Database, found: list[locks.Holder], pid: int, *, yes: bool) -> None:
    if all(pid not in (holder.pid, *holder.waits_for) for holder in found):
        raise click.UsageError(f"transaction {pid} holds no locks on the tables: nothing was changed")
    if not yes:
        _confirm(f"Close the connection of {pid} and undo its transaction?")
    click.echo(f"transaction {pid} {'is being ended' if locks.end(database, pid) else 'has ended already'}")


def _show_locks(found: list[locks.Holder]) -> None:
    for holder in found:
        show_entry(str(holder.pid), _lock_entry(holder), PID_WIDTH)
    if found:
        click.echo("\nTo end one: clerk-sync db locks --end PID")
    else:
        click.echo("no transaction holds locks on the tables")


def _lock_entry(holder: locks.Holder) -> str:
    seen = f"{holder.state}, open for {span(holder.open_s)}" if holder.open_s is not None else UNSEEN
    waits = f", waits for {', '.join(map(str, holder.waits_for))}" if holder.waits_for else ""
    what = "locks" if holder.writes else "reads"
    return f"{holder.program or 'a program without a name'}: {seen}, {what} {', '.join(holder.tables)}{waits}"


def _require_local(settings: Settings, force: bool) -> None:
    elsewhere = {host for host in hosts(settings, unpooled=True) if not host.startswith("/")} - LOCAL_HOSTS
    if elsewhere and not force:
        raise NotLocal("the database is not on this machine: nothing was changed; add --force to allow it")


def _confirm_loss(database: Database, revision: str, yes: bool) -> None:
    """Print what a downgrade to `revision` removes, and ask for a confirmation."""
    steps = migration.steps_down(database, revision)
    if yes or not steps:
        return
    click.echo("This undoes, with the rows of every table that it drops:", err=True)
    for step in steps:
        click.echo("\n".join(f"  {line}" for line in wrapped(step, 2)), err=True)
    result = "all lost" if steps[-1].startswith(schema.FIRST) else "kept"
    click.echo(f"Rows in users: {schema.count_users(database):,}, {result}", err=True)
    _confirm("Undo it?")


def _confirm(question: str) -> None:
    """Ask on the terminal. Raises click.UsageError without one, and click.Abort if the answer is no."""
    if not sys.stdin.isatty():
        raise click.UsageError("nothing was changed: without a terminal, add --yes to confirm")
    click.confirm(question, abort=True, err=True)

"""`db`: the migrations, and data for development."""

from collections.abc import Iterator
from contextlib import contextmanager

import click

from config import Settings, load
from db import schema
from db.connection.engine import Database
from db.connection.url import hosts
from db.seed import seed_users

LOCAL_HOSTS = {"localhost", "127.0.0.1", "::1"}


class NotLocal(Exception):
    """A command that destroys data was pointed at a database that is not on this machine."""

    retryable = False


@click.group()
@click.pass_context
def db(context: click.Context) -> None:
    """Migrations and development data."""
    context.obj = load("database_url")


@db.command()
@click.argument("revision", default="head")
@click.pass_obj
def upgrade(settings: Settings, revision: str) -> None:
    """Run the migrations that are missing."""
    with _migrating(settings) as database:
        schema.upgrade(database, revision)
        click.echo(f"schema at {schema.revision(database)}")


@db.command()
@click.argument("revision", default="-1")
@click.pass_obj
def downgrade(settings: Settings, revision: str) -> None:
    """Take the last migration back, or all down to REV (`base`: every one)."""
    with _migrating(settings) as database:
        schema.downgrade(database, revision)
        click.echo(f"schema at {schema.revision(database) or 'base'}")


@db.command()
@click.pass_obj
def current(settings: Settings) -> None:
    """Show the schema's revision, and whether it is the newest."""
    with _migrating(settings) as database:
        click.echo(f"{schema.revision(database) or 'no revision'} ({schema.state(database)})")


@db.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--force", is_flag=True, help="Also a database that is not on this machine.")
@click.pass_obj
def reset(settings: Settings, yes: bool, force: bool) -> None:
    """Drop the tables and everything in them, and make them anew."""
    if not (force or all(_is_local(host) for host in hosts(settings, unpooled=True))):
        raise NotLocal("the database is not on this machine: nothing was done; --force does it all the same")
    if not yes:
        *names, last = schema.tables()
        click.confirm(f"Drop {', '.join(names)} and {last} with all their rows?", abort=True, err=True)
    with _migrating(settings) as database:
        schema.downgrade(database, "base")
        schema.upgrade(database)
        click.echo(f"schema at {schema.revision(database)}, tables empty")


@db.command()
@click.option("--users", default=20, show_default=True, type=click.IntRange(1, 100_000), help="How many.")
@click.pass_obj
def seed(settings: Settings, users: int) -> None:
    """Add made-up users, their addresses at example.com."""
    with _migrating(settings) as database:
        click.echo(f"{seed_users(database, users)} users added")


def _is_local(host: str) -> bool:
    return host in LOCAL_HOSTS or host.startswith("/")


@contextmanager
def _migrating(settings: Settings) -> Iterator[Database]:
    database = Database(settings, unpooled=True)
    try:
        yield database
    finally:
        database.dispose()

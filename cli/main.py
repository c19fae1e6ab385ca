"""`clerk-sync`: the group of commands. Every failure is reported in one line."""

import errno
import gc
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from config import ServiceError
from worker import log

# New objects between two garbage collections. With Python's default they take an eighth of the start-up time
GC_THRESHOLD = 10_000
OUTPUT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
COMMANDS = {  # and the module of each
    "backfill": "cli.backfill",
    "db": "cli.database",
    "dev": "cli.dev.command",
    "events": "cli.events",
    "failed": "cli.failed",
    "pull": "cli.pull",
    "reconcile": "cli.reconcile",
    "send": "cli.send",
    "status": "cli.status",
    "user": "cli.user",
    "web": "cli.serve",
    "worker": "cli.serve",
}


class LazyGroup(click.Group):
    """Imports a command when it is called, so that `clerk-sync web` does not import what `dev` needs."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the names, in the order of the help."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Return the command of that name, or None."""
        return getattr(import_module(COMMANDS[cmd_name]), cmd_name) if cmd_name in COMMANDS else None


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="clerk-sync", prog_name="clerk-sync")
@click.option("--debug", is_flag=True, help="Show the traceback if a command fails.")
@click.option(
    "--local-time", is_flag=True, help="Show exact times in this machine's time zone (or TZ), not UTC."
)
def cli(debug: bool, local_time: bool) -> None:
    """Keep the users table in PostgreSQL in sync with Clerk.

    Settings come from environment variables and from the file .env; README.md lists them.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command. Exit status: 0 done, 1 failed or drift found, 2 wrong usage."""
    gc.set_threshold(GC_THRESHOLD)
    given = list(sys.argv[1:] if arguments is None else arguments)
    _open_closed_streams()
    _leave_deleted_directory()
    log.silence()
    try:
        status: Any = cli.main(given, prog_name="clerk-sync", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as end:
        status = end.exit_code
    except click.Abort:
        status = _fail("stopped")
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        status = _drop_output()
    except Exception as error:
        if "--debug" in given:
            traceback.print_exc()
        if isinstance(error, OSError) and error.errno in OUTPUT_ERRORS:
            _drop_output()
        status = _fail(describe(error))
    sys.exit(status if isinstance(status, int) else 0)


def describe(error: Exception) -> str:
    """Return the line that a user sees. Only the text of a ServiceError is safe to show."""
    if isinstance(error, ServiceError):
        return str(error)
    if isinstance(error, OSError) and error.errno in OUTPUT_ERRORS:
        return f"the output cannot be written: {os.strerror(error.errno or 0)}"
    return f"unexpected {type(error).__name__} (see it with --debug)"


def _open_closed_streams() -> None:
    """Open closed standard streams on /dev/null: otherwise the next connection would get their numbers."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, os.fdopen(number, mode))


def _leave_deleted_directory() -> None:
    """Change to / if the working directory was deleted: libraries read its name."""
    try:
        os.getcwd()
    except FileNotFoundError:
        os.chdir("/")


def _drop_output() -> int:
    """Redirect further output to /dev/null, so that the end of the process reports no error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _fail(message: str) -> int:
    click.echo(f"clerk-sync: {message}", err=True)
    return 1


if __name__ == "__main__":
    main()

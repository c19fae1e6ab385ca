"""`clerk-sync` commands: run in this process as in a shell, or started as a process of their own."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest

import config
from cli.main import main
from tests.support.processes import clerk_sync
from tests.support.stack import environment

PATIENCE_S = 60


class Ran(NamedTuple):
    """What a command ended with."""

    returncode: int
    stdout: str
    stderr: str


RunCommand = Callable[..., Ran]


def run(settings: config.Settings, *arguments: str) -> Ran:
    """Run a command to its end, with these settings alone. Its start would take longer than the command."""
    return run_with(environment(settings), *arguments)


def run_with(env: Mapping[str, str], *arguments: str, directory: Path | None = None) -> Ran:
    """Run a command to its end, in an environment and a directory."""
    with (
        chdir(directory or Path.cwd()),
        mock.patch.dict(os.environ, dict(env), clear=True),
        _signals_restored(),
        redirect_stdout(StringIO()) as out,
        redirect_stderr(StringIO()) as err,
        pytest.raises(SystemExit) as end,
    ):
        main(arguments)
    assert isinstance(end.value.code, int)
    return Ran(end.value.code, out.getvalue(), err.getvalue())


def runner(*command: str) -> RunCommand:
    """Return what runs that command with more arguments, in the environment that the test has made."""
    return lambda *arguments: run_with(os.environ, *command, *arguments)


@contextmanager
def _signals_restored() -> Iterator[None]:
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def start(settings: config.Settings, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        clerk_sync(*arguments),
        env=environment(settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

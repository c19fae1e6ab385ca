"""`clerk-sync` commands in processes of their own."""

import subprocess
import sys

import config
from tests.support.stack import environment

PATIENCE_S = 60


def run(settings: config.Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        _command(arguments),
        env=environment(settings),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )


def start(settings: config.Settings, *arguments: str) -> subprocess.Popen[str]:
    """Start a command."""
    return subprocess.Popen(
        _command(arguments),
        env=environment(settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _command(arguments: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-P", "-m", "cli.main", *arguments]

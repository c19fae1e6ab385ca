"""`clerk-sync` commands in processes of their own."""

import subprocess

import config
from tests.support.processes import clerk_sync
from tests.support.stack import environment

PATIENCE_S = 60


def run(settings: config.Settings, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        clerk_sync(*arguments),
        env=environment(settings),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )


def start(settings: config.Settings, *arguments: str) -> subprocess.Popen[str]:
    """Start a command."""
    return subprocess.Popen(
        clerk_sync(*arguments),
        env=environment(settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

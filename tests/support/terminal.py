"""A command on a terminal, as an operator has it before him."""

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import config
from tests.support.commands import PATIENCE_S
from tests.support.processes import clerk_sync
from tests.support.stack import environment

ROWS = 30
SOON_S = 20
# What a terminal does not show: colours, and moves of the cursor. Source: ECMA-48, 5.4 "Control sequences"
CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
# A session of its own whose terminal this is, as in a login: only so does Ctrl-C become a signal.
LOG_IN = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """A command on a terminal. `written` is all that came, also what a terminal does not show."""

    def __init__(self, command: "subprocess.Popen[bytes]", keyboard: int) -> None:
        self.command = command
        self.written = ""
        self._keyboard = keyboard
        self._deadline = time.monotonic() + PATIENCE_S

    @property
    def shown(self) -> str:
        """What was ever to be seen."""
        return CONTROL.sub("", self.written)

    @property
    def left(self) -> str:
        """What is to be seen in the end: of a line that was drawn anew, what was drawn last."""
        lines = self.shown.replace("\r\n", "\n").split("\n")
        return "\n".join(line.rpartition("\r")[2] for line in lines)

    def press(self, keys: bytes) -> None:
        os.write(self._keyboard, keys)

    def wait_for(self, text: str) -> None:
        while text not in self.shown:
            assert self.read(), self.shown

    def wait(self) -> int:
        """Wait until the command has ended, and return its exit status."""
        while self.read():
            pass
        return self.command.wait(SOON_S)

    def read(self) -> bool:
        """Read what comes within a moment; say whether more may come."""
        assert time.monotonic() < self._deadline, self.shown
        ready, _, _ = select.select([self._keyboard], [], [], 0.1)
        try:
            data = os.read(self._keyboard, 65536) if ready else b""
        except OSError:  # EIO: no process has the terminal open any more
            return False
        self.written += data.decode()
        return True


@contextmanager
def on_a_terminal(
    settings: config.Settings, *arguments: str, columns: int = 100, output: Path | None = None
) -> Iterator[Terminal]:
    """Run a command on a terminal of its own for the length of the block; its stdout may go to a file."""
    with ExitStack() as stack:
        keyboard, terminal = pty.openpty()
        stack.callback(os.close, keyboard)
        termios.tcsetwinsize(terminal, (ROWS, columns))
        command = subprocess.Popen(
            [sys.executable, "-P", "-c", LOG_IN, *clerk_sync(*arguments)],
            env={**environment(settings), "TERM": "xterm-256color"},
            stdin=terminal,
            stdout=stack.enter_context(output.open("wb")) if output else terminal,
            stderr=terminal,
            start_new_session=True,
        )
        os.close(terminal)
        stack.enter_context(command)
        stack.callback(command.kill)
        yield Terminal(command, keyboard)

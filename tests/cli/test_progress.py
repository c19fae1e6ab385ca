"""`clerk-sync backfill` on a terminal: what the operator sees, Ctrl-C, and a line that breaks."""

import os
import pty
import re
import select
import subprocess
import sys
import termios
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

import pytest

import config
from cli.servers import HOST
from tests.cli.commands import PATIENCE_S
from tests.conftest import MakeSettings
from tests.fake_clerk import FakeClerk, Request
from tests.faults.line import Line
from tests.repair import api_settings, count
from tests.stack import environment

USERS = 6000
ROWS, COLUMNS = 30, 100
CTRL_C = b"\x03"
SOON_S = 5
CUT_AT = (4, 8, 12)
HALF_ANSWERED_AT = 10
# What a terminal does not show: colours, and moves of the cursor. Source: ECMA-48, 5.4 "Control sequences"
CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
ERASED = "\x1b[2K"  # the line is empty again, which is how the bar is drawn anew and goes in the end
BAR = re.compile(r"Users +\S.*? (\d+)/6000 +([\d,]+)/s +(\d:\d\d:\d\d)")
# A session of its own whose terminal this is, as in a login: only so does Ctrl-C become a signal.
LOG_IN = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-P", "-m", "cli.main", *sys.argv[1:]])
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
        """What stands below the last line that was erased."""
        return CONTROL.sub("", self.written.rpartition(ERASED)[2]).replace("\r", "").replace("^C", "")

    def press(self, keys: bytes) -> None:
        """Type."""
        os.write(self._keyboard, keys)

    def bars(self) -> Iterator[re.Match[str]]:
        """Give each state of the bar that shows a rate and the time left, as soon as it is there."""
        seen = 0
        while self._read():
            for bar in BAR.finditer(self.shown, seen):
                seen = bar.end()
                yield bar

    def wait(self) -> int:
        """Wait until the command has ended, and return its exit status."""
        while self._read():
            pass
        return self.command.wait(SOON_S)

    def _read(self) -> bool:
        assert time.monotonic() < self._deadline, self.shown
        ready, _, _ = select.select([self._keyboard], [], [], 0.1)
        try:
            data = os.read(self._keyboard, 65536) if ready else b""
        except OSError:  # EIO: nobody has the terminal open any more
            return False
        self.written += data.decode()
        return True


@contextmanager
def on_a_terminal(settings: config.Settings, *arguments: str) -> Iterator[Terminal]:
    """Run a command on a terminal of its own for the length of the block."""
    with ExitStack() as stack:
        keyboard, terminal = pty.openpty()
        stack.callback(os.close, keyboard)
        termios.tcsetwinsize(terminal, (ROWS, COLUMNS))
        command = subprocess.Popen(
            [sys.executable, "-P", "-c", LOG_IN, *arguments],
            env={**environment(settings), "TERM": "xterm-256color"},
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
        os.close(terminal)
        stack.enter_context(command)
        stack.callback(command.kill)
        yield Terminal(command, keyboard)


@pytest.fixture
def settings(make_settings: MakeSettings, clerk: FakeClerk) -> config.Settings:
    clerk.put_many(USERS)
    clerk.before = slowly
    return api_settings(make_settings, clerk)


def slowly(_: Request) -> None:
    time.sleep(0.15)


def test_a_bar_shows_how_many_how_fast_and_how_long_yet_and_leaves_one_line(
    settings: config.Settings,
) -> None:
    with on_a_terminal(settings, "backfill") as terminal:
        bars = list(terminal.bars())
        assert terminal.wait() == 0, terminal.shown
    numbers = [int(bar[1]) for bar in bars]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) > 3
    assert any(0 < number < USERS for number in numbers)
    assert terminal.left == "6,000 users: 6,000 created, 0 updated, 0 unchanged\n"


def test_ctrl_c_ends_it_within_seconds_with_one_line_that_says_how_to_go_on(
    clerk: FakeClerk, settings: config.Settings
) -> None:
    with on_a_terminal(settings, "backfill") as terminal:
        next(bar for bar in terminal.bars() if int(bar[1]) >= 1000)
        terminal.press(CTRL_C)
        began = time.monotonic()
        assert terminal.wait() == 1
        assert time.monotonic() - began < SOON_S
    stopped = re.fullmatch(
        r"clerk-sync: stopped after ([\d,]+) users: the next backfill goes on from there\n", terminal.left
    )
    assert stopped, terminal.left
    clerk.before = lambda _: None
    with on_a_terminal(settings, "backfill") as terminal:
        assert terminal.wait() == 0
    assert f"Going on after {stopped[1]} users (--restart begins anew)" in terminal.shown
    assert count(settings) == USERS


def test_connections_that_are_cut_in_the_middle_do_not_fail_the_run(
    clerk: FakeClerk, settings: config.Settings
) -> None:
    port = urlsplit(clerk.url).port
    assert port
    line = Line(port)

    def cut_now_and_then(request: Request) -> None:
        if len(clerk.requests) in CUT_AT:
            line.cut()
        if len(clerk.requests) == HALF_ANSWERED_AT:
            clerk.answer_next(200, "[" + " " * 1000, cut=500)
        slowly(request)

    clerk.before = cut_now_and_then
    line.start()
    try:
        over_the_line = settings.model_copy(update={"clerk_api_url": f"http://{HOST}:{line.port}"})
        with on_a_terminal(over_the_line, "backfill") as terminal:
            assert terminal.wait() == 0, terminal.shown
    finally:
        line.stop()
    assert terminal.left == "6,000 users: 6,000 created, 0 updated, 0 unchanged\n"
    assert count(settings) == USERS
    asked = Counter((request.path, str(request.parameters)) for request in clerk.requests)
    assert asked.total() - len(asked) > len(CUT_AT), "what was cut off was asked for again"

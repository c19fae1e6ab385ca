"""A process of the service under test: how it is started, what it writes, how it ends."""

import json
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from cli.dev.process import Process
from tests.support.waiting import wait_until

SOON_S = 20.0
START_S = 30.0

Line = dict[str, Any]


class ServiceProcess(Process):
    """A command that writes to `log`, in a directory of the test; one that has ended can be started again.

    As a context manager it runs as long as the block, and has to end in time on SIGTERM.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str | Path],
        env: Mapping[str, str],
        directory: Path,
        *,
        cwd: Path | None = None,
    ) -> None:
        """It runs in `cwd`, by default the directory of its log."""
        super().__init__(name, directory / f"{name}.pid")
        self.log = directory / f"{name}.log"
        self._argv = argv
        self._env = env
        self._cwd = cwd or directory

    def start(self) -> Self:
        self.launch(self._argv, env=self._env, cwd=self._cwd, log=self.log)
        return self

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.kill()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            if self.running:
                self.stop(within=START_S)
        finally:
            self.kill()

    @property
    def living_pid(self) -> int:
        assert self.pid, self.text()
        return self.pid

    def text(self) -> str:
        """Return what it has written so far, in every run."""
        return self.log.read_text() if self.log.exists() else ""

    def lines(self, event: str) -> list[Line]:
        """Return the lines of that event so far; the log must be JSON."""
        whole = self.text().rpartition("\n")[0].splitlines()
        return [line for line in map(json.loads, whole) if line["event"] == event]

    def await_line(self, event: str, within: float = SOON_S, **fields: object) -> Line:
        """Wait for a line of that event with those fields, `within` seconds at most."""

        def matching() -> list[Line]:
            assert self.running, self.text()
            return [line for line in self.lines(event) if fields.items() <= line.items()]

        wait_until(matching, within, self.text)
        return matching()[-1]

    def await_text(self, text: str, within: float = START_S) -> Self:
        """Wait until it has written that, and fail when it ends before."""

        def found() -> bool:
            has_ended = not self.running
            assert text in self.text() or not has_ended, self.text()
            return text in self.text()

        wait_until(found, within, self.text)
        return self

    def await_end(self, within: float = SOON_S) -> int | None:
        """Wait until it has ended, and return its exit status."""
        wait_until(lambda: not self.running, within, self.text)
        return self.exit_status

    def stop(self, number: signal.Signals = signal.SIGTERM, within: float = SOON_S) -> int | None:
        """Send a signal and return the exit status; fail when it does not end."""
        os.kill(self.living_pid, number)
        return self.await_end(within)

"""Several worker processes under one parent, which starts another when one dies."""

import subprocess
import time
from collections.abc import Sequence

import structlog

from worker.shutdown import StopSignal

log = structlog.get_logger("worker.supervisor")

LOOK_EVERY_S = 0.5
SOON_S = 5.0  # a process that dies sooner than that is started again with growing pauses
MAX_PAUSE_S = 30.0


class Slot:
    """The place of one process."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self._pause_s = 0.0

    def look(self) -> None:
        """Start the process when there is none, or when it has died and the pause is over."""
        if self._process is None:
            if time.monotonic() >= self._started_at + self._pause_s:
                self._start()
        elif (status := self._process.poll()) is not None:
            self._bury(status)

    def stop(self) -> None:
        """Ask the process to finish what it has in hand."""
        if self._process is not None:
            self._process.terminate()

    def wait(self) -> None:
        """Wait until the process has ended."""
        if self._process is not None:
            self._process.wait()

    def _start(self) -> None:
        self._started_at = time.monotonic()
        self._process = subprocess.Popen(self._command)  # noqa: S603 - our own command line

    def _bury(self, status: int) -> None:
        lived_s = time.monotonic() - self._started_at
        self._pause_s = min(max(1.0, self._pause_s * 2), MAX_PAUSE_S) if lived_s < SOON_S else 0.0
        self._process = None
        log.error("a worker died, starting another", exit_status=status, pause_s=self._pause_s)


def supervise(command: Sequence[str], count: int, stopping: StopSignal) -> None:
    """Keep `count` processes of `command` running until told to stop; then end them all and return."""
    slots = [Slot(command) for _ in range(count)]
    try:
        while not stopping.requested:
            for slot in slots:
                slot.look()
            stopping.wait(LOOK_EVERY_S)
    finally:
        for slot in slots:
            slot.stop()
        for slot in slots:
            slot.wait()

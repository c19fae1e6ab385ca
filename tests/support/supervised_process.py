"""Processes that a platform would start again, each with what it takes to strike it and to look at it."""

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from tests.support.processes import clerk_sync, family, rss_mb
from tests.support.service_process import ServiceProcess

ROOT = Path(__file__).parents[2]
PAUSE_S = 1.0
EXCUSED_S = 20.0  # after a signal: a receiver whose port is not free yet ends once more


class SupervisedProcess(ServiceProcess):
    """One process of the service; `ends` counts how often it has ended without being made to."""

    def __init__(self, name: str, argv: Sequence[str], env: Mapping[str, str], directory: Path) -> None:
        super().__init__(name, argv, env, directory)
        self.starts = 0
        self.ends: list[int | None] = []
        self._excused_until = 0.0
        self._seen_ended_at: float | None = None

    def start(self) -> Self:
        self._seen_ended_at = None
        self.starts += 1
        return super().start()

    def excuse(self) -> None:
        """Say that it may end for some time to come: a call is about to see to that."""
        self._excused_until = time.monotonic() + EXCUSED_S

    def signal(self, number: signal.Signals, *, child: bool = False) -> None:
        """Send a signal to it, or to the process that it serves with."""
        pid = self.pid
        if pid is None:
            return
        with suppress(ProcessLookupError, FileNotFoundError):
            target = family(pid)[-1] if child else pid
            if number in (signal.SIGKILL, signal.SIGTERM):
                self.excuse()
            os.kill(target, number)

    def look(self) -> None:
        """Do what a platform does: start it again some time after it has ended."""
        if self.running:
            return
        now = time.monotonic()
        if self._seen_ended_at is None:
            self._seen_ended_at = now
            if now > self._excused_until:
                self.ends.append(self.exit_status)
        elif now >= self._seen_ended_at + PAUSE_S:
            self.start()

    def family(self) -> list[int]:
        """Return the process ids of it and its children."""
        return family(self.pid) if self.pid else []

    def memory_mb(self) -> float:
        with suppress(FileNotFoundError):
            return sum(rss_mb(pid) for pid in family(self.pid)) if self.pid else 0
        return 0


@contextmanager
def running(process: SupervisedProcess) -> Iterator[SupervisedProcess]:
    process.start()
    try:
        yield process
    finally:
        process.kill()


def supervised_worker(
    name: str, env: Mapping[str, str], directory: Path, module: str | None = None, *arguments: str
) -> SupervisedProcess:
    """Return a worker: the one that is deployed, or one that a module of these tests runs."""
    if module is None:
        return SupervisedProcess(name, clerk_sync("worker"), env, directory)
    return SupervisedProcess(
        name, [sys.executable, "-m", module, *arguments], {**env, "PYTHONPATH": str(ROOT)}, directory
    )


def has_begun(worker: SupervisedProcess) -> bool:
    return '"worker started"' in worker.text()

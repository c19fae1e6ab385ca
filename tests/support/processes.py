"""Processes of the machine: command lines of ours, families, memory, and how to let them hang."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def clerk_sync(*arguments: str) -> list[str]:
    """Return the command line of a command of ours."""
    return [sys.executable, "-P", "-m", "cli.main", *arguments]


def rss_mb(pid: int) -> float:
    """Return the memory of one process that is in use (resident), in MB. Source: proc(5)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def pss_mb(pid: int) -> float:
    """Return the memory of one process in MB, with its share of what several map (PSS). Source: proc(5)."""
    with suppress(OSError):  # it has ended meanwhile
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0


def family(pid: int) -> list[int]:
    """Return a process and all that descend from it, the eldest first."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        return []
    return [pid, *(member for child in children for member in family(int(child)))]


def command_lines(pid: int) -> str:
    """Return the command lines of a process and of all that it started. Source: proc(5)."""
    found = []
    for member in family(pid):
        with suppress(FileNotFoundError):  # it has ended since
            found.append(Path(f"/proc/{member}/cmdline").read_bytes().replace(b"\0", b" ").decode())
    assert found
    return "\n".join(found)


@contextmanager
def frozen_family(pid: int) -> Iterator[None]:
    """Let a process and all its descendants hang for the length of the block."""
    members = family(pid)
    send(members, signal.SIGSTOP)
    try:
        yield
    finally:
        send(members, signal.SIGCONT)


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue

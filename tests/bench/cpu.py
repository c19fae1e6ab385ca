"""The CPU time for an event, by process: it shows what limits a rate."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from tests.bench.figures import ComparedCase, Figures
from tests.bench.harness import Bench
from tests.bench.load import LoadReport
from tests.support.processes import family

BUSY = "cores busy %"
OWN, WORKER = "CPU us", "CPU us worker"
POSTGRES, REDIS, CLIENT = "CPU us PostgreSQL", "CPU us Redis", "CPU us load client"
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class CpuClock:
    """Measures from its creation the CPU time of processes and of all their descendants."""

    def __init__(self, bench: Bench, own: Mapping[str, int | None]) -> None:
        self._pids = {**own, POSTGRES: bench.postgres.pid, REDIS: bench.redis_server.pid}
        self._before = self._now()
        self._cores_before = _core_ticks()

    def per_event(self, events: float) -> dict[str, float]:
        """Return the us of CPU time per event since then, by name."""
        return {name: (spent - self._before[name]) / events * 1e6 for name, spent in self._now().items()}

    def per_delivery(self, report: LoadReport) -> dict[str, float]:
        """Return the us of CPU time per delivery since then, by name, that of the load client too."""
        return {**self.per_event(report.answered), CLIENT: report.cpu_us}

    def busy(self) -> dict[str, float]:
        """Return the share of the cores' time that was used since then, by any process."""
        idle, total = (now - before for now, before in zip(_core_ticks(), self._cores_before, strict=True))
        return {BUSY: 100 * (1 - idle / total)}

    def _now(self) -> dict[str, float]:
        return {name: sum(map(_spent_s, family(pid))) for name, pid in self._pids.items() if pid}


def cores_allow(figures: Figures, case: ComparedCase) -> float:
    """Return the events/s at which this CPU time per event would occupy all cores."""
    names = [name for name in figures.samples[case] if name.startswith(OWN)]
    return (os.cpu_count() or 1) * 1e6 / sum(figures.median(case, name) for name in names)


def _core_ticks() -> tuple[int, int]:
    """Return the idle time of all cores, and their whole time."""
    fields = [int(field) for field in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    idle, waiting_for_disk = fields[3:5]
    return idle + waiting_for_disk, sum(fields)


def _spent_s(pid: int) -> float:
    """Return the CPU time of a process and of its ended children. Source: proc(5)."""
    with suppress(FileNotFoundError, ProcessLookupError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) * TICK_S
    return 0.0

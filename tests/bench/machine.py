"""The machine, the versions and the conditions of a run."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from tests.bench.harness import Bench
from tests.bench.plan import Setting

PACKAGES = ("rq", "psycopg", "flask", "granian", "gunicorn")


def facts(bench: Bench, *, is_quick: bool, load_before: float) -> dict[str, str]:
    """Return what is printed above the figures."""
    with bench.connect() as connection:
        postgres = connection.info.server_version
    redis = bench.redis.info("server")["redis_version"]
    trips = "; ".join(f"{s}: {bench.round_trip_ms(s):.2f} ms" for s in (Setting.LOCAL, Setting.BOTH))
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}{' (--quick: rough)' if is_quick else ''}",
        "machine": f"{os.cpu_count()} cores of {_cpu_model()}, "
        f"{_memory_gb():.0f} GB, {_filesystem(bench.directory)}",
        "versions": f"Python {platform.python_version()}, PostgreSQL {postgres // 10000}.{postgres % 10000}, "
        f"Redis {redis}, {', '.join(f'{name} {version(name)}' for name in PACKAGES)}",
        "durability": "PostgreSQL with fsync, Redis with its append-only file synced every second",
        "shared": "servers, load client and delay proxies all run on these cores, the same for everybody "
        "who is compared",
        "rounds": "the compared programs run in turn; figures are medians (least to greatest) of the rounds",
        "round trip to Redis": trips,
        "load average before": f"{load_before:.1f}",
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3


def _filesystem(directory: Path) -> str:
    """Return the type of the data's file system: on tmpfs, fsync takes no time."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(point, kind) for point, kind in mounts if directory.is_relative_to(point)]
    return max(above, key=lambda mount: len(mount[0]))[1]

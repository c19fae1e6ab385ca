"""The service's processes, and the platform that runs them: what ends is started again a second later."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
from redis import Redis

import config
from cli.dev.process import Process
from cli.dev.servers import HOST, free_port
from tests.bench.harness import clerk_sync, family, rss_mb
from tests.support.stack import environment, wait_until
from worker.queue import rq_format as rq
from worker.queue.consumer import RESERVED_PREFIX

ROOT = Path(__file__).parents[2]
READY_S = 60
LOOK_EVERY_S = 0.1
PAUSE_S = 1.0
EXCUSED_S = 20.0  # after a signal: a receiver whose port is not free yet ends once more


class Member:
    """One process of the service; `ends` counts how often it has ended without being made to."""

    def __init__(self, name: str, argv: Sequence[str], env: Mapping[str, str], directory: Path) -> None:
        self.name = name
        self.process = Process(name, directory / f"{name}.pid")
        self.log = directory / f"{name}.log"
        self.is_kept = True
        self.starts = 0
        self.ends: list[int | None] = []
        self._argv = argv
        self._env = env
        self._directory = directory
        self._excused_until = 0.0
        self._seen_ended_at: float | None = None

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        return self.process.pid

    def start(self) -> None:
        """Start it."""
        self._seen_ended_at = None
        self.starts += 1
        self.process.launch(self._argv, env=self._env, cwd=self._directory, log=self.log)

    def excuse(self) -> None:
        """Say that it may end for some time to come: somebody is about to see to that."""
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
        if self.process.running or not self.is_kept:
            return
        now = time.monotonic()
        if self._seen_ended_at is None:
            self._seen_ended_at = now
            if now > self._excused_until:
                self.ends.append(self.process.exit_status)
        elif now >= self._seen_ended_at + PAUSE_S:
            self.start()

    def family(self) -> list[int]:
        """Return the process ids of it and its children."""
        return family(self.pid) if self.pid else []

    def read_log(self) -> str:
        """Return what it has written."""
        return self.log.read_text() if self.log.exists() else ""

    def memory_mb(self) -> float:
        """Return what it and its children have in memory."""
        with suppress(FileNotFoundError):
            return sum(rss_mb(pid) for pid in family(self.pid)) if self.pid else 0
        return 0


class House:
    """Receivers, each on a port of its own, and workers.

    With `kept` a thread starts again what ends. Ready when the block begins, unless not `is_awaited`.
    `worker` names a module of these tests that runs in place of the worker.
    """

    def __init__(
        self,
        settings: config.Settings,
        directory: Path,
        *,
        receivers: int = 1,
        workers: int = 1,
        kept: bool = False,
        is_awaited: bool = True,
        worker: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        assert settings.database_url
        assert settings.redis_url
        self.settings = settings
        self.ports = [free_port() for _ in range(receivers)]
        self.receivers = [
            Member(f"web-{i + 1}", clerk_sync("web"), self._env(env, port=port), directory)
            for i, port in enumerate(self.ports)
        ]
        self.workers = [
            worker_member(f"worker-{i + 1}", self._env(env), directory, worker) for i in range(workers)
        ]
        self.redis = Redis.from_url(settings.redis_url.get_secret_value())
        self.database = urlsplit(settings.database_url.get_secret_value()).path.removeprefix("/")
        self._kept = kept
        self._is_awaited = is_awaited
        self._closing = threading.Event()
        self._platform = threading.Thread(target=self._keep, name="platform", daemon=True)

    @property
    def members(self) -> list[Member]:
        """Every process."""
        return [*self.receivers, *self.workers]

    def __enter__(self) -> Self:
        try:
            for member in self.members:
                member.start()
            if self._is_awaited:
                self.await_ready()
            if self._kept:
                self._platform.start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def await_ready(self) -> None:
        """Wait until every receiver takes deliveries and every worker has begun."""
        wait_until(self._is_ready, READY_S, self.logs)

    def logs(self) -> str:
        """Return what the processes have written lately."""
        return "\n".join(f"{m.name}: {m.read_log()[-3000:]}" for m in self.members)

    def ends(self) -> dict[str, list[int | None]]:
        """Return who has ended of its own accord, and with what exit status."""
        return {member.name: member.ends for member in self.members if member.ends}

    def _is_ready(self) -> bool:
        return all(map(takes_deliveries, self.ports)) and all(map(has_begun, self.workers))

    def _keep(self) -> None:
        while not self._closing.wait(LOOK_EVERY_S):
            for member in self.members:
                member.look()

    def _stop(self) -> None:
        self._closing.set()
        if self._platform.is_alive():
            self._platform.join(READY_S)
        self.redis.close()
        for member in self.members:
            member.signal(signal.SIGCONT)
            member.signal(signal.SIGCONT, child=True)
            member.process.end(patience=12)

    def _env(self, env: Mapping[str, str] | None, **overrides: Any) -> dict[str, str]:
        settings = self.settings
        own = {name.upper(): str(value) for name, value in overrides.items()}
        return {"WEB_WORKERS": "1", **environment(settings), **own, **(env or {})}


@contextmanager
def running(member: Member) -> Iterator[Member]:
    """Run a process for the length of the block."""
    member.start()
    try:
        yield member
    finally:
        member.process.kill()


def worker_member(
    name: str, env: Mapping[str, str], directory: Path, module: str | None = None, *arguments: str
) -> Member:
    """Return a worker: the one that is deployed, or one that a module of these tests runs."""
    if module is None:
        return Member(name, clerk_sync("worker"), env, directory)
    return Member(
        name, [sys.executable, "-m", module, *arguments], {**env, "PYTHONPATH": str(ROOT)}, directory
    )


def takes_deliveries(port: int) -> bool:
    """Say whether the receiver on that port is ready."""
    with suppress(httpx.TransportError):
        return httpx.get(f"http://{HOST}:{port}/health/ready", timeout=8, trust_env=False).is_success
    return False


def has_begun(worker: Member) -> bool:
    """Say whether a worker has registered."""
    return '"worker started"' in worker.read_log()


def what_is_left(redis: Redis) -> dict[str, int]:
    """Return how many jobs are anywhere but finished; an empty dictionary when all is done."""
    with redis.pipeline() as pipeline:
        pipeline.llen(rq.QUEUE_KEY)
        for registry in (rq.STARTED_KEY, rq.SCHEDULED_KEY, rq.FAILED_KEY):
            pipeline.zcard(registry)
        queued, started, scheduled, failed = pipeline.execute()
    # After the queue: that is the way that a job goes.
    held = sum(redis.llen(key) for key in redis.scan_iter(f"{RESERVED_PREFIX}*"))
    found = {"queued": queued, "started": started, "held": held, "scheduled": scheduled, "failed": failed}
    return {place: number for place, number in found.items() if number}

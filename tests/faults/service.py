"""The service's processes, and a platform that restarts those that have ended, a second later."""

import signal
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import httpx
from redis import Redis

import config
from cli.dev.servers import HOST, free_port
from tests.support import http
from tests.support.processes import clerk_sync
from tests.support.stack import environment
from tests.support.supervised_process import SupervisedProcess, has_begun, supervised_worker
from tests.support.waiting import wait_until
from worker.queue import rq_format as rq
from worker.queue.consumer import RESERVED_PREFIX

ROOT = Path(__file__).parents[2]
READY_S = 60
LOOK_EVERY_S = 0.1


class Service:
    """Receivers, each on a port of its own, and workers.

    With `kept` a thread restarts ended processes. The block begins when all are ready, or at once without
    `is_awaited`. `worker` names a module of these tests that runs in place of the worker.
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
        environ = {"WEB_WORKERS": "1", **environment(settings), **(env or {})}
        self.ports = [free_port() for _ in range(receivers)]
        self.receivers = [
            SupervisedProcess(f"web-{i}", clerk_sync("web"), {**environ, "PORT": str(port)}, directory)
            for i, port in enumerate(self.ports, 1)
        ]
        self.workers = [
            supervised_worker(f"worker-{i + 1}", environ, directory, worker) for i in range(workers)
        ]
        self.redis = Redis.from_url(settings.redis_url.get_secret_value())
        self.database = urlsplit(settings.database_url.get_secret_value()).path.removeprefix("/")
        self._kept = kept
        self._is_awaited = is_awaited
        self._closing = threading.Event()
        self._platform = threading.Thread(target=self._keep, name="platform", daemon=True)

    @property
    def processes(self) -> list[SupervisedProcess]:
        return [*self.receivers, *self.workers]

    def __enter__(self) -> Self:
        try:
            for process in self.processes:
                process.start()
            if self._is_awaited:
                wait_until(self._is_ready, READY_S, self.logs)
            if self._kept:
                self._platform.start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def url(self, path: str) -> str:
        """Return the URL of a page of the first receiver."""
        return f"http://{HOST}:{self.ports[0]}{path}"

    def logs(self) -> str:
        """Return the ends of the processes' logs."""
        return "\n".join(f"{m.name}: {m.text()[-3000:]}" for m in self.processes)

    def ends(self) -> dict[str, list[int | None]]:
        """Return the exit statuses of the processes that have ended by themselves."""
        return {process.name: process.ends for process in self.processes if process.ends}

    def _is_ready(self) -> bool:
        return all(map(takes_deliveries, self.ports)) and all(map(has_begun, self.workers))

    def _keep(self) -> None:
        while not self._closing.wait(LOOK_EVERY_S):
            for process in self.processes:
                process.look()

    def _stop(self) -> None:
        self._closing.set()
        if self._platform.is_alive():
            self._platform.join(READY_S)
        self.redis.close()
        for process in self.processes:
            process.signal(signal.SIGCONT)
            process.signal(signal.SIGCONT, child=True)
            process.end(patience=12)


def takes_deliveries(port: int) -> bool:
    """Say whether the receiver on that port is ready."""
    with suppress(httpx.TransportError):
        return http.get(f"http://{HOST}:{port}/health/ready", timeout=8).is_success
    return False


def what_is_left(redis: Redis) -> dict[str, int]:
    """Return the number of jobs in each place, except finished ones: empty when all are finished."""
    with redis.pipeline() as pipeline:
        pipeline.llen(rq.QUEUE_KEY)
        for registry in (rq.STARTED_KEY, rq.SCHEDULED_KEY, rq.FAILED_KEY):
            pipeline.zcard(registry)
        queued, started, scheduled, failed = pipeline.execute()
    # After the queue, as a job moves from there to a worker
    held = sum(redis.llen(key) for key in redis.scan_iter(f"{RESERVED_PREFIX}*"))
    found = {"queued": queued, "started": started, "held": held, "scheduled": scheduled, "failed": failed}
    return {place: number for place, number in found.items() if number}

"""The service as it is deployed: the receiver and workers, each a process of its own with an environment.

    with Stack(make_settings(port=free_port(), web_workers=1), tmp_path) as stack:
        httpx.post(stack.url, ...)

Nothing of it outlives the block. The processes write to `web.log`, `worker-1.log` and so on in the directory.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import httpx
from pydantic import SecretStr

import config
from tests.support import http
from tests.support.processes import clerk_sync
from tests.support.service_process import ServiceProcess
from tests.support.waiting import wait_until
from worker.queue.rq_format import WORKERS_KEY
from worker.redis_client import worker_redis

READY_TIMEOUT = 40.0  # s


class Stack:
    """The receiver and `workers` workers for one set of settings, ready when the block begins."""

    def __init__(
        self,
        settings: config.Settings,
        directory: Path,
        *,
        workers: int = 1,
        command: Sequence[str | Path] = tuple(clerk_sync()),
        extra_environment: Mapping[str, str] | None = None,
    ) -> None:
        """`command` is how `clerk-sync` is called; `extra_environment` goes beside the settings."""
        self.settings = settings
        self.directory = directory
        self.base_url = f"http://127.0.0.1:{settings.port}"
        self.url = f"{self.base_url}/webhooks/clerk"
        env = environment(settings) | dict(extra_environment or {})
        self.web = ServiceProcess("web", [*command, "web"], env, directory)
        self.workers = [
            ServiceProcess(f"worker-{i + 1}", [*command, "worker"], env, directory) for i in range(workers)
        ]

    def __enter__(self) -> Self:
        try:
            for process in (self.web, *self.workers):
                process.start()
            self.await_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End every process, the receiver first, as a deployment does."""
        for process in (self.web, *self.workers):
            process.end(patience=15)

    def await_ready(self) -> None:
        """Wait until the receiver takes deliveries and every worker has registered."""
        wait_until(self._is_ready, READY_TIMEOUT, self.logs)

    def logs(self) -> str:
        """Return what the processes have written."""
        return "\n".join(path.read_text() for path in sorted(self.directory.glob("*.log")))

    def _is_ready(self) -> bool:
        assert all(process.running for process in (self.web, *self.workers)), self.logs()
        try:
            ready = http.get(f"{self.base_url}/health/ready", timeout=5).is_success
        except httpx.TransportError:
            return False
        return ready and self._workers_registered() >= len(self.workers)

    def _workers_registered(self) -> Any:
        with worker_redis(self.settings) as client:
            return client.scard(WORKERS_KEY)


def environment(settings: config.Settings) -> dict[str, str]:
    """Return the environment that says what `settings` say, and nothing else of ours."""
    return {"PATH": os.environ["PATH"], "PYTHONUNBUFFERED": "1"} | {
        name.upper(): _text(value) for name, value in settings if name in settings.model_fields_set
    }


def _text(value: object) -> str:
    match value:
        case SecretStr():
            return value.get_secret_value()
        case tuple():
            return ",".join(_text(part) for part in value)
        case None:
            return ""
        case _:
            return str(value)

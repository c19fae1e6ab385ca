"""The measured stack: servers as in production, proxies before them, processes, the load client.

PostgreSQL and Redis write to the disk as in production (fsync; an append-only file synced once a second).
Everything ends with the block:

    with Bench(directory) as bench, bench.web(Setting.LOCAL) as web:
        report = bench.load(web, seconds=4, deliveries=16_000)
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, suppress
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Self

import httpx
import psycopg
from redis import Redis

from cli.dev.servers import HOST, PostgresServer, RedisServer, free_port, port_in_use
from config import load
from db.models import Base
from tests.bench.load import LoadReport, Spec
from tests.bench.load_process import ROOT, load_process
from tests.bench.plan import ROUND_TRIP_MS, Setting
from tests.support import http, migrations
from tests.support.databases import with_database, with_place
from tests.support.processes import clerk_sync
from tests.support.service_process import ServiceProcess
from tests.support.waiting import wait_until
from worker.queue.rq_format import QUEUE

SECRET = "whsec_dGhpcyBrZXkgaXMgZm9yIHRoZSBiZW5jaA=="
START_TIMEOUT_S = 30
POLL_S = 0.01
WEB_WORKERS = 2
TABLES = ", ".join(Base.metadata.tables)


class Endpoint(NamedTuple):
    """A receiver that answers on a port."""

    port: int
    process: ServiceProcess


class Urls(NamedTuple):
    """The servers that a measured process uses."""

    database: str
    redis: str


TWICE = '"$@" & a=$!; "$@" & b=$!; trap "kill $a $b" TERM; wait $a; wait $b; wait $a; wait $b'


class Bench:
    """PostgreSQL, Redis, and a proxy before each; the other processes start on demand."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.postgres = PostgresServer(directory / "postgres", free_port())
        self.redis_server = RedisServer(directory / "redis", free_port())
        self._open = ExitStack()
        self._numbers = count(1)
        self._seeds = count(1)

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            opening.callback(self.postgres.stop)
            self.postgres.start()
            opening.callback(self.redis_server.stop)
            self.redis_server.start()
            self._far = opening.enter_context(self.delayed(ROUND_TRIP_MS))
            migrate(self.postgres.url)
            self.redis = opening.enter_context(closing(Redis.from_url(self.redis_server.url)))
            self._open = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def urls(self, setting: Setting) -> Urls:
        """Return the servers' URLs in that setting."""
        return Urls(
            self.postgres.url if setting is Setting.LOCAL else self._far.database,
            self._far.redis if setting is Setting.BOTH else self.redis_server.url,
        )

    def clear(self) -> None:
        """Empty the queue and the tables. No worker may be running."""
        self.redis.flushdb()
        with self.connect() as connection:
            connection.execute(f"TRUNCATE {TABLES}")

    def connect(self, database: str = "postgres") -> psycopg.Connection[Any]:
        """Connect to PostgreSQL without the proxy."""
        return psycopg.connect(with_database(self.postgres.url, database), autocommit=True)

    def next_seed(self) -> int:
        """Return a seed that no traffic in this run has had."""
        return next(self._seeds)

    def finished(self, queue: str = QUEUE) -> int:
        """Return how many jobs RQ knows as finished."""
        return self.redis.zcard(f"rq:finished:{queue}")

    def await_workers(self, number: int, queue: str = QUEUE) -> None:
        """Wait until that many workers have registered."""
        wait_until(lambda: self.redis.scard(f"rq:workers:{queue}") >= number, START_TIMEOUT_S)

    def await_finished(self, count: int, limit_s: float) -> bool:
        """Wait until RQ has `count` finished jobs; return whether that came within the limit."""
        deadline = time.monotonic() + limit_s
        while self.finished() < count:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def running(
        self, argv: Sequence[str], urls: Urls, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> ServiceProcess:
        """Return a command that runs for the length of a `with` block, with a log in the directory."""
        name = f"{next(self._numbers):03}-{Path(argv[0]).name}"
        environment = {
            "PATH": os.environ["PATH"],
            "CLERK_WEBHOOK_SIGNING_SECRET": SECRET,
            "DATABASE_URL": urls.database,
            "REDIS_URL": urls.redis,
            "LOG_FORMAT": "json",
            **(env or {}),
        }
        return ServiceProcess(name, argv, environment, self.directory, cwd=cwd)

    @contextmanager
    def serving(
        self,
        port: int,
        argv: Sequence[str],
        urls: Urls,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Iterator[Endpoint]:
        """Run a receiver for the length of the block, which begins when it answers on the port."""
        with self.running(argv, urls, cwd, env) as process:

            def is_ready() -> bool:
                if not process.running:
                    raise RuntimeError(f"{process.name} ended: {process.text()}")
                with suppress(httpx.TransportError):
                    answer = http.get(f"http://{HOST}:{port}/health/ready", timeout=5)
                    return answer.status_code in (200, 404)
                return False

            wait_until(is_ready, START_TIMEOUT_S)
            yield Endpoint(port, process)

    def web(self, setting: Setting, env: Mapping[str, str] | None = None) -> AbstractContextManager[Endpoint]:
        """Run `clerk-sync web` with WEB_WORKERS processes."""
        port = free_port()
        full = {"PORT": str(port), "WEB_WORKERS": str(WEB_WORKERS), **(env or {})}
        return self.serving(port, clerk_sync("web"), self.urls(setting), env=full)

    @contextmanager
    def workers(
        self, urls: Urls, processes: int = 1, env: Mapping[str, str] | None = None
    ) -> Iterator[ServiceProcess]:
        """Run `clerk-sync worker`, ready for work."""
        command = clerk_sync("worker")
        if processes == 2:  # under one shell, so that they are measured and ended together
            command = ["/bin/sh", "-c", TWICE, "sh", *command]
        with self.running(command, urls, env=env) as process:
            self.await_workers(processes)
            yield process
        if self.redis.scard(f"rq:workers:{QUEUE}"):
            raise RuntimeError("a worker is still running, and would distort the next figure")

    def gunicorn(self, app: str, setting: Setting) -> AbstractContextManager[Endpoint]:
        """Run an application of `baselines` under gunicorn with two sync workers."""
        port = free_port()
        options = f"--workers 2 --worker-class sync --bind {HOST}:{port} --no-control-socket".split()
        argv = [sys.executable, "-m", "gunicorn", *options, f"tests.bench.baselines:{app}()"]
        return self.serving(port, argv, self.urls(setting), ROOT)

    def load(
        self,
        endpoint: Endpoint,
        *,
        watch: Callable[[], bool] = lambda: True,
        every_s: float = 0.1,
        **spec: Any,
    ) -> LoadReport:
        """Run the load client with a Spec and return its report.

        `watch` is called every `every_s`; when it returns False, the client stops early.
        """
        full = Spec(**{"port": endpoint.port, "secret": SECRET, "seed": self.next_seed(), **spec})
        with load_process(full) as client:
            while client.running:
                if not watch():
                    client.stop()
                    break
                time.sleep(every_s)
            return client.report()

    def round_trip_ms(self, setting: Setting) -> float:
        """Return the median time of a PING to Redis in that setting."""
        times = []
        with closing(Redis.from_url(self.urls(setting).redis)) as redis:
            for _ in range(51):
                began = time.perf_counter()
                redis.ping()
                times.append((time.perf_counter() - began) * 1000)
        return median(times)

    @contextmanager
    def delayed(self, round_trip_ms: float) -> Iterator[Urls]:
        """Delay both servers by this round trip for the length of the block."""
        if not round_trip_ms:
            yield self.urls(Setting.LOCAL)
            return
        postgres, redis = free_port(), free_port()
        with (
            self._proxy(postgres, self.postgres.port, round_trip_ms),
            self._proxy(redis, self.redis_server.port, round_trip_ms),
        ):
            yield Urls(
                with_place(self.postgres.url, f"{HOST}:{postgres}"),
                with_place(self.redis_server.url, f"{HOST}:{redis}"),
            )

    @contextmanager
    def _proxy(self, port: int, target_port: int, round_trip_ms: float) -> Iterator[None]:
        delay_ms = str(round_trip_ms / 2)
        argv = [sys.executable, "-m", "tests.support.proxy", str(port), str(target_port), delay_ms]
        with self.running(argv, Urls("", ""), ROOT) as process:
            wait_until(lambda: port_in_use(port), START_TIMEOUT_S, process.text)
            yield


def migrate(database_url: str) -> None:
    """Make the tables."""
    migrations.migrate(load(_env_file=None, database_url=database_url))

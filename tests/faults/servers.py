"""PostgreSQL and Redis that may be stopped, killed, frozen, filled, and slow to reach, through proxies.

They leave writing to the operating system (no fsync; Redis writes its append-only file before it answers), so
what they have confirmed survives their own death by SIGKILL, though not that of the machine.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Self

import psycopg
from psycopg import sql
from pydantic import SecretStr
from redis import Redis

import config
from cli.dev.servers import HOST, PostgresServer, RedisServer, free_port
from tests.support.directories import memory
from tests.support.faulty_proxy import FaultyProxy
from tests.support.migrations import migrate
from tests.support.settings import SECRET

ROLE = "clerk_sync"


class Servers:
    """One PostgreSQL, one Redis, a proxy for each. `fresh` makes a database of its own for each trial."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="clerk-sync-", dir=memory()))
        self.directory.chmod(0o711)  # under root servers run as another user
        self.postgres = PostgresServer(self.directory / "postgres", free_port(), durable=False)
        self.redis = RedisServer(self.directory / "redis", free_port(), durable=False)
        self.postgres_proxy = FaultyProxy(self.postgres.port)
        self.redis_proxy = FaultyProxy(self.redis.port)
        self.database = ""
        self._numbers = count(1)
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as opening:
            opening.callback(shutil.rmtree, self.directory)
            opening.callback(self.postgres.stop, "immediate")
            opening.callback(self.redis.kill)
            self.postgres.start()
            self.redis.start()
            for proxy in (self.postgres_proxy, self.redis_proxy):
                proxy.start()
                opening.callback(proxy.stop)
            with self.admin() as connection:
                role = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}")
                connection.execute(role.format(sql.Identifier(ROLE), self.postgres.password))
            self._open = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def fresh(self, *, migrated: bool = True, redis_number: int = 0, **overrides: Any) -> config.Settings:
        """Return settings for an empty Redis and a new database, both reached through the proxies.

        With a `redis_number` of its own a trial can go on beside others, as long as nothing is broken.
        """
        self.ensure_running()
        self.database = f"trial_{next(self._numbers)}"
        with self.admin() as connection:
            names = {"database": sql.Identifier(self.database), "role": sql.Identifier(ROLE)}
            connection.execute(sql.SQL("CREATE DATABASE {database} OWNER {role}").format(**names))
        with self.client(redis_number) as client:
            client.flushdb()
        settings = config.load(
            _env_file=None,
            **{
                "clerk_webhook_signing_secret": SECRET,
                "database_url": SecretStr(self.url(self.postgres_proxy.port)),
                "redis_url": SecretStr(
                    f"redis://:{self.redis.password}@{HOST}:{self.redis_proxy.port}/{redis_number}"
                ),
                "log_format": "json",
                **overrides,
            },
        )
        if migrated:
            migrate(settings)
        return settings

    def ensure_running(self) -> None:
        """Start what a trial has left stopped."""
        for server in (self.postgres, self.redis):
            if not server.running:
                server.start()

    def url(self, port: int | None = None) -> str:
        """Return the URL of the trial's database; without a port the direct one."""
        account = f"{ROLE}:{self.postgres.password}"
        return f"postgresql://{account}@{HOST}:{port or self.postgres.port}/{self.database}"

    @contextmanager
    def admin(self) -> Iterator[psycopg.Connection[Any]]:
        """A connection of the superuser, not through the proxy, to no trial's database."""
        with psycopg.connect(self.postgres.url, autocommit=True) as connection:
            yield connection

    @contextmanager
    def connection(self) -> Iterator[psycopg.Connection[Any]]:
        """A connection to the trial's database, not through the proxy."""
        with psycopg.connect(self.url(), autocommit=True) as connection:
            yield connection

    @contextmanager
    def client(self, number: int = 0) -> Iterator[Redis]:
        """A client of Redis, not through the proxy."""
        with closing(Redis.from_url(self.redis.url, db=number)) as client:
            yield client

    def cut_connections(self) -> int:
        """End every connection to the trial's database and return how many there were."""
        with self.admin() as connection:
            found = connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [self.database]
            )
            return len(found.fetchall())

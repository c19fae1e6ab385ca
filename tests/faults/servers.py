"""PostgreSQL and Redis to inject faults into, behind proxies.

They do not wait for the disk (no fsync; Redis writes its append-only file before it answers), so confirmed
data survives a SIGKILL of the server, but not a crash of the machine.
"""

from contextlib import ExitStack
from itertools import count
from typing import Any, Self

import psycopg
from psycopg import sql
from pydantic import SecretStr
from redis import Redis

import config
from cli.dev.servers import HOST, PostgresServer, RedisServer, free_port
from tests.support.directories import memory, open_directory
from tests.support.faulty_proxy import FaultyProxy
from tests.support.migrations import migrate
from tests.support.settings import SECRET

ROLE = "clerk_sync"


class Servers:
    """One PostgreSQL, one Redis, a proxy for each. `fresh` creates a database for each trial."""

    def __init__(self) -> None:
        self._open = ExitStack()
        directory = self._open.enter_context(open_directory(memory()))
        self.postgres = PostgresServer(directory / "postgres", free_port(), durable=False)
        self.redis = RedisServer(directory / "redis", free_port(), durable=False)
        self.postgres_proxy = FaultyProxy(self.postgres.port)
        self.redis_proxy = FaultyProxy(self.redis.port)
        self.database = ""
        self._numbers = count(1)

    def __enter__(self) -> Self:
        with self._open as opening:
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

        Trials with different `redis_number` can run at the same time, as long as none injects faults.
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
        """Start the servers that a trial has left stopped."""
        for server in (self.postgres, self.redis):
            if not server.running:
                server.start()

    def url(self, port: int | None = None) -> str:
        """Return the URL of the trial's database; without a `port` it bypasses the proxy."""
        account = f"{ROLE}:{self.postgres.password}"
        return f"postgresql://{account}@{HOST}:{port or self.postgres.port}/{self.database}"

    def admin(self) -> psycopg.Connection[Any]:
        """Connect as the superuser, without the proxy, to a database that no trial uses."""
        return psycopg.connect(self.postgres.url, autocommit=True)

    def connection(self) -> psycopg.Connection[Any]:
        """Connect to the trial's database without the proxy."""
        return psycopg.connect(self.url(), autocommit=True)

    def client(self, number: int = 0) -> Redis:
        """Return a client of Redis without the proxy."""
        return Redis.from_url(self.redis.url, db=number)

    def cut_connections(self) -> None:
        """End every connection to the trial's database."""
        with self.admin() as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [self.database]
            )

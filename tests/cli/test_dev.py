import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest

from cli.dev.process import try_lock
from tests.support import http
from tests.support.commands import run_with
from tests.support.directories import open_directory
from tests.support.processes import clerk_sync, command_lines
from tests.support.service_process import ServiceProcess
from tests.support.settings import SECRET
from tests.support.waiting import wait_until

START_S = 60
END_S = 45
RECORDS = ("postgres/pid", "redis/pid", "web.pid", "worker.pid")
ADDRESSES = (
    "DATABASE_URL",
    "DATABASE_URL_UNPOOLED",
    "REDIS_URL",
    "CLERK_WEBHOOK_SIGNING_SECRET",
    "PORT",
    "HOST",
)
MORE_SECRETS = {
    "CLERK_SECRET_KEY": "sk_test_a1b2c3d4",
    "CONSOLE_PASSWORD": "console-password",
    "PULL_TOKEN": "token-of-the-application",
}
EXAMPLE = Path(__file__).parents[2] / ".env.example"


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


@pytest.fixture(scope="module")
def running() -> Iterator[Dev]:
    """One with the example of the settings and a real secret, for what a test may look at but not end."""
    with open_directory() as directory:
        (directory / ".env").write_text(EXAMPLE.read_text().replace("whsec_replace_me", SECRET))
        dev = Dev("dev", directory, {"PORT": "0"}, ())
        try:
            yield dev.start().await_ready()
        finally:
            dev.end(patience=END_S)
        assert dev.exit_status == 0, dev.text()


def test_the_example_of_the_settings_with_a_real_secret_is_enough(running: Dev) -> None:
    assert running.announced("Signing secret") == SECRET
    url = httpx.URL(running.announced("Webhook URL"))
    assert url.path == "/webhooks/clerk"
    assert http.get(url.copy_with(path="/health/ready")).status_code == 200


def test_the_settings_for_another_terminal_include_those_that_the_service_has_from_elsewhere(
    running: Dev,
) -> None:
    """Also in a terminal that has the secret of an earlier run, which goes before the one in .env."""
    assert shlex.split(running.variable("CLERK_WEBHOOK_SIGNING_SECRET")) == [SECRET]


def test_the_logs_go_to_files(running: Dev) -> None:
    assert "receiver started" not in running.text()
    assert "receiver started" in (running.data / "web.log").read_text()
    worker_log = running.data / "worker.log"
    wait_until(lambda: "worker started" in worker_log.read_text(), START_S, worker_log.read_text)


def test_dev_listens_on_the_loopback_address_alone(running: Dev) -> None:
    assert running.variable("HOST") == "127.0.0.1"
    if sys.platform == "linux":  # elsewhere the loopback network has a single address
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", int(running.variable("PORT"))), timeout=5)
    for name in ("DATABASE_URL", "REDIS_URL"):
        url = urlsplit(running.variable(name))
        assert url.hostname == "127.0.0.1"
        assert len(url.password or "") >= 43
    assert oct(running.data.stat().st_mode)[-2:] == ("11" if os.geteuid() == 0 else "00"), (
        "others may not list it"
    )
    for path in running.data.rglob("*"):
        parts = path.relative_to(running.data).parts
        if path.is_file() and "data" not in parts and path.name != "pg_hba.conf":
            assert path.stat().st_mode & 0o077 == 0, path


def test_a_second_one_is_refused(running: Dev) -> None:
    said = refused(running.data.parent)
    assert said == "clerk-sync: clerk-sync dev already runs in this directory: stop it first\n"
    assert http.get(f"http://127.0.0.1:{running.variable('PORT')}/health/ready").status_code == 200


def refused(directory: Path, **environment: str) -> str:
    """Return what one says that does not start in that directory."""
    ran = run_with({"PATH": os.environ["PATH"], "PORT": "0", **environment}, "dev", directory=directory)
    assert ran.returncode == 1
    return ran.stdout + ran.stderr


def test_the_data_survives_ctrl_c_and_no_secret_is_in_a_command_line(
    start: Callable[..., Dev],
) -> None:
    """One that was killed is taken over by the next, and a child that dies ends the others."""
    first = start().await_ready()
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

    environment = {name: first.variable(name).strip("'") for name in ADDRESSES}
    second = start("--verbose", **environment, **MORE_SECRETS).await_ready()
    assert second.announced("Signing secret") == secret
    assert second.variable("DATABASE_URL") == database
    query = subprocess.run(
        [second.data / "psql", "-Atc", "SELECT name FROM users"], capture_output=True, text=True, check=False
    )
    assert query.stdout == "Ann\n", query.stderr
    assert "receiver started" in second.text()
    assert "worker.log" not in second.text()
    lines = command_lines(second.living_pid)
    assert len(lines.splitlines()) >= 5
    passwords = [urlsplit(environment[name]).password or "" for name in ("DATABASE_URL", "REDIS_URL")]
    assert [it for it in (secret, *passwords, *MORE_SECRETS.values()) if it in lines] == []
    assert second.stop(signal.SIGKILL, END_S) == -signal.SIGKILL

    before = [second.child_pid(record) for record in RECORDS]
    assert set(second.left_over()) == set(RECORDS)
    third = start(PORT=environment["PORT"]).await_ready()
    assert not set(before) & {third.child_pid(record) for record in RECORDS}
    assert_ends_with(third, "worker.pid", "worker")

    kept = [third.data / name for name in ("postgres.port", "redis.port")]
    old_ports = {int(path.read_text()) for path in kept}
    with ExitStack() as stack:
        for number in old_ports:
            stack.enter_context(socket.create_server(("127.0.0.1", number)))
        fourth = start().await_ready()
        assert not old_ports & {int(path.read_text()) for path in kept}
        assert_ends_with(fourth, "redis/pid", "Redis")


def assert_ends_with(dev: Dev, record: str, name: str) -> None:
    """Kill a child: the others end with it."""
    os.kill(dev.child_pid(record), signal.SIGKILL)
    assert dev.await_end(END_S) == 1
    assert dev.text().splitlines()[-1] == f"clerk-sync: {name} ended unexpectedly (signal 9)"
    assert dev.left_over() == []


def test_a_data_directory_that_is_a_link_is_refused(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / ".data"
    target.mkdir(mode=0o750)
    link.symlink_to(target)
    said = refused(tmp_path)
    assert said == f"clerk-sync: {link} is a symbolic link, which is not followed: delete it\n"
    assert target.stat().st_mode & 0o777 == 0o750


def test_a_port_in_use_is_one_line_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(tmp_path, PORT=str(port))
    assert said == f"clerk-sync: port {port} is in use: stop that process, or set PORT to another one\n"
    assert not (tmp_path / ".data" / "postgres").exists()


def test_servers_that_the_environment_names_are_used_and_left_alone(
    start: Callable[..., Dev], database_url: str, redis_url: str
) -> None:
    dev = start(DATABASE_URL=database_url, REDIS_URL=redis_url).await_ready()
    assert not (dev.data / "postgres").exists()
    assert not (dev.data / "redis").exists()
    for name, url in (("DATABASE_URL", database_url), ("REDIS_URL", redis_url)):
        assert shlex.split(dev.variable(name)) == [url]
    assert dev.stop(signal.SIGINT, END_S) == 0, dev.text()
    with psycopg.connect(database_url) as connection:
        assert connection.execute("SELECT count(*) FROM users").fetchone() == (0,)


@pytest.mark.parametrize("seconds", [0.6, 1.2, 1.8])
def test_ctrl_c_while_it_starts_leaves_nothing_behind(seconds: float, start: Callable[..., Dev]) -> None:
    dev = start()
    time.sleep(seconds)
    is_importing = not dev.data.exists()
    os.kill(dev.living_pid, signal.SIGINT)
    again_at = time.monotonic() + 5
    while is_importing and dev.running:  # Python can lose what a signal raises during an import
        if time.monotonic() > again_at:
            os.kill(dev.living_pid, signal.SIGINT)
            break
        time.sleep(0.1)
    assert dev.await_end(END_S) in (0, 1, -signal.SIGINT), dev.text()
    assert dev.left_over() == []


def test_a_setting_that_is_wrong_ends_it_at_once(tmp_path: Path) -> None:
    said = refused(tmp_path, CLERK_WEBHOOK_SIGNING_SECRET="whsec_replace_me")
    assert said.startswith("clerk-sync: CLERK_WEBHOOK_SIGNING_SECRET is a placeholder")
    assert not (tmp_path / ".data").exists()

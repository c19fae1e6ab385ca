"""DATABASE_SCHEMA: everything is in that schema, beside an application's tables of the same names."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result
from pydantic import SecretStr

import config
from cli.main import cli
from db import ledger, migration, progress, schema
from db.apply import users
from db.connection.engine import Database
from db.connection.errors import DatabaseUnavailable
from db.merge.policy import Policy
from db.schema import SchemaState
from tests.db.test_schema import catalog
from tests.support.databases import new_role, with_account
from tests.support.fake_clerk import FakeClerk
from tests.support.payloads import (
    ANN,
    BEN,
    CAT,
    NOW,
    body,
    deleted_event,
    membership,
    membership_event,
    organization_event,
    session,
    session_event,
    svix_id,
    user,
    user_event,
)
from tests.support.settings import MakeSettings
from tests.support.stack import environment
from worker.clerk.payloads import FieldSources
from worker.runner.batch import incoming

Connection = psycopg.Connection[Any]

NEON_SETUP = Path(__file__).parents[2] / "docs" / "neon-setup.md"
APPLICATION = """
    CREATE TABLE users (id serial PRIMARY KEY, login text);
    CREATE TABLE webhook_events (id serial PRIMARY KEY);
    CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY);
    INSERT INTO users (login) VALUES ('ann');
    INSERT INTO alembic_version VALUES ('0001');
    CREATE FUNCTION keep_out() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN RAISE 'the application''s table was written to'; END $$;
    CREATE TRIGGER keep_out BEFORE INSERT OR UPDATE OR DELETE ON users EXECUTE FUNCTION keep_out();
    CREATE TRIGGER keep_out BEFORE INSERT OR UPDATE OR DELETE ON webhook_events EXECUTE FUNCTION keep_out();
"""
SEARCH_PATHS = {"the default": '"$user", public', "no such": "nosuch", "other": "pg_temp, public"}


@pytest.fixture
def owner(empty_url: str) -> Iterator[Connection]:
    with psycopg.connect(empty_url, autocommit=True) as connection:
        yield connection


@pytest.fixture
def settings(make_settings: MakeSettings, empty_url: str, empty_database_url: str) -> config.Settings:
    return make_settings(
        database_url=SecretStr(empty_database_url),
        database_url_unpooled=SecretStr(empty_url),
        database_schema="Clerk-sync",
    )


@contextmanager
def opened(settings: config.Settings, **changes: Any) -> Iterator[Database]:
    database = Database(settings.model_copy(update=changes))
    try:
        yield database
    finally:
        database.dispose()


def run(settings: config.Settings, *arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, env=environment(settings))


def ran(settings: config.Settings, *arguments: str) -> str:
    done = run(settings, *arguments)
    assert done.exit_code == 0, done.exception
    return done.stdout


def as_role(url: str, role: str) -> SecretStr:
    return SecretStr(with_account(url, role))


@pytest.fixture
def role(owner: Connection) -> Iterator[str]:
    with new_role(owner) as name:
        yield name


def test_everything_is_made_in_the_schema_as_it_is_without_one(
    settings: config.Settings, empty_url: str, database_url_unpooled: str
) -> None:
    with opened(settings) as database:
        migration.upgrade(database)
        assert schema.state(database) == SchemaState.CURRENT
        assert not any(catalog(empty_url).values()), "nothing in public"
        assert catalog(empty_url, "Clerk-sync") == catalog(database_url_unpooled)
        migration.downgrade(database, "base")
        assert schema.state(database) == SchemaState.MISSING
        assert not any(catalog(empty_url, "Clerk-sync").values())


@pytest.mark.parametrize("search_path", SEARCH_PATHS.values(), ids=SEARCH_PATHS)
def test_every_command_works_beside_the_applications_tables_whatever_the_search_path(
    settings: config.Settings, owner: Connection, search_path: str
) -> None:
    owner.execute(APPLICATION.encode())
    owner.execute(f"ALTER DATABASE {owner.info.dbname} SET search_path = {search_path}".encode())
    assert ran(settings, "db", "upgrade") == f"schema at {schema.head()}\n"
    with opened(settings) as database:
        work(database, settings)
    assert ran(settings, "db", "reset", "--yes")
    assert ran(settings, "db", "current") == f"{schema.head()} (current)\n"
    assert ran(settings, "db", "seed", "--users", "3") == "3 users added\n"
    assert json.loads(ran(settings, "events", "--json")) == []
    health = json.loads(run(settings, "status", "--json").stdout)
    assert health["checks"]["schema"]["ok"], health
    assert owner.execute('SELECT count(*) FROM "Clerk-sync".users').fetchone() == (3,)
    assert ran(settings, "db", "reset", "--yes") == f"schema at {schema.head()}, tables empty\n"
    assert owner.execute('SELECT count(*) FROM "Clerk-sync".users').fetchone() == (0,)
    assert "base" in ran(settings, "db", "downgrade", "base", "--yes")
    assert owner.execute("SELECT id, login FROM public.users").fetchall() == [(1, "ann")]
    assert owner.execute("SELECT * FROM public.alembic_version").fetchall() == [("0001",)]


def test_api_commands_use_the_schema(settings: config.Settings, owner: Connection, clerk: FakeClerk) -> None:
    owner.execute(APPLICATION.encode())
    settings = settings.model_copy(
        update={"clerk_secret_key": SecretStr(clerk.key), "clerk_api_url": clerk.url}
    )
    clerk.put(user(ANN))
    clerk.put(user(BEN))
    ran(settings, "db", "upgrade")
    ran(settings, "backfill")
    owner.execute('UPDATE "Clerk-sync".users SET name = %s WHERE clerk_id = %s', ["Zz", ANN])
    assert run(settings, "reconcile").exit_code == 1
    assert ran(settings, "reconcile", "--fix")
    assert ran(settings, "pull", BEN)
    names = owner.execute('SELECT count(*) FROM "Clerk-sync".users WHERE name <> %s', ["Zz"]).fetchone()
    assert names == (2,), "what the application wrote is overwritten, though the version is the same"


def test_a_table_that_others_refer_to_is_not_dropped(settings: config.Settings, owner: Connection) -> None:
    ran(settings, "db", "upgrade")
    owner.execute('CREATE TABLE orders (user_id uuid REFERENCES "Clerk-sync".users (id))')
    done = run(settings, "db", "downgrade", "base", "--yes")
    assert isinstance(done.exception, migration.MigrationError)
    assert str(done.exception).endswith("depend on the tables: drop them first")
    assert ran(settings, "db", "current") == f"{schema.head()} (current)\n"


def test_two_instances_live_in_one_database(settings: config.Settings, owner: Connection) -> None:
    other = settings.model_copy(update={"database_schema": "clerk_staging"})
    for each, count in ((settings, "2"), (other, "5")):
        ran(each, "db", "upgrade")
        ran(each, "db", "seed", "--users", count)
    counts = 'SELECT (SELECT count(*) FROM "Clerk-sync".users), (SELECT count(*) FROM clerk_staging.users)'
    assert owner.execute(counts).fetchone() == (2, 5)


def granted(schema_name: str, role: str) -> str:
    """Return the statements of the document, for that schema and role."""
    section = NEON_SETUP.read_text(encoding="utf-8").partition("\n## Rights\n")[2].partition("\n## ")[0]
    statements = "".join(re.findall(r"(?:^    .*\n)+", section, re.MULTILINE))
    assert "clerk." in statements
    assert "sync_runtime" in statements
    statements = re.sub(r"\bclerk\b(?=[.;]| TO)", f'"{schema_name}"', statements)
    return statements.replace("sync_runtime", role)


EVENTS = [
    user_event(data=user(ANN)),
    user_event(data=user(BEN)),
    session_event(data=session(CAT)),
    membership_event(data=membership(ANN)),
    organization_event(),
    user_event("user.updated", user(BEN, email=f"{ANN}@example.com", updated_at=NOW + 99)),
    deleted_event(ANN),
]


def work(database: Database, settings: config.Settings) -> None:
    """Read and write what a worker and the commands do."""
    assert schema.state(database) == SchemaState.CURRENT
    settings = settings.model_copy(update={"organization_source": "membership"})
    keys = FieldSources.of(settings)
    for event in EVENTS:
        users.apply(database, [incoming(svix_id(), body(event).decode(), NOW, keys)], Policy.of(settings))
    progress.save(database, "backfill", {})
    progress.clear(database, "backfill")
    assert len(ledger.recent(database)) == len(EVENTS)
    assert ledger.prune(database, timedelta(0)) == len(EVENTS)


def test_the_rights_of_the_document_suffice_and_name_every_table(
    settings: config.Settings, owner: Connection, empty_url: str, role: str
) -> None:
    assert ran(settings, "db", "upgrade")
    owner.execute(granted("Clerk-sync", role).encode())
    runtime = settings.model_copy(
        update={"database_url": as_role(empty_url, role), "database_url_unpooled": None}
    )
    with opened(runtime) as database:
        work(database, runtime)
    missing = owner.execute(
        "SELECT relname FROM pg_class WHERE relnamespace = %s::regnamespace AND relkind = 'r'"
        " AND relname <> 'clerk_sync_version'"
        " AND NOT (SELECT bool_and(has_table_privilege(%s, oid, needed)) FROM unnest(%s::text[]) needed)",
        ['"Clerk-sync"', role, ["SELECT", "INSERT", "UPDATE", "DELETE"]],
    ).fetchall()
    assert missing == []
    denied = run(runtime, "db", "downgrade", "base", "--yes")
    assert denied.exit_code == 1


@pytest.mark.parametrize("name", ["Clerk-sync", None])
def test_a_missing_right_to_the_schema_is_said_as_such(
    settings: config.Settings, owner: Connection, empty_url: str, role: str, name: str | None
) -> None:
    settings = settings.model_copy(update={"database_schema": name})
    assert ran(settings, "db", "upgrade")
    owner.execute("REVOKE ALL ON SCHEMA public FROM PUBLIC")
    with (
        opened(settings, database_url=as_role(empty_url, role), database_url_unpooled=None) as database,
        pytest.raises(DatabaseUnavailable, match="GRANT USAGE ON SCHEMA"),
    ):
        schema.state(database)


def test_a_schema_of_the_search_path_that_holds_no_table_of_ours_needs_no_right(
    settings: config.Settings, owner: Connection, empty_url: str, role: str
) -> None:
    owner.execute(f"CREATE SCHEMA audit; GRANT ALL ON SCHEMA public TO {role}".encode())
    owner.execute(f"ALTER DATABASE {owner.info.dbname} SET search_path = public, audit".encode())
    runtime = settings.model_copy(
        update={
            "database_url": as_role(empty_url, role),
            "database_url_unpooled": None,
            "database_schema": None,
        }
    )
    assert ran(runtime, "db", "upgrade") == f"schema at {schema.head()}\n"
    with opened(runtime) as database:
        work(database, runtime)


def test_a_role_that_may_not_create_is_answered_with_what_to_grant(
    settings: config.Settings, owner: Connection, empty_url: str, role: str
) -> None:
    owner.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    runtime = {"database_url": as_role(empty_url, role), "database_url_unpooled": None}
    with opened(settings, **runtime) as database:
        with pytest.raises(migration.MigrationError, match='CREATE SCHEMA "Clerk-sync" AUTHORIZATION'):
            migration.upgrade(database)
        owner.execute('CREATE SCHEMA "Clerk-sync"')
        owner.execute(f'GRANT USAGE ON SCHEMA "Clerk-sync" TO {role}'.encode())
        with pytest.raises(migration.MigrationError, match="GRANT CREATE, USAGE ON SCHEMA"):
            migration.upgrade(database)
        owner.execute(f'GRANT CREATE ON SCHEMA "Clerk-sync" TO {role}'.encode())
        migration.upgrade(database)
    with (
        opened(settings, **runtime, database_schema=None) as database,
        pytest.raises(migration.MigrationError, match="GRANT CREATE, USAGE ON SCHEMA"),
    ):
        migration.upgrade(database)


@pytest.mark.parametrize("search_path", ["nosuch", "''"])
def test_a_search_path_without_a_schema_is_said_as_such(
    settings: config.Settings, owner: Connection, search_path: str
) -> None:
    owner.execute(f"ALTER DATABASE {owner.info.dbname} SET search_path = {search_path}".encode())
    with (
        opened(settings, database_schema=None) as database,
        pytest.raises(migration.MigrationError, match="search_path names no schema that exists"),
    ):
        migration.upgrade(database)


@pytest.mark.parametrize("name", ["pg_clerk", "information_schema", 'a"b', "a.b", "1a", "x" * 64, "a%b"])
def test_a_name_that_cannot_be_a_schema_is_refused_at_the_start(name: str) -> None:
    with pytest.raises(config.SettingsError, match="DATABASE_SCHEMA must be"):
        config.load(_env_file=None, database_schema=name)

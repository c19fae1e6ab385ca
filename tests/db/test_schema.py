import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import errors, sql
from pydantic import SecretStr

from db import migration, schema
from db.connection.engine import Database
from db.models import VIEWS, Base
from db.schema import SchemaState
from tests.support.processes import clerk_sync
from tests.support.settings import MakeSettings

Connection = psycopg.Connection[Any]

# What a table is, as PostgreSQL itself tells it.
CATALOG = {
    "columns": """
        SELECT table_name, column_name, data_type, character_maximum_length, is_nullable, column_default,
               collation_name, is_identity, is_generated
        FROM information_schema.columns WHERE table_schema = %(schema)s AND table_name <> 'clerk_sync_version'
    """,
    "constraints": """
        SELECT relname, conname, contype, pg_get_constraintdef(pg_constraint.oid)
        FROM pg_constraint JOIN pg_class ON pg_class.oid = conrelid
        WHERE connamespace = %(named)s::regnamespace AND relname <> 'clerk_sync_version'
    """,
    "indexes": """
        SELECT tablename, indexname, replace(indexdef, %(named)s || '.', '') FROM pg_indexes
        WHERE schemaname = %(schema)s AND tablename <> 'clerk_sync_version'
    """,
    "others": """
        SELECT relname, relkind FROM pg_class
        WHERE relnamespace = %(named)s::regnamespace AND relkind NOT IN ('r', 'i')
    """,
    "triggers and functions": """
        SELECT tgname FROM pg_trigger JOIN pg_class ON pg_class.oid = tgrelid
        WHERE NOT tgisinternal AND relnamespace = %(named)s::regnamespace
        UNION ALL SELECT proname FROM pg_proc WHERE pronamespace = %(named)s::regnamespace
    """,
}
USERS = {
    ("id", "uuid", None, "NO", "gen_random_uuid()"),
    ("clerk_id", "character varying", 255, "NO", None),
    ("email", "character varying", 255, "NO", None),
    ("name", "character varying", 255, "NO", None),
    ("organization", "character varying", 255, "YES", None),
    ("role", "character varying", 50, "NO", "'user'::character varying"),
    ("created_at", "timestamp with time zone", None, "NO", "now()"),
    ("last_login_at", "timestamp with time zone", None, "YES", None),
}


@pytest.fixture
def empty(make_settings: MakeSettings, empty_url: str) -> Iterator[Database]:
    database = Database(
        make_settings(database_url=SecretStr(empty_url), database_url_unpooled=None, redis_url=None)
    )
    yield database
    database.dispose()


def catalog(url: str, name: str = "public") -> dict[str, list[tuple[object, ...]]]:
    with psycopg.connect(url) as connection:
        names = {"schema": name, "named": sql.Identifier(name).as_string(connection)}
        if name.isidentifier():
            names["named"] = name
        return {part: sorted(connection.execute(query, names), key=str) for part, query in CATALOG.items()}


def test_the_migrations_make_the_models(empty: Database, empty_url: str, database_url_unpooled: str) -> None:
    empty.run(Base.metadata.create_all)
    made = catalog(database_url_unpooled)
    assert {part: [it for it in found if it[0] not in VIEWS] for part, found in made.items()} == catalog(
        empty_url
    )


def test_every_migration_goes_down_and_up_by_itself(empty: Database, empty_url: str) -> None:
    nothing = catalog(empty_url)
    migration.upgrade(empty)
    stages = []
    while found := schema.current_revision(empty):
        stages.append((found, catalog(empty_url)))
        migration.downgrade(empty, "-1")
    assert catalog(empty_url) == nothing
    for found, stage in reversed(stages):
        migration.upgrade(empty, "+1")
        assert (schema.current_revision(empty), catalog(empty_url)) == (found, stage)
    assert schema.state(empty) == SchemaState.CURRENT


def test_the_revisions_by_name_are_those_of_the_migrations(empty: Database) -> None:
    migration.upgrade(empty)
    steps = migration.steps_down(empty, "base")
    assert [step.split()[0] for step in steps] == list(reversed(schema.revisions()))


def test_processes_that_upgrade_at_once_do_no_harm(
    empty: Database, empty_url: str, database_url_unpooled: str, tmp_path: Path
) -> None:
    environment = {"PATH": os.environ["PATH"], "DATABASE_URL": empty_url}
    running = [
        subprocess.Popen(
            clerk_sync("db", "upgrade"), cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    said = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert said == [f"schema at {schema.head()}\n"] * 3
    assert schema.state(empty) == SchemaState.CURRENT
    assert catalog(empty_url) == catalog(database_url_unpooled)


def test_a_migration_that_fails_leaves_nothing_behind(empty: Database, empty_url: str) -> None:
    with psycopg.connect(empty_url, autocommit=True) as connection:
        connection.execute("CREATE TABLE other (something int)")
        connection.execute("CREATE INDEX idx_webhook_events_clerk_id ON other (something)")
    before = catalog(empty_url)
    with pytest.raises(
        migration.MigrationError, match='relation "idx_webhook_events_clerk_id" already exists'
    ):
        migration.upgrade(empty)
    assert catalog(empty_url) == before
    assert schema.state(empty) == SchemaState.MISSING


def test_users_has_the_columns_indexes_and_constraints_that_were_promised(connection: Connection) -> None:
    columns = connection.execute(
        "SELECT column_name, data_type, character_maximum_length, is_nullable, column_default"
        " FROM information_schema.columns WHERE table_name = 'users' ORDER BY ordinal_position"
    ).fetchall()
    assert sorted(columns, key=str) == sorted(USERS, key=str)
    indexes = connection.execute("SELECT indexname, indexdef FROM pg_indexes WHERE tablename = 'users'")
    assert dict(indexes.fetchall()) == {
        "users_pkey": "CREATE UNIQUE INDEX users_pkey ON public.users USING btree (id)",
        "idx_users_clerk_id": "CREATE UNIQUE INDEX idx_users_clerk_id ON public.users USING btree (clerk_id)",
        "idx_users_email": "CREATE UNIQUE INDEX idx_users_email ON public.users USING btree (email)",
    }
    constraints = connection.execute(
        "SELECT contype, conname FROM pg_constraint WHERE conrelid = 'users'::regclass AND contype <> 'n'"
    ).fetchall()
    assert {("p", "users_pkey"), ("u", "idx_users_clerk_id"), ("u", "idx_users_email")} == {
        found for found in constraints if found[0] != "c"
    }
    assert ("c", "email_format") in constraints


def test_a_row_needs_no_more_than_id_address_and_name(connection: Connection) -> None:
    row = connection.execute(
        "INSERT INTO users (clerk_id, email, name) VALUES ('user_1', 'a@example.com', 'Ann')"
        " RETURNING id IS NOT NULL, role, organization, last_login_at, now() - created_at < '1 min'"
    ).fetchone()
    assert row == (True, "user", None, None, True)


@pytest.mark.parametrize("role", ["admin", "user"])
def test_a_role_is_admin_or_user(role: str, connection: Connection) -> None:
    insert = "INSERT INTO users (clerk_id, email, name, role) VALUES ('user_1', 'a@example.com', 'Ann', %s)"
    connection.execute(insert, [role])
    for other in ("owner", "Admin", "", " user"):
        with pytest.raises(errors.CheckViolation):
            connection.execute(insert, [other])
    with pytest.raises(errors.NotNullViolation):
        connection.execute(insert, [None])

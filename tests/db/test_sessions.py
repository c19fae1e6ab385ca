"""Whatever server, database, role, URL and environment set by default, the tables end the same."""

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import psycopg
import pytest
from psycopg import sql
from pydantic import SecretStr
from sqlalchemy import text

import config
from cli.dev.servers import free_port
from db import ledger, migration, schema
from db.apply import users
from db.connection import session
from db.connection.engine import Database
from db.connection.errors import ChangeRefused
from db.drift import users as user_drift
from db.merge.policy import Policy
from tests.db.test_stories import deleted, saved, signed_in
from tests.support.database_trial import Trial, expected_ledger
from tests.support.databases import encoded_database
from tests.support.debian import DEBIAN, DebianServer
from tests.support.histories import plans
from tests.support.payloads import NOW, body
from tests.support.reference_model import Choices, SentEvent, tables
from tests.support.settings import MakeSettings
from worker.clerk.payloads import FieldSources
from worker.runner.batch import incoming

PAGE = Path(__file__).parents[2] / "docs" / "database.md"
HOSTILE = {
    "default_transaction_isolation": "serializable",
    "default_transaction_read_only": "on",
    "default_transaction_deferrable": "on",
    "synchronous_commit": "off",
    "DateStyle": "German, DMY",
    "IntervalStyle": "sql_standard",
    "TimeZone": "America/St_Johns",
    "client_encoding": "LATIN1",
    "standard_conforming_strings": "off",
    "escape_string_warning": "on",
    "backslash_quote": "off",
    "array_nulls": "off",
    "extra_float_digits": "-15",
    "bytea_output": "escape",
    "row_security": "on",
    "exit_on_error": "on",
    "transform_null_equals": "on",
    "lock_timeout": "1ms",
    "statement_timeout": "200ms",
    "idle_in_transaction_session_timeout": "1ms",
    "session_replication_role": "replica",
    "client_min_messages": "debug5",
    "jit": "on",
    "jit_above_cost": "0",
    "jit_inline_above_cost": "0",
    "jit_optimize_above_cost": "0",
    "enable_indexscan": "off",
    "enable_hashjoin": "off",
    "enable_seqscan": "off",
    "plan_cache_mode": "force_generic_plan",
    "from_collapse_limit": "1",
    "xmloption": "document",
    "check_function_bodies": "off",
}
ENVIRONMENT = {"PGDATESTYLE": "SQL, DMY", "PGTZ": "Asia/Kathmandu", "PGCLIENTENCODING": "LATIN1"}
OPTIONS = "-c default_transaction_isolation=repeatable\\ read -c DateStyle=German -c array_nulls=off"


@pytest.fixture
def debian_url(server_directory: Path) -> Iterator[str]:
    if not DEBIAN.exists():
        pytest.skip("Debian's PostgreSQL 15 is not installed")
    server = DebianServer(server_directory / "debian", free_port(), durable=False)
    server.start()
    yield server.url
    server.stop("immediate")


@pytest.fixture(params=["PostgreSQL of the tests", "Debian 15"])
def urls(request: pytest.FixtureRequest) -> tuple[str, str]:
    """The URLs of an empty database: the one that the service uses, and a direct one."""
    if request.param == "Debian 15":
        url = request.getfixturevalue("debian_url")
        return url, url
    return request.getfixturevalue("empty_database_url"), request.getfixturevalue("empty_url")


def history() -> list[SentEvent]:
    """Users who come, move, exchange addresses, sign in and go, with texts of every kind and without."""
    x, y = "x@example.com", "o'brien@example.com"
    firm = {"organization": "Müller & Söhne"}
    events = [
        saved("user_a", 1, x, first_name="Zoë 🎉", last_name='"back\\slash"'),
        saved("user_b", 2, y, first_name="NULL", last_name=None),
        saved("user_a", 3, y, first_name="Zoë", last_name="{a,b}"),
        saved("user_b", 4, x, first_name="{}", last_name=None, public_metadata=firm),
        saved("user_c", 5, x, first_name="null", last_name=None),
        signed_in("user_a", 6),
        signed_in("user_d", 7),
        saved("user_d", 8, None),
        deleted("user_b", 9),
        saved("user_b", 10, y),
    ]
    return [SentEvent(f"msg_{i}", event, NOW + i) for i, event in enumerate(events)]


def test_hostile_defaults_change_nothing(
    urls: tuple[str, str],
    make_settings: MakeSettings,
    database_url_unpooled: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url, direct = urls
    admin = psycopg.connect(direct, autocommit=True, client_encoding="utf8")  # keeps what it has now
    set_defaults(admin)
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    if url == direct:  # PgBouncer refuses it, which `Cause.STARTUP_OPTION` says
        monkeypatch.setenv("PGOPTIONS", OPTIONS)
    settings = make_settings(
        redis_url=None, database_url=SecretStr(url), database_url_unpooled=SecretStr(direct), db_pool_size=4
    )
    database = Database(settings, unpooled=True)
    migration.upgrade(database)
    assert schema.state(database) is schema.SchemaState.CURRENT
    database.dispose()
    trial = Trial(settings)
    trial.connection.close()
    trial.connection = admin
    try:
        for choices in (Choices(), Choices(user_deletion="anonymize")):
            for plan in islice(plans(history(), Random(7), workers=4), 6):
                trial.deliver(plan, choices)
                assert trial.tables() == tables(history(), choices)
                assert trial.ledger() == expected_ledger(history())
        look_at_reads(settings)
        with psycopg.connect(database_url_unpooled) as elsewhere:
            assert constraints(admin) == constraints(elsewhere)
    finally:
        trial.close()


def test_a_temporary_table_of_an_earlier_client_is_not_taken_for_ours(
    make_settings: MakeSettings, connection: psycopg.Connection[Any]
) -> None:
    settings = make_settings(redis_url=None, db_pool_size=1, db_max_overflow=0)
    with Database(settings) as database:
        for table in ("users", "user_sync", "webhook_events"):
            copy = text(f"CREATE TEMP TABLE {table} (LIKE {table} INCLUDING ALL)")
            database.run(lambda connection: connection.execute(copy))  # noqa: B023 - it is called at once
        content = body(saved("user_a", 1, "a@example.com")).decode()
        change = incoming("msg_1", content, NOW, FieldSources.of(settings))
        users.apply(database, [change], Policy.of(settings))
        assert ledger.last_applied_at(database) is not None
    assert connection.execute("SELECT email FROM users").fetchall() == [("a@example.com",)]


def set_defaults(admin: psycopg.Connection[Any]) -> None:
    known = {name for (name,) in admin.execute("SELECT lower(name) FROM pg_settings").fetchall()}
    hostile = {name: value for name, value in HOSTILE.items() if name.lower() in known}
    if "transaction_timeout" in known:
        hostile["transaction_timeout"] = "100ms"
    for name, value in hostile.items():
        default = (sql.Identifier(admin.info.dbname), sql.Identifier(name), sql.Literal(value))
        admin.execute(sql.SQL("ALTER DATABASE {} SET {} = {}").format(*default))
        role = sql.Identifier(admin.info.user)
        admin.execute(sql.SQL("ALTER ROLE {} IN DATABASE {} SET {} = {}").format(role, *default))


def look_at_reads(settings: config.Settings) -> None:
    """Read what commands and pages show, and each setting inside both kinds of transaction."""
    database = Database(settings)
    try:
        found = user_drift.find(database, "user_a")
        assert found is not None
        assert found["created_at"] == datetime.fromtimestamp(NOW / 1000, UTC)
        assert ledger.activity(database, datetime.now(UTC) - timedelta(hours=1)).events == len(history())
        assert len(ledger.recent(database, limit=100)) == len(history())
        assert ledger.prune(database, timedelta(days=1)) == 0
        wanted = {**session.SETTINGS, "synchronous_commit": "on", "client_encoding": "UTF8"}
        wanted |= {"transaction_isolation": "read committed", "transaction_read_only": "off"}
        for name, value in wanted.items():
            assert set(inside(database, name)) <= {value, None}, name
        assert inside(database, "lock_timeout") == ["10s", "2s"]
    finally:
        database.dispose()


def inside(database: Database, name: str) -> list[Any]:
    """Return a setting inside an ordinary transaction, then inside one that applies a batch."""
    query = text("SELECT current_setting(:name, true)")
    ordinary = database.run(lambda connection: connection.scalar(query, {"name": name}))
    batch = database.run_pipeline(lambda pipeline: pipeline.send(query, name=name).fetchall())
    return [ordinary, batch[0][0]]


def constraints(connection: psycopg.Connection[Any]) -> list[tuple[Any, ...]]:
    """Return the checks that the migrations made: a pattern with backslashes is one of them."""
    query = "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint WHERE contype = 'c' ORDER BY 1"
    return connection.execute(query).fetchall()


def test_every_default_of_a_client_has_a_decision(database_url_unpooled: str) -> None:
    families = [
        "Client Connection Defaults / %",
        "Version and Platform %",
        "Lock Management",
        "Error Handling",
    ]
    query = """
        SELECT lower(name) FROM pg_settings
        WHERE category LIKE ANY (%s) AND context IN ('user', 'superuser') AND name NOT LIKE 'vacuum%%'
    """
    with psycopg.connect(database_url_unpooled) as admin:
        names = {name for (name,) in admin.execute(query, [families]).fetchall()}
    table = PAGE.read_text().partition("| setting |")[2].partition("\n## ")[0]
    decided = re.findall(
        r"`([^`]+)`", "\n".join(row.split("|")[1] for row in table.splitlines() if row[:2] == "| ")
    )
    patterns = [name.lower() for name in decided]
    assert len(names) > 40
    assert [name for name in sorted(names) if not any(fnmatch(name, one) for one in patterns)] == []


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_database_in_another_encoding_is_talked_to_in_utf8(
    encoding: str, make_settings: MakeSettings, database_url_unpooled: str
) -> None:
    with encoded_database(database_url_unpooled, encoding) as url:
        settings = make_settings(redis_url=None, database_url=SecretStr(url), database_url_unpooled=None)
        apply_in(settings, encoding)


def apply_in(settings: config.Settings, encoding: str) -> None:
    database = Database(settings)
    migration.upgrade(database)
    assert database.encoding == encoding
    trial = Trial(settings)
    try:
        trial.apply([SentEvent("msg_1", saved("user_a", 1, "x@example.com"), NOW)], Choices())
        trial.apply(
            [SentEvent("msg_2", saved("user_a", 2, "x@example.com", first_name="Zoë"), NOW)], Choices()
        )
        found = user_drift.find(database, "user_a")
        assert found is not None
        assert found["name"] == "Zoë"
        party = [SentEvent("msg_3", saved("user_a", 3, "x@example.com", first_name="🎉"), NOW)]
        if encoding == "LATIN1":
            with pytest.raises(ChangeRefused, match="encoding LATIN1 has no such character"):
                trial.apply(party, Choices())
    finally:
        trial.close()
        database.dispose()

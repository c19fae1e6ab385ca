"""The application's locks, triggers, rules and policies delay or fail only the change that they concern."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import sql
from pydantic import SecretStr
from sqlalchemy import text

from db.apply import isolation
from db.apply.isolation import Isolation
from db.apply.tables import Tables
from db.connection import session
from db.connection.causes import Cause
from db.connection.engine import Database
from db.connection.errors import DatabaseUnavailable
from db.merge.incoming import Outcome
from db.merge.policy import Policy
from tests.support.checkouts import count_checkouts
from tests.support.databases import new_role, with_account
from tests.support.payloads import (
    NOW,
    Json,
    body,
    deleted_event,
    membership,
    membership_event,
    organization,
    session_event,
    svix_id,
    user,
    user_event,
)
from tests.support.settings import MakeSettings
from tests.support.waiting import within
from worker.clerk.payloads import FieldSources
from worker.queue.consumer import Deferred, Failed, Finished, Settled, TakenJob
from worker.queue.rq_format import encode_call
from worker.runner import batch

Admin = psycopg.Connection[Any]
Process = Callable[[Sequence[TakenJob]], dict[str, list[Settled]]]
LATER = NOW + 1000
CHILDREN = "CREATE TABLE children (id serial PRIMARY KEY, user_id uuid NOT NULL REFERENCES users)"
TRIGGER = """
    CREATE FUNCTION interfere() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
      IF coalesce(NEW.clerk_id, OLD.clerk_id) LIKE {who} THEN {action}; END IF;
      RETURN coalesce(NEW, OLD);
    END $$;
    CREATE TRIGGER interfere BEFORE {operation} ON {table}
    FOR EACH ROW EXECUTE FUNCTION interfere()
"""
EVERY = "INSERT OR UPDATE OR DELETE"
SUPPRESS = """
    CREATE FUNCTION suppress() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;
    CREATE TRIGGER suppress BEFORE {write} FOR EACH ROW EXECUTE FUNCTION suppress()
"""


def job(event: Json, **meta: object) -> TakenJob:
    return TakenJob(svix_id(), encode_call(body(event).decode()), MOMENT, 3, (10, 60, 300), meta)


MOMENT = "2026-01-01T10:00:00.000000Z"


def saved(i: int, updated_at: int = LATER, **fields: Any) -> Json:
    data = user(f"user_{i}", first_name=f"name {updated_at}", last_name=None, updated_at=updated_at, **fields)
    return user_event("user.updated", data)


@pytest.fixture
def process(database: Database) -> Process:
    """Process jobs as a worker does; return what became of them, by kind."""
    return partial(process_with, database)


def process_with(
    database: Database,
    jobs: Sequence[TakenJob],
    policy: Policy | None = None,
    keys: FieldSources | None = None,
) -> dict[str, list[Settled]]:
    isolation = Isolation(Tables(database, policy or Policy()))
    done = batch.process(jobs, keys or FieldSources(), isolation)
    assert sorted(item.job.id for item in done) == sorted(one.id for one in jobs)
    return {
        kind.__name__: [item for item in done if isinstance(item, kind)]
        for kind in (Finished, Failed, Deferred)
    }


@contextmanager
def transaction(connection: Admin) -> Iterator[Admin]:
    """A transaction of the application that stays open."""
    with psycopg.connect(connection.info.dsn, password=connection.info.password) as application:
        yield application
        application.rollback()


def names(connection: Admin) -> dict[str, str]:
    return dict(connection.execute("SELECT clerk_id, name FROM users").fetchall())


def interfere(
    connection: Admin, who: str, action: LiteralString, table: str = "users", operation: LiteralString = EVERY
) -> None:
    trigger = sql.SQL(TRIGGER).format(
        who=sql.Literal(who),
        action=sql.SQL(action),
        table=sql.Identifier(table),
        operation=sql.SQL(operation),
    )
    connection.execute(trigger)


@pytest.fixture
def sixty(process: Process, connection: Admin) -> list[TakenJob]:
    """Sixty users who are there, and an update of each."""
    process([job(saved(i, NOW)) for i in range(60)])
    assert len(names(connection)) == 60
    return [job(saved(i)) for i in range(60)]


# Locks


@pytest.mark.parametrize("action", [None, "NEW.name := NEW.name"], ids=["no trigger", "a trigger"])
def test_rows_that_refer_to_users_delay_no_update(
    action: str | None, process: Process, connection: Admin, sixty: list[TakenJob]
) -> None:
    connection.execute(CHILDREN)
    connection.execute("CREATE TABLE welcomed (clerk_id varchar PRIMARY KEY REFERENCES user_sync)")
    if action:
        interfere(connection, "user_%", action)
    with transaction(connection) as application, within(10):
        application.execute("INSERT INTO children (user_id) SELECT id FROM users ORDER BY clerk_id DESC")
        application.execute("INSERT INTO welcomed SELECT clerk_id FROM user_sync")
        assert len(process(sixty)["Finished"]) == 60
    assert set(names(connection).values()) == {f"name {LATER}"}


def test_a_row_that_is_locked_delays_its_delivery_alone(
    process: Process, connection: Admin, sixty: list[TakenJob]
) -> None:
    with transaction(connection) as application:
        application.execute("SELECT FROM users WHERE clerk_id = 'user_7' FOR UPDATE")
        with within(15):
            done = process(sixty)
        assert len(done["Finished"]) == 59
        (waiting,) = done["Deferred"]
        assert waiting.job is sixty[7]
        assert names(connection)["user_7"] == f"name {NOW}"
        again = waiting.job._replace(meta={"has_waited": True})
        with within(1.5):
            assert process([again, job(saved(60))])["Deferred"][0].job is again
    assert len(process([again])["Finished"]) == 1
    assert names(connection)["user_7"] == f"name {LATER}"


def test_many_locked_rows_delay_the_others_no_longer_than_one(
    process: Process, connection: Admin, sixty: list[TakenJob]
) -> None:
    with transaction(connection) as application:
        application.execute("UPDATE users SET name = 'theirs' WHERE clerk_id LIKE 'user_%5'")
        with within(10):
            done = process(sixty)
    assert (len(done["Finished"]), len(done["Deferred"])) == (54, 6)


@pytest.mark.parametrize("anonymize", [False, True])
def test_open_references_to_many_users_delay_only_those_who_go_or_get_another_address(
    anonymize: bool, database: Database, connection: Admin, sixty: list[TakenJob]
) -> None:
    connection.execute(CHILDREN)
    leaving = [job(deleted_event(f"user_{i}")) for i in range(4)]
    moving = [job(saved(i, email=f"another_{i}@example.com")) for i in range(4, 8)]
    old = [job(saved(i, NOW - 1, email=f"former_{i}@example.com")) for i in range(8, 12)]
    with transaction(connection) as application:
        application.execute("INSERT INTO children (user_id) SELECT id FROM users")
        with within(10):
            done = process_with(database, [*leaving, *moving, *old, *sixty[12:]], Policy(anonymize))
        assert {item.job.id for item in done["Deferred"]} == {one.id for one in (*leaving, *moving)}
        assert len(done["Finished"]) == 52


def test_a_locked_row_that_holds_an_address_delays_the_delivery_that_claims_it(
    process: Process, connection: Admin, sixty: list[TakenJob]
) -> None:
    claim = job(saved(61, email="user_7@example.com"))
    with transaction(connection) as application:
        application.execute("SELECT FROM users WHERE clerk_id = 'user_7' FOR UPDATE")
        with within(25):
            done = process([*sixty[8:], claim])
    assert [item.job for item in done["Deferred"]] == [claim]
    assert len(done["Finished"]) == 52


@pytest.mark.parametrize("mode", ["SHARE", "ACCESS EXCLUSIVE"])
def test_a_locked_table_is_the_deployments_trouble_and_is_named_soon(
    mode: str, process: Process, connection: Admin, sixty: list[TakenJob]
) -> None:
    with transaction(connection) as application:
        application.execute(sql.SQL("LOCK TABLE users IN {} MODE").format(sql.SQL(mode)))
        with within(15), pytest.raises(DatabaseUnavailable) as waits:
            process(sixty)
    assert waits.value.cause is Cause.LOCKED


def test_locked_profiles_delay_their_deliveries_alone(database: Database, connection: Admin) -> None:
    keys = FieldSources(profile_fields=("first_name",))
    apply = partial(process_with, database, policy=Policy(keeps_fields=True), keys=keys)
    apply([job(saved(i, NOW)) for i in range(60)])
    with transaction(connection) as application:
        application.execute("SELECT FROM user_profiles WHERE clerk_id LIKE 'user_%5' FOR UPDATE")
        with within(10):
            done = apply([job(saved(i)) for i in range(60)])
    assert (len(done["Finished"]), len(done["Deferred"])) == (54, 6)


def test_locks_that_only_a_trigger_meets_delay_their_deliveries_alone(
    process: Process, connection: Admin, sixty: list[TakenJob]
) -> None:
    connection.execute("CREATE TABLE accounts AS SELECT clerk_id, name FROM users")
    interfere(connection, "user_%", "UPDATE accounts SET name = NEW.name WHERE clerk_id = NEW.clerk_id")
    with transaction(connection) as application:
        application.execute("SELECT FROM accounts WHERE clerk_id LIKE 'user_%5' FOR UPDATE")
        with within(20):
            done = process(sixty)
    assert (len(done["Finished"]), len(done["Deferred"])) == (54, 6)


# Triggers, rules and policies


MISSING_TABLE = "PERFORM 1 FROM audit_log_that_was_dropped"
MISSING_RIGHT = "RAISE insufficient_privilege"
# As dblink raises it for another server. Of the service's own connection it would mean that this one is lost.
NO_OTHER_SERVER = "RAISE sqlclient_unable_to_establish_sqlconnection"
RAISED = "a trigger, rule or policy of the application raised"


@pytest.mark.parametrize(
    ("action", "meta", "words"),
    [
        ("RAISE EXCEPTION 'no'", {}, RAISED),
        ("RAISE 'x' USING ERRCODE = '38001'", {}, RAISED),
        (MISSING_TABLE, {}, "SQLSTATE 42P01"),
        (MISSING_TABLE, {"has_waited": True}, "SQLSTATE 42P01"),
        (MISSING_RIGHT, {}, "SQLSTATE 42501"),
        (NO_OTHER_SERVER, {}, "SQLSTATE 08001"),
        ("RAISE invalid_authorization_specification", {}, "SQLSTATE 28000"),
        ("RAISE invalid_catalog_name", {}, "SQLSTATE 3D000"),
        ("RAISE undefined_file", {}, "SQLSTATE 58P01"),
    ],
)
def test_a_row_that_a_trigger_refuses_or_breaks_on_fails_alone_and_may_be_retried(
    process: Process,
    connection: Admin,
    sixty: list[TakenJob],
    *,
    action: str,
    meta: dict[str, object],
    words: str,
) -> None:
    interfere(connection, "user_7", action)
    sixty[7] = sixty[7]._replace(meta=meta)
    done = process(sixty)
    assert len(done["Finished"]) == 59
    (one,) = failed(done)
    assert (one.job, one.retryable) == (sixty[7], True)
    assert words in one.reason
    assert not re.search("'no'|audit", one.reason + one.traceback)


@pytest.mark.parametrize("meta", [{}, {"has_waited": True}])
def test_a_trigger_that_refuses_every_statement_fails_jobs_and_ends_no_worker(
    meta: dict[str, object], process: Process, connection: Admin, sixty: list[TakenJob]
) -> None:
    connection.execute("""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$;
        CREATE TRIGGER refuse BEFORE INSERT OR UPDATE OR DELETE ON users
        FOR EACH STATEMENT EXECUTE FUNCTION refuse()
    """)
    with transaction(connection) as application:
        application.execute("SELECT FROM users WHERE clerk_id = 'user_1' FOR UPDATE")
        done = process([one._replace(meta=meta) for one in sixty[:3]])
    assert {item.retryable for item in failed(done)} == {True}
    assert len(failed(done)) + len(done["Deferred"]) == 3
    assert len(failed(done)) >= 2


def failed(done: dict[str, list[Settled]]) -> list[Failed]:
    return [item for item in done["Failed"] if isinstance(item, Failed)]


def test_a_trigger_per_statement_leaves_nothing_of_the_writes_that_are_only_tried(
    process: Process, connection: Admin, sixty: list[TakenJob]
) -> None:
    connection.execute("""
        CREATE TABLE fired (operation text);
        CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN INSERT INTO fired VALUES (TG_OP); RETURN NULL; END $$;
        CREATE TRIGGER note AFTER INSERT OR UPDATE OR DELETE ON users
        FOR EACH STATEMENT EXECUTE FUNCTION note()
    """)
    interfere(connection, "user_7", MISSING_TABLE)
    assert len(process(sixty)["Finished"]) == 59
    assert set(connection.execute("SELECT operation FROM fired")) == {("UPDATE",)}


def test_one_job_alone_fails_where_a_trigger_refuses_it(
    process: Process, connection: Admin, sixty: list[TakenJob]
) -> None:
    interfere(connection, "user_7", "RAISE EXCEPTION 'no'")
    assert [item.job for item in failed(process([sixty[7]]))] == [sixty[7]]


def test_one_job_alone_fails_for_a_broken_trigger_only_if_it_failed_before(
    process: Process, connection: Admin, sixty: list[TakenJob]
) -> None:
    interfere(connection, "user_7", MISSING_TABLE)
    with pytest.raises(DatabaseUnavailable):
        process([sixty[7]])
    before = sixty[7]._replace(meta={"attempts": 1})
    assert [item.job for item in failed(process([before]))] == [before]


def test_a_trigger_that_is_broken_for_all_is_the_deployments_trouble(
    process: Process, connection: Admin, sixty: list[TakenJob]
) -> None:
    interfere(connection, "%", MISSING_TABLE)
    with pytest.raises(DatabaseUnavailable, match="42P01"):
        process(sixty)


def test_a_trigger_that_reaches_no_other_server_for_any_user_costs_no_connection(
    process: Process, connection: Admin, database: Database, sixty: list[TakenJob]
) -> None:
    interfere(connection, "%", NO_OTHER_SERVER)
    with within(10), pytest.raises(DatabaseUnavailable, match="08001") as waits:
        process(sixty)
    assert waits.value.cause is Cause.REFUSED
    assert database.pool_state().invalidated == 0


@pytest.mark.parametrize(
    "damage", ["DROP TABLE webhook_events", "ALTER TABLE user_sync RENAME deleted_at TO gone_at"]
)
def test_a_missing_table_fails_no_job_and_costs_two_transactions(
    damage: str, process: Process, connection: Admin, database: Database, sixty: list[TakenJob]
) -> None:
    connection.execute(damage.encode())
    checkouts = count_checkouts(database)
    with pytest.raises(DatabaseUnavailable) as waits:
        process(sixty)
    assert waits.value.cause is Cause.TABLE_MISSING
    assert checkouts() == 2


def test_a_slow_trigger_delays_its_delivery_alone(
    process: Process, connection: Admin, sixty: list[TakenJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(session.BATCH_LIMITS, "statement_timeout", "500ms")
    interfere(connection, "user_7", "PERFORM pg_sleep(60)")
    done = process(sixty)
    assert [item.job for item in done["Deferred"]] == [sixty[7]]
    assert len(done["Finished"]) == 59


def test_however_long_an_attempt_takes_each_pass_leaves_fewer_behind_a_slow_trigger(
    process: Process, connection: Admin, sixty: list[TakenJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(session.BATCH_LIMITS, "statement_timeout", "300ms")
    monkeypatch.setattr(isolation, "DIVIDES_FOR_S", 0.1)
    interfere(connection, "user_7", "PERFORM pg_sleep(60)")
    waiting = sixty[4:12]
    for left in (4, 2, 1):
        done = process(waiting)
        assert len(done["Deferred"]) == left
        waiting = [item.job._replace(meta={"has_waited": True}) for item in done["Deferred"]]
    assert [job.id for job in waiting] == [sixty[7].id]


RULE = "CREATE RULE keep AS ON UPDATE TO users WHERE old.clerk_id = 'user_7' DO INSTEAD NOTHING"


@pytest.mark.parametrize("kind", ["insert", "update", "delete", "rule"])
def test_a_write_that_a_trigger_or_a_rule_suppresses_is_never_applied(
    kind: str, process: Process, connection: Admin, sixty: list[TakenJob]
) -> None:
    one = {"insert": saved(100), "delete": deleted_event("user_7")}.get(kind, saved(7))
    if kind == "rule":
        connection.execute(RULE)
    else:
        interfere(connection, "user_100" if kind == "insert" else "user_7", "RETURN NULL")
    suppressed = job(one)
    done = process([*sixty[10:], suppressed])
    assert len(done["Finished"]) == 50
    assert [(item.job, item.retryable) for item in failed(done)] == [(suppressed, True)]
    assert "not every row was written" in failed(done)[0].reason
    ledger = connection.execute("SELECT 1 FROM webhook_events WHERE svix_id = %s", [suppressed.id])
    assert ledger.fetchone() is None


@pytest.mark.parametrize("kind", ["profile", "sign-in", "deletion"])
@pytest.mark.parametrize("operation", ["INSERT", "UPDATE"])
def test_a_suppressed_write_of_the_syncs_state_is_never_applied(
    kind: str, operation: LiteralString, process: Process, connection: Admin
) -> None:
    events = {
        "profile": saved(7),
        "sign-in": session_event(data={"user_id": "user_7", "created_at": NOW}),
        "deletion": deleted_event("user_7"),
    }
    interfere(connection, "user_7", "RETURN NULL", "user_sync", operation)
    suppressed = job(events[kind])
    done = process([suppressed, job(saved(8))])
    assert [(item.job, item.retryable) for item in failed(done)] == [(suppressed, True)]
    assert "not every row was written" in failed(done)[0].reason
    assert set(names(connection)) == {"user_8"}


MEMBER = membership("user_7", organization("org_7"))
RENAMED = membership("user_7", organization("org_7", "Apex", updated_at=LATER))
PROMOTED = membership("user_7", organization("org_7"), role="org:admin", updated_at=LATER)


@pytest.mark.parametrize(
    ("write", "before", "event"),
    [
        ("INSERT ON webhook_events", None, saved(7)),
        ("INSERT ON instance_sync", None, saved(7)),
        ("INSERT ON user_profiles", None, saved(7)),
        ("UPDATE ON user_profiles", saved(7, NOW), saved(7)),
        ("DELETE ON user_profiles", saved(7, NOW), deleted_event("user_7")),
        ("INSERT ON organization_sync", None, membership_event(data=MEMBER)),
        ("UPDATE ON organization_sync", membership_event(data=MEMBER), membership_event(data=RENAMED)),
        ("INSERT ON membership_sync", None, membership_event(data=MEMBER)),
        ("UPDATE ON membership_sync", membership_event(data=MEMBER), membership_event(data=PROMOTED)),
        ("DELETE ON membership_sync", membership_event(data=MEMBER), deleted_event("user_7")),
    ],
)
def test_a_suppressed_write_of_another_table_is_never_applied(
    write: str, before: Json | None, event: Json, database: Database, connection: Admin
) -> None:
    policy = Policy(owns_organization=False, follows_memberships=True, keeps_fields=True)
    keys = FieldSources(organization=None, memberships=True, profile_fields=("first_name",))
    apply = partial(process_with, database, policy=policy, keys=keys)
    if before is not None:
        assert len(apply([job(before)])["Finished"]) == 1
    connection.execute(SUPPRESS.format(write=write).encode())
    suppressed = job(event)
    assert [item.job for item in failed(apply([suppressed]))] == [suppressed]
    connection.execute("DROP FUNCTION suppress CASCADE")
    assert apply([suppressed])["Finished"] == [Finished(suppressed, Outcome.APPLIED)], "nothing was applied"


def test_a_trigger_that_changes_the_row_again_is_no_trouble(
    process: Process, connection: Admin, sixty: list[TakenJob]
) -> None:
    connection.execute(
        """
        ALTER TABLE users ADD seen int NOT NULL DEFAULT 0;
        CREATE FUNCTION count_it() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
          UPDATE users SET seen = seen + 1 WHERE id = NEW.id;
          RETURN NULL;
        EXCEPTION WHEN division_by_zero THEN RETURN NULL;
        END $$;
        CREATE TRIGGER count_it AFTER INSERT OR UPDATE ON users
        FOR EACH ROW WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION count_it();
        CREATE TABLE audit (clerk_id text);
        CREATE RULE note AS ON UPDATE TO users DO ALSO INSERT INTO audit VALUES (new.clerk_id)
        """
    )
    assert len(process([*sixty, job(saved(100))])["Finished"]) == 61


# Row-level security


@pytest.fixture
def unprivileged(make_settings: MakeSettings, connection: Admin, database_url: str) -> Iterator[Database]:
    """The database as a role sees it that has every right on the tables, and does not own them."""
    rights = "SELECT, INSERT, UPDATE, DELETE"
    with new_role(connection) as role:
        connection.execute(f"GRANT {rights} ON ALL TABLES IN SCHEMA public TO {role}".encode())
        url = SecretStr(with_account(database_url, role))
        database = Database(make_settings(redis_url=None, database_url=url, database_url_unpooled=None))
        yield database
        database.dispose()


@pytest.mark.skipif(os.environ.get("TEST_PGBOUNCER") == "1", reason="PgBouncer connects as one role here")
def test_row_level_security_is_an_error_and_hides_no_deletion(
    connection: Admin, unprivileged: Database, sixty: list[TakenJob]
) -> None:
    deletion = job(deleted_event("user_7"))
    assert len(process_with(unprivileged, sixty[:5])["Finished"]) == 5
    connection.execute("ALTER TABLE users ENABLE ROW LEVEL SECURITY")
    with pytest.raises(DatabaseUnavailable) as refused:
        process_with(unprivileged, [deletion])
    assert refused.value.cause is Cause.ROW_SECURITY
    assert "user_7" in names(connection)
    recorded = "SELECT 1 FROM webhook_events WHERE svix_id = %s"
    assert connection.execute(recorded, [deletion.id]).fetchone() is None
    connection.execute("ALTER TABLE users DISABLE ROW LEVEL SECURITY")
    assert len(process_with(unprivileged, [deletion])["Finished"]) == 1
    assert "user_7" not in names(connection)


@pytest.mark.skipif(os.environ.get("TEST_PGBOUNCER") == "1", reason="PgBouncer connects as one role here")
def test_a_right_that_only_changes_need_is_the_deployments_trouble_though_others_pass(
    connection: Admin, unprivileged: Database, sixty: list[TakenJob]
) -> None:
    (name,) = unprivileged.run(lambda connection: connection.execute(text("SELECT current_user")).one())
    role = sql.Identifier(name)
    columns = "id, clerk_id, email, name, organization, role, created_at, last_login_at"
    connection.execute(sql.SQL("REVOKE SELECT ON users FROM {}").format(role))
    connection.execute(sql.SQL("GRANT SELECT ({}) ON users TO {}").format(sql.SQL(columns), role))
    stale = job(saved(30, NOW))
    with pytest.raises(DatabaseUnavailable) as refused:
        process_with(unprivileged, [*sixty[:20], stale])
    assert refused.value.cause is Cause.TABLE_RIGHTS

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from functools import partial
from itertools import product
from typing import Any

import psycopg
import pytest
import structlog.testing
from psycopg import errors
from pydantic import SecretStr
from sqlalchemy import Connection, TextClause, text
from sqlalchemy.exc import DBAPIError

from cli.dev.servers import HOST, free_port
from db.connection import engine, session
from db.connection.causes import Cause
from db.connection.driver import ANSWER_LIMIT_S
from db.connection.engine import ATTEMPTS, Database
from db.connection.errors import ChangeRefused, DatabaseError, DatabaseUnavailable, translate
from db.connection.pipeline import Pipeline
from db.times import EARLIEST, LATEST, to_datetime
from tests.support.checkouts import count_checkouts
from tests.support.databases import new_role, with_account
from tests.support.faulty_proxy import FaultyProxy, proxy_to
from tests.support.settings import MakeSettings
from tests.support.waiting import wait_until

MARK = "marked.person@example.com"
Admin = psycopg.Connection[Any]
MakeDatabase = Callable[..., Database]


@pytest.fixture
def database(make_database: MakeDatabase) -> Database:
    return make_database()


@pytest.fixture
def admin(connection: Admin) -> Admin:
    """A connection beside the pool's, and a table to write to."""
    connection.execute("CREATE TABLE things (id int PRIMARY KEY, name text CHECK (name <> 'bad'))")
    return connection


@pytest.fixture
def make_database(make_settings: MakeSettings) -> Iterator[MakeDatabase]:
    """Make a database with settings of its own; `attempts` as the engine takes it."""
    made: list[Database] = []

    def make(
        attempts: int = ATTEMPTS,
        *,
        unpooled: bool = True,
        answer_limit_s: float = ANSWER_LIMIT_S,
        **overrides: Any,
    ) -> Database:
        overrides.setdefault("redis_url", None)
        settings = make_settings(**overrides)
        made.append(Database(settings, unpooled=unpooled, attempts=attempts, answer_limit_s=answer_limit_s))
        return made[-1]

    yield make
    for database in made:
        database.dispose()


class Work:
    """A transaction that counts how often it is tried and on which connections."""

    def __init__(self, *steps: Callable[[Connection], Any]) -> None:
        self.steps = steps
        self.pids: list[int] = []

    def __call__(self, connection: Connection) -> Any:
        """Do step n at try n, and the last one from there on."""
        self.pids.append(pid(connection))
        return self.steps[min(len(self.pids), len(self.steps)) - 1](connection)

    @property
    def tries(self) -> int:
        return len(self.pids)


def pid(connection: Connection) -> int:
    return int(connection.scalar(text("SELECT pg_backend_pid()")))


def execute(statement: str, **parameters: object) -> Callable[[Connection], Any]:
    return lambda connection: connection.execute(text(statement), parameters)


def add(id_: int, name: str = "good") -> Callable[[Connection], Any]:
    return execute("INSERT INTO things VALUES (:id, :name)", id=id_, name=name)


def things(admin: Admin) -> list[tuple[int, str]]:
    return admin.execute("SELECT id, name FROM things ORDER BY id").fetchall()


def refuse(statement: str, database: Database) -> DatabaseError:
    work = Work(execute(statement))
    with pytest.raises(DatabaseError) as refused:
        database.run(work)
    assert work.tries == 1, "it is not tried again"
    return refused.value


# What may heal is tried again


def test_a_connection_that_dies_in_mid_transaction_is_replaced(database: Database, admin: Admin) -> None:
    def die(connection: Connection) -> None:
        add(1, "lost")(connection)
        admin.execute("SELECT pg_terminate_backend(%s)", [pid(connection)])
        add(2, "lost")(connection)

    work = Work(die, add(1))
    database.run(work)
    assert things(admin) == [(1, "good")]
    assert len(set(work.pids)) == 2, "on a fresh connection"
    assert database.pool_state().invalidated == 1


def test_a_pipeline_whose_connection_dies_is_sent_again(database: Database, admin: Admin) -> None:
    pids = []

    def work(pipeline: Pipeline) -> None:
        pids.append(pipeline.send(text("SELECT pg_backend_pid()")).fetchall()[0][0])
        pipeline.send(text("INSERT INTO things VALUES (1, 'good')"))
        if len(pids) == 1:
            admin.execute("SELECT pg_terminate_backend(%s)", [pids[0]])

    database.run_pipeline(work)
    assert things(admin) == [(1, "good")]
    assert len(set(pids)) == 2
    assert database.pool_state().invalidated == 1


def test_one_dead_connection_replaces_all_idle_ones(make_database: MakeDatabase, admin: Admin) -> None:
    database = make_database(db_pool_size=4)
    everyone = threading.Barrier(4)

    def meet(connection: Connection) -> int:
        everyone.wait(30)
        return pid(connection)

    with ThreadPoolExecutor(4) as threads:
        pids = list(threads.map(database.run, [meet] * 4))
    assert len(set(pids)) == 4
    for one in pids:
        admin.execute("SELECT pg_terminate_backend(%s)", [one])
    with structlog.testing.capture_logs() as logs:
        database.run(add(1))
    assert [entry["event"] for entry in logs].count("database retry") == 1
    assert things(admin) == [(1, "good")]


def test_a_serialization_failure_is_tried_again(database: Database, admin: Admin) -> None:
    admin.execute("INSERT INTO things VALUES (1, 'old')")
    tries = []

    def work(connection: Connection) -> None:
        tries.append(1)
        connection.execute(text("ROLLBACK"))
        connection.execute(text("BEGIN ISOLATION LEVEL REPEATABLE READ"))
        connection.execute(text("SELECT name FROM things"))
        if len(tries) == 1:
            admin.execute("UPDATE things SET name = 'theirs'")
        connection.execute(text("UPDATE things SET name = name || ' and mine'"))

    database.run(work)
    assert len(tries) == 2
    assert things(admin) == [(1, "theirs and mine")]


def test_a_deadlock_is_tried_again(database: Database, admin: Admin) -> None:
    admin.execute("INSERT INTO things VALUES (1, ''), (2, '')")
    both_hold_one = threading.Barrier(2)
    tries: list[int] = []

    def work(first: int, second: int) -> Callable[[Connection], None]:
        met = threading.Event()

        def lock_both(connection: Connection) -> None:
            tries.append(first)
            append = text("UPDATE things SET name = name || 'x' WHERE id = :id")
            connection.execute(append, {"id": first})
            if not met.is_set():
                met.set()
                both_hold_one.wait(30)
            connection.execute(append, {"id": second})

        return lock_both

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(database.run, [work(1, 2), work(2, 1)]))
    assert len(tries) >= 3
    assert things(admin) == [(1, "xx"), (2, "xx")]


def test_a_unique_violation_is_tried_again_as_it_may_be_a_race(database: Database, admin: Admin) -> None:
    def lose(connection: Connection) -> None:
        admin.execute("INSERT INTO things VALUES (1, 'winner')")
        add(1, "loser")(connection)

    work = Work(lose, execute("UPDATE things SET name = name || ', seen'"))
    with structlog.testing.capture_logs() as logs:
        database.run(work)
    assert work.tries == 2
    assert things(admin) == [(1, "winner, seen")]
    reasons = [entry["reason"] for entry in logs if "reason" in entry]
    assert reasons == ["perhaps a lost race (SQLSTATE 23505)"]


def test_a_lasting_unique_violation_is_retryable(make_database: MakeDatabase, admin: Admin) -> None:
    admin.execute("INSERT INTO things VALUES (1, 'there')")
    work = Work(add(1))
    with pytest.raises(ChangeRefused) as refused:
        make_database().run(work)
    assert (work.tries, refused.value.retryable) == (3, True)
    assert str(refused.value) == (
        "the database refused the change: UniqueViolation (SQLSTATE 23505, constraint things_pkey)"
    )


def test_a_server_that_has_no_connection_left_is_asked_again(
    make_database: MakeDatabase, admin: Admin, database_url_unpooled: str
) -> None:
    with new_role(admin, "CONNECTION LIMIT 1") as role:
        crowded = with_account(database_url_unpooled, role)
        urls = {"database_url": SecretStr(crowded), "database_url_unpooled": None}
        many_attempts = make_database(attempts=20, **urls)
        with psycopg.connect(crowded) as only_one:
            with pytest.raises(DatabaseUnavailable, match=r"the server has no connection left"):
                make_database(attempts=2, **urls).run(execute("SELECT 1"))
            with structlog.testing.capture_logs() as logs, ThreadPoolExecutor(1) as thread:
                waiting = thread.submit(many_attempts.run, pid)
                wait_until(lambda: logs, 20)
                assert not waiting.done()
                only_one.close()
                assert waiting.result(30)
        many_attempts.dispose()


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Set one of the limits of a batch's transaction for this test."""
    return partial(monkeypatch.setitem, session.BATCH_LIMITS)


def test_what_a_frozen_process_locks_is_free_again_while_it_sleeps(
    database: Database, admin: Admin, limit: Callable[[str, str], None]
) -> None:
    limit("idle_in_transaction_session_timeout", "1s")
    admin.execute("INSERT INTO things VALUES (1, '')")
    tries = []

    def work(pipeline: Pipeline) -> None:
        tries.append(1)
        locked = pipeline.send(text("SELECT name FROM things FOR UPDATE"))
        pipeline.wait()
        if len(tries) == 1:
            admin.execute("UPDATE things SET name = 'theirs'")  # waits until the lock is free
        (name,) = locked.fetchall()[0]
        pipeline.send(text("UPDATE things SET name = :name"), name=f"{name} and mine")

    admin.execute("SET lock_timeout = '20s'")
    database.run_pipeline(work)
    assert len(tries) == 2
    assert things(admin) == [(1, "theirs and mine")]


def test_what_a_process_locks_that_froze_while_it_sent_is_free_again_too(
    database: Database, admin: Admin, limit: Callable[[str, str], None]
) -> None:
    if admin.info.server_version < session.TRANSACTION_TIMEOUT_SINCE:
        pytest.skip("this PostgreSQL knows no transaction_timeout")
    limit("transaction_timeout", "1s")
    limit("idle_in_transaction_session_timeout", "0")
    admin.execute("INSERT INTO things VALUES (1, '')")
    admin.execute("SET lock_timeout = '20s'")
    tries = []

    def work(pipeline: Pipeline) -> None:
        tries.append(1)
        pipeline.send(text("UPDATE things SET name = name || ' and mine'"))
        if len(tries) == 1:
            wait_until(lambda: not admin.execute(FREE).fetchall(), 20)
            admin.execute("UPDATE things SET name = 'theirs'")

    database.run_pipeline(work)
    assert len(tries) == 2
    assert things(admin) == [(1, "theirs and mine")]


FREE = "SELECT FROM things FOR UPDATE SKIP LOCKED"


def test_a_lock_that_is_held_for_too_long_is_reported_at_once_as_a_delay(
    make_database: MakeDatabase, admin: Admin, limit: Callable[[str, str], None]
) -> None:
    limit("lock_timeout", "50ms")
    admin.execute("INSERT INTO things VALUES (1, 'locked')")
    tries = []

    def work(pipeline: Pipeline) -> None:
        tries.append(1)
        pipeline.send(text("SELECT 1"))
        rows = pipeline.send(text("SELECT name FROM things FOR UPDATE"))
        pipeline.send(text("SELECT 2"))
        rows.fetchall()

    with admin.transaction():
        admin.execute("UPDATE things SET name = 'mine'")
        with pytest.raises(DatabaseUnavailable, match=r"LockNotAvailable \(SQLSTATE 55P03\)") as delayed:
            make_database(attempts=3).run_pipeline(work)
    assert (len(tries), delayed.value.cause, delayed.value.is_delay) == (1, Cause.LOCKED, True)


def test_the_limits_of_a_pipeline_end_with_its_transaction(database: Database) -> None:
    inside = database.run_pipeline(
        lambda pipeline: pipeline.send(text("SELECT current_setting('lock_timeout')")).fetchall()
    )
    outside = database.run(
        lambda connection: connection.scalar(text("SELECT current_setting('lock_timeout')"))
    )
    assert (inside, outside) == ([("2s",)], "0")


def test_a_server_that_is_away_is_tried_a_few_times_and_then_said(
    make_database: MakeDatabase,
) -> None:
    unreachable = SecretStr(f"postgresql://a_role:hunter2@127.0.0.1:{free_port()}/secret_name")
    database = make_database(attempts=3, database_url=unreachable, database_url_unpooled=None)
    with (
        structlog.testing.capture_logs() as logs,
        pytest.raises(DatabaseUnavailable, match=r"\(DATABASE_URL\): nothing listens"),
    ):
        database.run(execute("SELECT 1"))
    assert [entry["attempt"] for entry in logs] == [1, 2]
    reasons = {entry["reason"] for entry in logs}
    assert len(reasons) == 1
    assert reasons.pop().startswith("no connection to the database (DATABASE_URL): nothing listens")
    assert "hunter2" not in str(logs)
    assert 0 <= logs[0]["pause_ms"] <= 1000
    with pytest.raises(DatabaseUnavailable, match="nothing listens"):
        database.ping()
    assert database.pool_state().invalidated == 0, "a connection that never was is not counted as lost"


# What no waiting heals is not tried again


REFUSED = "the database refused the change"
NOT_NOW = "the database cannot take changes now"


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        (
            "INSERT INTO things VALUES (1, 'bad')",
            f"{REFUSED}: CheckViolation (SQLSTATE 23514, constraint things_name_check)",
        ),
        (
            "INSERT INTO things VALUES (NULL, '')",
            f"{REFUSED}: NotNullViolation (SQLSTATE 23502, column id)",
        ),
        ("INSERT INTO things VALUES ('x', '')", f"{REFUSED}: InvalidTextRepresentation (SQLSTATE 22P02)"),
        ("SELECT 1 / 0", f"{REFUSED}: DivisionByZero (SQLSTATE 22012)"),
        ("SELECT 1 FROM nowhere", f"{NOT_NOW}: UndefinedTable (SQLSTATE 42P01): "),
        ("SELECT nothing FROM things", f"{NOT_NOW}: UndefinedColumn (SQLSTATE 42703): "),
        ("SELEC 1", f"{NOT_NOW}: SyntaxError (SQLSTATE 42601): "),
        (
            "SET TRANSACTION READ ONLY; DELETE FROM things",
            f"{NOT_NOW}: ReadOnlySqlTransaction (SQLSTATE 25006): ",
        ),
        (
            "SET LOCAL ROLE pg_monitor; DELETE FROM things",
            f"{NOT_NOW}: InsufficientPrivilege (SQLSTATE 42501): ",
        ),
    ],
)
@pytest.mark.usefixtures("admin")
def test_errors_that_stay_are_reported_at_once(statement: str, reason: str, database: Database) -> None:
    error = refuse(f"DO $$ BEGIN {statement}; END $$" if ";" in statement else statement, database)
    assert isinstance(error, ChangeRefused if reason.startswith(REFUSED) else DatabaseUnavailable)
    assert error.retryable is isinstance(error, DatabaseUnavailable)
    assert str(error).startswith(reason) if reason.endswith(": ") else str(error) == reason


OWN_FAULT = ["22001", "22021", "22P05", "23502", "23503", "23505", "23514", "23P01"]
TROUBLE = ["08006", "25006", "3D000", "40001", "40P01", "42501", "42P01", "53100", "53300", "57P01", "XX000"]


@pytest.mark.parametrize("state", [*OWN_FAULT, *TROUBLE])
def test_only_classes_22_and_23_are_a_changes_own_fault(state: str) -> None:
    error = translate(errors.lookup(state)(f"Key (email)=({MARK})"))
    assert isinstance(error, ChangeRefused if state in OWN_FAULT else DatabaseUnavailable)
    assert error.retryable is (state not in OWN_FAULT or state == "23505")
    assert MARK not in str(error)
    assert state in str(error)


@pytest.mark.parametrize(
    ("moment", "nearest"), [("infinity", LATEST), ("-infinity", EARLIEST), ("0044-03-15 BC", EARLIEST)]
)
def test_a_time_beyond_pythons_is_the_nearest(moment: str, nearest: datetime, database: Database) -> None:
    query = text(f"SELECT '{moment}'::timestamptz")
    assert database.run(lambda connection: connection.scalar(query)) == nearest


def test_an_array_arrives_as_it_was_sent(database: Database) -> None:
    texts = ["".join(text) for n in range(4) for text in product('"\\\n,{}u', repeat=n)]
    texts += [*map(chr, range(1, 0x500)), "NULL", "null", "\U0001f600"]
    texts += ["".join(texts), "".join(text for text in texts if "\n" not in text)]
    moments = [EARLIEST, LATEST, *(to_datetime(ms) for ms in (-1, 0, 1, 1_764_000_000_123))]
    lists: dict[str, list[list[object]]] = {
        "text": [[text, None] for text in texts],
        "bigint": [[0, -1, 2**63 - 1, None]],
        "boolean": [[True, False, None]],
        "timestamptz": [[*moments, None]],
    }

    def exchange(pipeline: Pipeline) -> list[tuple[list[object], Any]]:
        answers = [
            (values, pipeline.send(text(f"SELECT CAST(:values AS {type_}[])"), values=values))
            for type_, sent in lists.items()
            for values in (*sent, [])
        ]
        return [(values, answer.fetchone()) for values, answer in answers]

    received = database.run_pipeline(exchange)
    assert received == [(values, (values,)) for values, _ in received]


@pytest.mark.usefixtures("admin")
def test_a_value_that_the_driver_cannot_send_is_the_changes_own_fault(database: Database) -> None:
    for run in (
        lambda: database.run(add(1, f"{MARK}\0")),
        lambda: database.run_pipeline(lambda pipeline: pipeline.send(text("SELECT :x"), x=f"{MARK}\0")),
    ):
        with pytest.raises(ChangeRefused, match=r"a value that cannot be represented$") as refused:
            run()
        assert MARK not in str(refused.value)
        assert refused.value.retryable is False


# Nothing personal


def test_no_error_shows_a_value(make_database: MakeDatabase, admin: Admin) -> None:
    database = make_database(attempts=2)
    admin.execute("CREATE TABLE people (email text UNIQUE CHECK (length(email) < 40), id int NOT NULL)")
    admin.execute("INSERT INTO people VALUES (%s, 1)", [MARK])
    insert = text("INSERT INTO people VALUES (:email, :id)")
    with structlog.testing.capture_logs() as logs:
        for email, id_ in ((MARK, 2), (MARK * 3, 3), (MARK + "!", None)):
            for run in (run_statement, run_piped):
                with pytest.raises(ChangeRefused) as refused:
                    run(database, insert, email=email, id=id_)
                assert "marked" not in f"{refused.value!r} {refused.value} {refused.value.__cause__}"
                assert refused.value.__suppress_context__, "what stands behind it is not printed"
    assert len(logs) == 2, "a unique violation is tried again"
    assert "marked" not in str(logs)


def run_statement(database: Database, statement: TextClause, **parameters: object) -> None:
    database.run(lambda connection: connection.execute(statement, parameters))


def run_piped(database: Database, statement: TextClause, **parameters: object) -> None:
    database.run_pipeline(lambda pipeline: pipeline.send(statement, **parameters))


def test_sqlalchemys_own_errors_hide_their_parameters(database: Database) -> None:
    select = text("SELECT :email FROM nowhere")
    with database.engine.begin() as opened, pytest.raises(DBAPIError, match="parameters hidden") as refused:
        opened.execute(select, {"email": MARK})
    assert MARK not in str(refused.value)


# A connection that is forgotten on its way


@pytest.fixture
def through_proxy(make_database: MakeDatabase, database_url: str) -> Iterator[tuple[Database, FaultyProxy]]:
    """A database whose answers are to come within a second, and the proxy that leads to it."""
    with proxy_to(database_url) as (proxy, url):
        yield make_database(unpooled=False, answer_limit_s=1, database_url=url), proxy


def test_a_transaction_that_gets_no_answer_is_tried_on_a_fresh_connection(
    through_proxy: tuple[Database, FaultyProxy], admin: Admin
) -> None:
    far, proxy = through_proxy
    far.ping()
    for id_, run in enumerate((run_statement, run_piped)):
        proxy.forget()
        began = time.monotonic()
        run(far, text(f"INSERT INTO things VALUES ({id_}, 'good')"))
        assert 1 <= time.monotonic() - began < 15
    proxy.forget()
    far.ping()
    assert things(admin) == [(0, "good"), (1, "good")]
    assert far.pool_state().in_use == 0


def test_what_takes_long_is_not_tried_many_times(
    through_proxy: tuple[Database, FaultyProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "RETRIES_FOR_S", 1.5)
    far, _ = through_proxy
    with structlog.testing.capture_logs() as logs, pytest.raises(DatabaseUnavailable):
        run_statement(far, text("SELECT pg_sleep(1.2)"))
    assert [line["attempt"] for line in logs if line["event"] == "database retry"] == [1]


def test_a_migration_may_take_longer_than_any_answer(make_database: MakeDatabase) -> None:
    make_database(answer_limit_s=0.2).run(execute("SELECT pg_sleep(0.5)"))


# The pool


def test_a_connection_that_comes_back_after_the_pool_was_emptied_is_closed(database: Database) -> None:
    late = database.engine.connect()
    driver = late.connection.driver_connection
    database.dispose()
    late.close()
    assert isinstance(driver, psycopg.Connection)
    assert driver.closed
    database.ping()


def test_replacing_the_pool_leaves_no_connection_open(make_database: MakeDatabase, admin: Admin) -> None:
    database = make_database(db_pool_size=3, db_max_overflow=5)
    checkouts = count_checkouts(database)
    begun_at = time.monotonic()

    def ask() -> None:
        while time.monotonic() < begun_at + 3 or checkouts() <= 100:
            assert time.monotonic() < begun_at + 60
            with suppress(DatabaseUnavailable):
                database.ping()

    with ThreadPoolExecutor(8) as threads:
        asking = [threads.submit(ask) for _ in range(8)]
        while not all(one.done() for one in asking):
            admin.execute(TERMINATE_OTHERS)
            database.dispose()
    assert [one.exception() for one in asking] == [None] * 8
    assert checkouts() > 100
    database.dispose()
    wait_until(lambda: others(admin) == 0, 20)


TERMINATE_OTHERS = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND pid <> pg_backend_pid()
"""


def others(admin: Admin) -> int:
    (number,) = admin.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    ).fetchone() or (0,)
    return int(number)


def test_a_pool_without_a_free_connection_says_which_settings_to_raise(
    make_database: MakeDatabase,
) -> None:
    database = make_database(db_pool_size=1, db_max_overflow=1, db_pool_timeout=0.1)
    with database.engine.connect(), database.engine.connect():
        assert database.pool_state()._asdict() == {
            "size": 1,
            "in_use": 2,
            "overflow": 1,
            "timeouts": 0,
            "invalidated": 0,
        }
        with structlog.testing.capture_logs() as logs, pytest.raises(DatabaseUnavailable) as refused:
            database.run(execute("SELECT 1"))
        assert database.pool_state().timeouts == 1, "it is not tried again"
        with pytest.raises(DatabaseUnavailable, match="DB_POOL_SIZE"):
            database.ping()
    assert isinstance(refused.value, DatabaseUnavailable)
    assert refused.value.cause is Cause.POOL_EXHAUSTED
    assert "DB_POOL_SIZE or DB_MAX_OVERFLOW" in str(refused.value)
    assert database.pool_state().timeouts == 2
    assert [(entry["event"], entry["in_use"]) for entry in logs] == [("pool exhausted", 2)]
    database.run(execute("SELECT 1"))
    assert database.pool_state().in_use == 0


def test_a_connection_is_used_again(database: Database) -> None:
    pids = {database.run(pid) for _ in range(5)}
    assert len(pids) == 1


def test_an_old_connection_is_replaced(make_database: MakeDatabase, monkeypatch: pytest.MonkeyPatch) -> None:
    assert engine.RECYCLE_S < 300
    monkeypatch.setattr(engine, "RECYCLE_S", 0.1)
    database = make_database()
    first = database.run(pid)
    wait_until(lambda: database.run(pid) != first, 20)


def test_no_statement_is_ever_prepared(database: Database) -> None:
    checkouts = count_checkouts(database)

    def often(pipeline: Pipeline) -> None:
        for _ in range(20):
            pipeline.send(text("SELECT :x"), x=1)

    database.run_pipeline(often)
    for _ in range(10):
        database.run(execute("SELECT :x", x=1))
    prepared = database.run(
        lambda connection: connection.execute(
            text("SELECT name, statement FROM pg_prepared_statements")
        ).all()
    )
    assert prepared == []
    assert checkouts() == 12


def test_connections_have_a_name_and_are_closed_with_the_pool(database: Database, admin: Admin) -> None:
    named = "SELECT 1 FROM pg_stat_activity WHERE datname = %s AND application_name = 'clerk-sync'"
    database.run(execute("SELECT 1"))
    assert admin.execute(named, [admin.info.dbname]).fetchone()
    database.dispose()
    wait_until(lambda: admin.execute(named, [admin.info.dbname]).fetchone() is None, 20)


def test_several_hosts_are_tried_in_turn(make_database: MakeDatabase, database_url_unpooled: str) -> None:
    several = (
        database_url_unpooled.replace("@", f"@{HOST}:{free_port()},") + "?target_session_attrs=read-write"
    )
    database = make_database(database_url=SecretStr(several), database_url_unpooled=None)
    assert database.run(lambda connection: connection.scalar(text("SELECT 1"))) == 1

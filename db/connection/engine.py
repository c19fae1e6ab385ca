"""The way to PostgreSQL: a pool of connections, transactions that are retried, statements sent together."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from threading import Lock
from typing import Any, NamedTuple, TypeVar, cast

import psycopg
import structlog
import tenacity
from sqlalchemy import Connection, Engine, Executable, create_engine, event, func, select, text, true
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import Pool

from config import Settings
from db.connection.answer_timeout import ANSWER_LIMIT_S, TimeoutConnection
from db.connection.errors import UNIQUE_VIOLATION, is_transient, loses_connection, sqlstate, translate
from db.connection.pool import ReplaceablePool
from db.connection.timestamps import BoundedTimestamptzLoader
from db.connection.url import postgres_url, variable

RECYCLE_S = 240  # Neon suspends an idle compute after 5 minutes, and its connections die with it.
CONNECT_TIMEOUT_S = 5
# What a frozen process holds must be free again while it sleeps: others wait for its locks.
TRANSACTION_LIMITS = {
    "lock_timeout": "10s",
    "statement_timeout": "30s",
    "idle_in_transaction_session_timeout": "10s",
}
# The one above does not count while more statements are to be sent; this does, where it is known. What a
# frozen worker holds is with others after some 15 s: they must be done with it within 30.
TRANSACTION_TIMEOUT = "20s"
KNOWS_TRANSACTION_TIMEOUT = 170_000  # https://www.postgresql.org/docs/17/release-17.html
ATTEMPTS = 6
RACE_ATTEMPTS = 3  # each sees what won before
MAX_PAUSE_S = 1.0

T = TypeVar("T")
log = structlog.get_logger("db")


class PoolState(NamedTuple):
    """The pool now, and what has happened to it since the process began."""

    size: int
    in_use: int
    overflow: int
    checkouts: int
    timeouts: int
    invalidated: int
    overflows: int


class Pipeline:
    """Sends statements without waiting for the answers of those before: one round trip for all of them.

    PostgreSQL still runs them one after the other, and each sees what was committed when it began.
    https://www.psycopg.org/psycopg3/docs/advanced/pipeline.html
    """

    def __init__(
        self, driver: psycopg.Connection[Any], sent: psycopg.Pipeline, schema: str | None = None
    ) -> None:
        self._driver = driver
        self._sent = sent
        self._schema = schema

    def send(self, statement: Executable, **parameters: object) -> psycopg.Cursor[Any]:
        """Queue `statement`. Reading from the cursor waits for its answer and for all sent before."""
        sql, defaults = _compile(statement, self._schema)
        values = {
            name: array_literal(value) if isinstance(value, list) else value
            for name, value in parameters.items()
        }
        return self._driver.cursor().execute(cast("Any", sql), {**defaults, **values})

    def wait(self) -> None:
        """Wait for the answers to all that was sent. To be done before reading while locks are held.

        Reading alone would leave PostgreSQL in the belief that more is on its way, and then no time limit of
        its own ends the transaction of a process that is frozen now.
        """
        self._sent.sync()


class Database:
    """A pool of connections, and the one way to run a transaction on it."""

    def __init__(
        self,
        settings: Settings,
        *,
        unpooled: bool = False,
        attempts: int = ATTEMPTS,
        answer_limit_s: float = ANSWER_LIMIT_S,
    ) -> None:
        # A migration may take its time.
        self.engine = _engine(settings, unpooled, answer_limit_s=None if unpooled else answer_limit_s)
        self._variable = variable(settings, unpooled=unpooled)
        self._attempts = attempts
        self._counts: Counter[str] = Counter()
        _watch_pool(self.engine, self._counts)
        self._renewing = Lock()

    def run(self, work: Callable[[Connection], T]) -> T:
        """Return what `work` returns, having committed it in one transaction.

        `work` is run again, on a fresh connection, when the error may heal within seconds; it must be
        repeatable. Raises DatabaseUnavailable or ChangeRefused.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_transient),
            wait=tenacity.wait_random_exponential(multiplier=0.05, max=MAX_PAUSE_S),
            stop=self._is_last,
            before_sleep=_log_retry,
            reraise=True,
        )
        with self._translating():
            return cast("T", retrying(self._attempt, work))

    def run_pipeline(self, work: Callable[[Pipeline], T]) -> T:
        """Do as `run` does, with a `work` that sends its statements through a Pipeline."""

        def piped(connection: Connection) -> T:
            with _pipeline(connection) as pipeline:
                return work(pipeline)

        return self.run(piped)

    def ping(self) -> None:
        """Raise DatabaseUnavailable unless the database answers. No retry, but on a fresh connection.

        One from the pool may have died with a server that is back by now.
        """
        with self._translating():
            try:
                self._attempt(_select_one)
            except SQLAlchemyError as error:
                if not getattr(error, "connection_invalidated", False):
                    raise
                self._attempt(_select_one)

    def pool_state(self) -> PoolState:
        """Return the pool's numbers."""
        pool = cast("ReplaceablePool", self.engine.pool)
        return PoolState(
            size=pool.size(),
            in_use=pool.checkedout(),
            overflow=max(0, pool.overflow()),
            checkouts=self._counts["checkouts"],
            timeouts=self._counts["timeouts"],
            invalidated=self._counts["invalidated"],
            overflows=self._counts["overflows"],
        )

    def dispose(self) -> None:
        """Close every idle connection, and each in use once it is given back."""
        with self._renewing:
            self.engine.dispose()

    @contextmanager
    def _translating(self) -> Iterator[None]:
        try:
            yield
        except PoolTimeout as error:
            self._counts["timeouts"] += 1
            log.warning("pool exhausted", **self.pool_state()._asdict())
            raise translate(error, self._variable) from None
        except (psycopg.Error, SQLAlchemyError) as error:
            raise translate(error, self._variable) from None

    def _is_last(self, state: tenacity.RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        is_race = error is not None and sqlstate(error) == UNIQUE_VIOLATION
        return state.attempt_number >= min(self._attempts, RACE_ATTEMPTS if is_race else self._attempts)

    def _attempt(self, work: Callable[[Connection], T]) -> T:
        pool = self.engine.pool
        try:
            with self.engine.begin() as connection:
                return work(connection)
        except (psycopg.Error, SQLAlchemyError) as error:
            if loses_connection(error):
                self._renew(pool)
            raise

    def _renew(self, pool: Pool) -> None:
        """Close the idle connections of `pool`: what killed one has most likely killed its siblings."""
        with self._renewing:
            if self.engine.pool is pool:  # and what came to another thread has not done so already
                self.engine.dispose()


def schema_of(connection: Connection) -> str | None:
    """Return the schema that every statement on `connection` names; None where `search_path` decides."""
    schemas = connection.get_execution_options().get("schema_translate_map") or {}
    return cast("str | None", schemas.get(None))


def _schema_map(schema: str | None) -> dict[str | None, str] | None:
    return None if schema is None else {None: schema}


def _select_one(connection: Connection) -> None:
    connection.execute(text("SELECT 1"))


def _engine(settings: Settings, unpooled: bool, answer_limit_s: float | None) -> Engine:
    engine = create_engine(
        postgres_url(settings, unpooled=unpooled),
        poolclass=ReplaceablePool,
        pool_size=settings.db_pool_size,
        max_overflow=settings.db_max_overflow,
        pool_timeout=settings.db_pool_timeout,
        pool_recycle=RECYCLE_S,
        pool_use_lifo=True,  # a quiet pool lets its surplus connections grow old and be recycled
        hide_parameters=True,
        execution_options={"schema_translate_map": _schema_map(settings.database_schema)},
        use_native_hstore=False,  # would cost a round trip for every new connection
        connect_args={
            "prepare_threshold": None,  # PgBouncer in transaction mode hands each transaction another server
            "connect_timeout": CONNECT_TIMEOUT_S,
            "application_name": "clerk-sync",
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
            "tcp_user_timeout": 30_000,
        },
    )

    @event.listens_for(engine, "do_connect")
    def connect(
        _dialect: object, _entry: object, arguments: Sequence[Any], options: dict[str, Any]
    ) -> TimeoutConnection:
        connection = TimeoutConnection.connect(*arguments, **options)
        connection.answer_limit_s = answer_limit_s
        connection.adapters.register_loader("timestamptz", BoundedTimestamptzLoader)
        return connection

    return engine


def _watch_pool(engine: Engine, counts: "Counter[str]") -> None:
    @event.listens_for(engine, "checkout")
    def checked_out(*_: object) -> None:
        counts["checkouts"] += 1

    @event.listens_for(engine, "invalidate")
    def invalidated(*_: object) -> None:
        counts["invalidated"] += 1
        log.info("connection invalidated")

    @event.listens_for(engine, "connect")
    def connected(*_: object) -> None:
        pool = cast("ReplaceablePool", engine.pool)
        if pool.overflow() > 0:
            counts["overflows"] += 1
            log.info("pool overflows", size=pool.size(), overflow=pool.overflow())


def _log_retry(state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.warning(
        "database retry",
        attempt=state.attempt_number,
        sqlstate=sqlstate(error) if error else None,
        pause_ms=round(state.upcoming_sleep * 1000),
    )


@contextmanager
def _pipeline(connection: Connection) -> Iterator[Pipeline]:
    driver = cast("psycopg.Connection[Any]", connection.connection.driver_connection)
    driver.autocommit = True  # psycopg waits for the answers to a BEGIN and a COMMIT of its own
    try:
        with driver.pipeline() as sent:
            driver.execute("BEGIN")
            pipeline = Pipeline(driver, sent, schema_of(connection))
            # As connection options PgBouncer refuses them, as session settings it loses them.
            pipeline.send(_limits(driver.info.server_version >= KNOWS_TRANSACTION_TIMEOUT))
            yield pipeline
            driver.execute("COMMIT")
    finally:
        if not driver.closed:
            driver.rollback()
            driver.autocommit = False


@cache
def _limits(knows_transaction_timeout: bool) -> Executable:
    limits = dict(TRANSACTION_LIMITS)
    if knows_transaction_timeout:
        limits["transaction_timeout"] = TRANSACTION_TIMEOUT
    return select(*(func.set_config(name, value, true()) for name, value in limits.items()))


@lru_cache(maxsize=256)
def _compile(statement: Executable, schema: str | None) -> tuple[str, dict[str, Any]]:
    dialect = cast("Any", PGDialect_psycopg)()
    compiled = cast("Any", statement).compile(
        dialect=dialect, schema_translate_map=_schema_map(schema), render_schema_translate=schema is not None
    )
    return str(compiled), dict(compiled.params)


def array_literal(values: Sequence[object]) -> str:
    """Return a list as PostgreSQL writes an array. psycopg does the same in several times as long.

    Takes texts, whole numbers, booleans, datetimes and None.
    https://www.postgresql.org/docs/current/arrays.html#ARRAYS-IO
    """
    literal = _joined(values)
    quotes = 2 * (len(values) - values.count(None))
    if "\\" in literal or literal.count('"') != quotes:  # few texts have anything to escape
        return _joined([_escaped(value) if isinstance(value, str) else value for value in values])
    return literal


def _joined(values: Sequence[object]) -> str:
    return "{" + ",".join(["NULL" if value is None else f'"{value}"' for value in values]) + "}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def columns(rows: Sequence[tuple[object, ...]], width: int) -> list[list[object]]:
    """Turn rows into the lists that `unnest` takes, one per column; `width` columns also without any row."""
    return [[row[i] for row in rows] for i in range(width)]

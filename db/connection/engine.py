"""Access to PostgreSQL: a pool of connections, and transactions that are retried."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any, NamedTuple, Self, TypeVar, cast

import psycopg
import structlog
import tenacity
from sqlalchemy import Connection, Dialect, Engine, create_engine, event, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import Pool

from config import Settings
from db.connection.driver import ANSWER_LIMIT_S, BoundedTimestamptzLoader, TimeoutConnection
from db.connection.errors import RACES, UTF8, is_transient, loses_connection, sqlstate, translate
from db.connection.pipeline import Pipeline, schema_map, transaction
from db.connection.pool import ReplaceablePool
from db.connection.session import LIMITS, NO_LIMITS, begin_sql
from db.connection.url import postgres_url, variable

RECYCLE_S = 240  # Neon suspends an idle compute after 5 minutes, which breaks its connections.
CONNECT_TIMEOUT_S = 5
ATTEMPTS = 6
RACE_ATTEMPTS = 3  # each attempt sees what the winner wrote
RETRIES_FOR_S = 60.0  # a problem that lasts longer is not temporary
MAX_PAUSE_S = 1.0

T = TypeVar("T")
W = TypeVar("W")
log = structlog.get_logger("db")


class PoolState(NamedTuple):
    """The pool's current numbers, and its totals since the process started."""

    size: int
    in_use: int
    overflow: int
    timeouts: int
    invalidated: int


class Database:
    """A pool of connections that runs transactions. As a context manager it is disposed of at the end."""

    def __init__(
        self,
        settings: Settings,
        *,
        unpooled: bool = False,
        attempts: int = ATTEMPTS,
        answer_limit_s: float = ANSWER_LIMIT_S,
    ) -> None:
        # A migration has no time limit.
        self.engine = _engine(settings, unpooled, answer_limit_s=None if unpooled else answer_limit_s)
        self.encoding = UTF8
        self._variable = variable(settings, unpooled=unpooled)
        self._attempts = attempts
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(is_transient),
            wait=tenacity.wait_random_exponential(multiplier=0.05, max=MAX_PAUSE_S),
            stop=self._is_last,
            before_sleep=self._log_retry,
            reraise=True,
        )
        self._counts: Counter[str] = Counter()
        event.listen(self.engine, "connect", self._connected)
        event.listen(self.engine, "invalidate", self._invalidated)
        self._renewing = Lock()

    def run(self, work: Callable[[Connection], T]) -> T:
        """Return what `work` returns, having committed it in one transaction.

        If the error may be gone within seconds, `work` is run again on a new connection, so it must be
        repeatable. Raises DatabaseUnavailable or ChangeRefused.
        """
        return self._retried(self._in_transaction, work)

    def run_pipeline(self, work: Callable[[Pipeline], T]) -> T:
        """Do the same as `run` for a `work` that sends its statements through a Pipeline."""
        return self._retried(self._in_pipeline, work)

    def ping(self) -> None:
        """Raise DatabaseUnavailable unless the database answers. Does not retry.

        Only if the pool's connection turns out to be broken, a new one is tried: the server may be back.
        """
        with self._translating():
            try:
                self._attempt(self._in_transaction, _select_one)
            except SQLAlchemyError as error:
                if not getattr(error, "connection_invalidated", False):
                    raise
                self._attempt(self._in_transaction, _select_one)

    def pool_state(self) -> PoolState:
        """Return the pool's numbers."""
        pool = cast("ReplaceablePool", self.engine.pool)
        return PoolState(
            size=pool.size(),
            in_use=pool.checkedout(),
            overflow=max(0, pool.overflow()),
            timeouts=self._counts["timeouts"],
            invalidated=self._counts["invalidated"],
        )

    def dispose(self) -> None:
        """Close every idle connection, and each one in use once it is returned."""
        with self._renewing:
            self.engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.dispose()

    @contextmanager
    def _translating(self) -> Iterator[None]:
        try:
            yield
        except PoolTimeout as error:
            self._counts["timeouts"] += 1
            log.warning("pool exhausted", **self.pool_state()._asdict())
            raise translate(error, self._variable, self.encoding) from None
        except (psycopg.Error, SQLAlchemyError) as error:
            raise translate(error, self._variable, self.encoding) from None

    def _is_last(self, state: tenacity.RetryCallState) -> bool:
        error = state.outcome.exception() if state.outcome else None
        is_race = error is not None and sqlstate(error) in RACES
        attempts = min(self._attempts, RACE_ATTEMPTS if is_race else self._attempts)
        return state.attempt_number >= attempts or (state.seconds_since_start or 0) >= RETRIES_FOR_S

    def _log_retry(self, state: tenacity.RetryCallState) -> None:
        error = cast("psycopg.Error | SQLAlchemyError", state.outcome and state.outcome.exception())
        code = sqlstate(error)
        is_race = code in RACES  # for which `translate` would blame the application
        reason = translate(error, self._variable, self.encoding)
        log.warning(
            "database retry",
            attempt=state.attempt_number,
            reason=f"perhaps a lost race (SQLSTATE {code})" if is_race else str(reason),
            pause_ms=round(state.upcoming_sleep * 1000),
        )

    def _retried(self, attempt: Callable[[W], T], work: W) -> T:
        with self._translating():
            return cast("T", self._retrying(self._attempt, attempt, work))

    def _attempt(self, attempt: Callable[[W], T], work: W) -> T:
        pool = self.engine.pool
        try:
            return attempt(work)
        except (psycopg.Error, SQLAlchemyError) as error:
            if loses_connection(error):
                self._renew(pool)
            raise

    def _in_transaction(self, work: Callable[[Connection], T]) -> T:
        with self.engine.begin() as connection:
            return work(connection)

    def _in_pipeline(self, work: Callable[[Pipeline], T]) -> T:
        with self.engine.connect() as connection:
            driver = _driver(connection)
            try:
                with transaction(driver, schema_of(connection)) as pipeline:
                    return work(pipeline)
            finally:
                if driver.closed:
                    connection.invalidate()

    def _connected(self, driver: psycopg.Connection[Any], _record: object) -> None:
        driver.rollback()  # the transaction in which SQLAlchemy read the version
        self.encoding = (driver.pgconn.parameter_status(b"server_encoding") or b"").decode() or UTF8
        pool = cast("ReplaceablePool", self.engine.pool)
        if pool.overflow() > 0:
            log.info("pool overflows", size=pool.size(), overflow=pool.overflow())

    def _invalidated(self, *_: object) -> None:
        self._counts["invalidated"] += 1
        log.info("connection invalidated")

    def _renew(self, pool: Pool) -> None:
        """Close the idle connections of `pool`: whatever broke one has most likely broken the others."""
        with self._renewing:
            if self.engine.pool is pool:  # unless another thread has replaced it already
                self.engine.dispose()


def schema_of(connection: Connection) -> str | None:
    """Return the schema that every statement on `connection` names; None where `search_path` decides."""
    schemas = connection.get_execution_options().get("schema_translate_map") or {}
    return cast("str | None", schemas.get(None))


def _driver(connection: Connection) -> psycopg.Connection[Any]:
    return cast("psycopg.Connection[Any]", connection.connection.driver_connection)


def _select_one(connection: Connection) -> None:
    connection.execute(text("SELECT 1"))


def _engine(settings: Settings, unpooled: bool, answer_limit_s: float | None) -> Engine:
    engine = create_engine(
        "postgresql+psycopg://",
        poolclass=ReplaceablePool,
        pool_size=settings.db_pool_size,
        max_overflow=settings.db_max_overflow,
        pool_timeout=settings.db_pool_timeout,
        pool_recycle=RECYCLE_S,
        pool_use_lifo=True,  # with little traffic the surplus connections become old and are recycled
        hide_parameters=True,
        execution_options={"schema_translate_map": schema_map(settings.database_schema)},
        use_native_hstore=False,  # would cost a round trip for every new connection
        connect_args={
            **postgres_url(settings, unpooled=unpooled),
            "autocommit": True,  # each transaction begins with a BEGIN of our own
            "prepare_threshold": None,  # PgBouncer may run each transaction on another server connection
            "connect_timeout": CONNECT_TIMEOUT_S,
            "application_name": "clerk-sync",
            "client_encoding": "utf8",  # overrides PGCLIENTENCODING, and poolers accept it
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
            "tcp_user_timeout": 30_000,
        },
    )

    @event.listens_for(engine, "do_connect")
    def connect(
        dialect: Dialect, _entry: object, arguments: Sequence[Any], options: dict[str, Any]
    ) -> TimeoutConnection:
        connection = TimeoutConnection.connect(*arguments, **options)
        connection.answer_limit_s = answer_limit_s
        for type_ in ("timestamptz", "timestamp"):
            connection.adapters.register_loader(type_, BoundedTimestamptzLoader)
        if getattr(dialect, "server_version_info", None) is None:
            # On the first connection SQLAlchemy reads the server's version: no default time-out may end that.
            try:
                connection.execute(begin_sql(connection.info.server_version, LIMITS).encode())
            except psycopg.Error:
                connection.close()
                raise
        return connection

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        driver = _driver(connection)
        limits = NO_LIMITS if unpooled else LIMITS
        # One round trip: without parameters psycopg sends all statements as one simple query.
        connection.exec_driver_sql(begin_sql(driver.info.server_version, limits))

    return engine

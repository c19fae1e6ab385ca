"""The settings of every transaction, so that no default affects what is stored, read or locked.

A default may come from the server, the database, the role, the URL (`options=`) or the environment (`PG*`).
Everything is set inside the transaction and ends with it, because PgBouncer in transaction mode refuses
connection options and may run each transaction in another session. `docs/database.md` lists every client
setting and how it is treated.
"""

from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, case, func, select, true
from sqlalchemy.dialects import postgresql

BEGIN = "BEGIN ISOLATION LEVEL READ COMMITTED READ WRITE NOT DEFERRABLE"
# Before the settings: where `jit_above_cost` is low, compiling that statement takes longer than a default of
# `statement_timeout` may allow. SET is never compiled.
NO_JIT = "SET LOCAL jit = off"
SETTINGS = {
    "DateStyle": "ISO, MDY",  # the driver reads no other
    "IntervalStyle": "postgres",
    "TimeZone": "UTC",
    "standard_conforming_strings": "on",
    "array_nulls": "on",
    "extra_float_digits": "1",
    "row_security": "off",  # raises an error instead of leaving out rows silently
    "exit_on_error": "off",
}
# For a transaction that applies a batch. The locks of a frozen process must be released while it is frozen:
# other transactions wait for them, at most 30 s.
BATCH_LIMITS = {
    "lock_timeout": "2s",
    "statement_timeout": "15s",  # before transaction_timeout, which ends the connection
    "idle_in_transaction_session_timeout": "10s",
    "transaction_timeout": "20s",  # also counts the time between statements
    # A batch finds its few rows by index. By the default costs PostgreSQL would read the whole table of
    # some ten thousand rows, for every batch.
    "enable_seqscan": "off",
}
LIMITS = {
    "lock_timeout": "10s",
    "statement_timeout": "30s",
    "idle_in_transaction_session_timeout": "30s",
    "transaction_timeout": "0",
}
NO_LIMITS = dict.fromkeys(LIMITS, "0")  # for migrations
TRANSACTION_TIMEOUT_SINCE = 170_000  # https://www.postgresql.org/docs/17/release-17.html


def begin_sql(server_version: int, limits: dict[str, str]) -> str:
    """Return the statements that begin a transaction with all settings, to be sent as one simple query."""
    return f"{BEGIN}; {NO_JIT}; {settings_sql(server_version, limits)}"


def settings_sql(server_version: int, limits: dict[str, str]) -> str:
    """Return the statement that makes all settings for the transaction; it has no parameters."""
    known = server_version >= TRANSACTION_TIMEOUT_SINCE
    return _settings_sql(
        tuple((name, value) for name, value in limits.items() if known or name != "transaction_timeout")
    )


@cache
def _settings_sql(limits: tuple[tuple[str, str], ...]) -> str:
    chosen = {"synchronous_commit": _synchronous_commit(), "search_path": _search_path()}
    values: dict[str, Any] = {**chosen, **SETTINGS, **dict(limits)}
    statement = select(*(func.set_config(name, value, true()) for name, value in values.items()))
    dialect: Any = postgresql.dialect()
    return str(statement.compile(dialect=dialect, compile_kwargs={"literal_binds": True}))


def _search_path() -> ColumnElement[str]:
    """Return the search_path with temporary tables last; else PostgreSQL looks for a table among them first.

    Another client of the same pooler may have left a temporary table `users` in the session. A search_path
    without any schema stays so: migrations would create temporary tables.
    """
    now = func.current_setting("search_path")
    return case((func.current_schema().is_(None), now), else_=now + ", pg_temp")


def _synchronous_commit() -> ColumnElement[str]:
    """Return `on`, which waits for the disk; `remote_apply`, which also waits for a standby, is kept."""
    now = func.current_setting("synchronous_commit")
    return case((now == "remote_apply", "remote_apply"), else_="on")

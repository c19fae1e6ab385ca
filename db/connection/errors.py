"""What PostgreSQL can answer instead of doing the work, and whether waiting helps.

    DatabaseError
    ├── DatabaseUnavailable   the deployment's trouble: no connection, no table, no space, read-only, …
    └── ChangeRefused         the change's own fault: SQLSTATE class 22 or 23, and no retry cured it

A message is built from the SQLSTATE and the constraint's name alone: PostgreSQL's own text prints the values
of the row (its DETAIL line), and SQLAlchemy's the parameters.
"""

import psycopg
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

DATA_CLASSES = ("22", "23")
UNIQUE_VIOLATION = "23505"
# Connection exceptions, transaction rollbacks, too many connections, lock not available, cancelled or shut
# down: https://www.postgresql.org/docs/current/errcodes-appendix.html
TRANSIENT = (
    "08",
    "25P03",
    "25P04",
    "40",
    "53300",
    "55P03",
    "57014",
    "57P01",
    "57P02",
    "57P03",
    "57P05",
    UNIQUE_VIOLATION,
)


class DatabaseError(Exception):
    """PostgreSQL did not do the work. `retryable` says whether waiting can help."""

    retryable: bool


class DatabaseUnavailable(DatabaseError):
    """The database cannot take any change now; the change itself is not at fault."""

    retryable = True


class ChangeRefused(DatabaseError):
    """The database does not take this change. Only a unique violation may still heal: it is a lost race."""

    def __init__(self, message: str, *, retryable: bool) -> None:
        super().__init__(message)
        self.retryable = retryable


def sqlstate(error: BaseException) -> str | None:
    """Return the SQLSTATE of an error of psycopg or SQLAlchemy; None when the server sent none."""
    cause = _cause(error)
    return cause.sqlstate if isinstance(cause, psycopg.Error) else None


def is_transient(error: BaseException) -> bool:
    """Say whether the same work may well succeed on a fresh connection within seconds.

    A unique violation counts: it is what a race with another transaction looks like, and the next attempt
    sees the winner's row.
    """
    state = sqlstate(error)
    if state is not None:
        return state.startswith(TRANSIENT)
    return isinstance(_cause(error), psycopg.OperationalError | psycopg.InterfaceError)


def loses_connection(error: BaseException) -> bool:
    """Say whether the connection that raised `error` is gone, and most likely its siblings in the pool."""
    state = sqlstate(error)
    return is_transient(error) if state is None else state.startswith(("08", "25P03", "25P04", "57P0"))


def translate(error: psycopg.Error | SQLAlchemyError, variable: str = "DATABASE_URL") -> DatabaseError:
    """Return our error for one of the driver's, without the values that the driver's text holds.

    `variable` names where the database is.
    """
    if isinstance(error, PoolTimeout):
        return DatabaseUnavailable("every connection of the pool is in use (DB_POOL_SIZE, DB_MAX_OVERFLOW)")
    state = sqlstate(error)
    if state is None and isinstance(_cause(error), psycopg.DataError):
        # The driver's own: a NUL in a text, or a stored date beyond the year 9999.
        return ChangeRefused("the change holds or meets a value that cannot be represented", retryable=False)
    if state is None:
        return DatabaseUnavailable(f"no connection to the database ({variable})")
    what = f"{_name(state)} (SQLSTATE {state}{_constraint(error)})"
    if state.startswith(DATA_CLASSES):
        message = f"the database refused the change: {what}"
        return ChangeRefused(message, retryable=state == UNIQUE_VIOLATION)
    return DatabaseUnavailable(f"the database cannot take changes now: {what}")


def _cause(error: BaseException) -> BaseException | None:
    return error.orig if isinstance(error, DBAPIError) else error


def _name(state: str) -> str:
    try:
        return psycopg.errors.lookup(state).__name__
    except KeyError:
        return "error"


def _constraint(error: BaseException) -> str:
    cause = _cause(error)
    name = cause.diag.constraint_name if isinstance(cause, psycopg.Error) else None
    return f", constraint {name}" if name else ""

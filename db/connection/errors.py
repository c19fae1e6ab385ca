"""The errors of PostgreSQL, and whether waiting helps.

    DatabaseError
    ├── DatabaseUnavailable   a problem of the deployment: no connection, table or space, read-only, …
    └── ChangeRefused         the change is at fault, or the application's trigger, rule or policy refuses it

A message consists only of the SQLSTATE, the cause and the constraint's name: PostgreSQL's own text contains
the values of the row (DETAIL line), and SQLAlchemy's contains the parameters.
"""

import psycopg
from psycopg.errors import Diagnostic
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from config import ServiceError
from db.connection.causes import Cause, cause_of, is_of_trigger

DATA_CLASSES = ("22", "23")
# Raised by code of the application: PL/pgSQL, triggers, foreign routines and check options.
APPLICATION_CLASSES = ("P0", "09", "27", "38", "39", "44")
UNIQUE_VIOLATION = "23505"
LOCK_NOT_AVAILABLE = "55P03"
# PostgreSQL raises it for a negative LIMIT alone, which `db.apply.statements` computes when rows are missing.
ROWS_MISSING = "2201W"
# Possibly a lost race: the next attempt sees what the other transaction wrote.
RACES = (UNIQUE_VIOLATION, ROWS_MISSING)
# Connection exceptions, transaction rollbacks, too many connections, shut down:
# https://www.postgresql.org/docs/current/errcodes-appendix.html
TRANSIENT = ("08", "25P03", "25P04", "40", "53300", "57P01", "57P02", "57P03", "57P05", *RACES)
# Another transaction or a slow trigger delays the statement, perhaps for one row only.
DELAYS = ("40", LOCK_NOT_AVAILABLE, "57014")
# Never caused by one row, unless the cause is REFUSED: no connection, read-only, out of resources, shut down.
DEPLOYMENT_CLASSES = ("08", "25", "28", "3D", "53", "57P", "58")
UNREPRESENTABLE = ("22021", "22P05")
UTF8 = "UTF8"


class DatabaseError(ServiceError):
    """PostgreSQL did not do the work."""


class DatabaseUnavailable(DatabaseError):
    """The database cannot take changes now. `cause` says why; `state` is the SQLSTATE, None without one."""

    retryable = True

    def __init__(self, message: str, cause: Cause = Cause.NO_CONNECTION, state: str | None = None) -> None:
        super().__init__(message)
        self.cause = cause
        self.state = state

    @property
    def is_delay(self) -> bool:
        """Whether a lock or a slow statement is the cause, so that it ends by itself."""
        return self.state is not None and self.state.startswith(DELAYS)

    @property
    def may_concern_one_row(self) -> bool:
        """Whether the server sent the error, the connection is intact, and other changes may succeed."""
        is_refused = self.cause is Cause.REFUSED
        return self.state is not None and (is_refused or not self.state.startswith(DEPLOYMENT_CLASSES))


class ChangeRefused(DatabaseError):
    """The database refuses this change. Retries may help against a race or a trigger's refusal.

    `constraint` is the name of the one that is violated, None without one.
    """

    def __init__(self, message: str, *, retryable: bool, constraint: str | None = None) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.constraint = constraint


def sqlstate(error: BaseException) -> str | None:
    """Return the SQLSTATE of an error of psycopg or SQLAlchemy; None when the server sent none."""
    cause = _driver_error(error)
    return cause.sqlstate if cause else None


def is_transient(error: BaseException) -> bool:
    """Say whether the same work may succeed on a new connection within seconds.

    A race counts: the next attempt sees the winner's row.
    """
    cause = _driver_error(error)
    if cause is None or cause.sqlstate is None:
        return isinstance(cause, psycopg.OperationalError | psycopg.InterfaceError)
    return cause.sqlstate.startswith(TRANSIENT) and not is_of_trigger(cause)


def loses_connection(error: BaseException) -> bool:
    """Say whether the connection that raised `error` is of no use now, and most likely the rest of the pool.

    No connection to a replica is kept: the same host may lead to the new primary by now.
    """
    cause = _driver_error(error)
    if cause is None or cause.sqlstate is None:
        return is_transient(error)
    if is_of_trigger(cause):
        return False
    return cause.sqlstate.startswith(("08", "25P03", "25P04", "57P0")) or cause_of(cause) is Cause.READ_ONLY


def translate(
    error: psycopg.Error | SQLAlchemyError, variable: str = "DATABASE_URL", encoding: str = UTF8
) -> DatabaseError:
    """Return a DatabaseError for an error of the driver, without the values in the driver's text.

    `variable` is the environment variable with the URL, `encoding` the database's encoding.
    """
    if isinstance(error, PoolTimeout):
        return unavailable("no connection is free", Cause.POOL_EXHAUSTED)
    cause = _driver_error(error)
    if cause is None or cause.sqlstate is None:
        if isinstance(cause, psycopg.DataError):  # of the driver: a NUL in a text, or a date beyond 9999
            text = "the change holds or meets a value that cannot be represented"
            return ChangeRefused(text, retryable=False)
        return unavailable(f"no connection to the database ({variable})", cause_of(cause or error))
    state = cause.sqlstate
    what = f"{_name(state)} (SQLSTATE {state}{_place(cause.diag)})"
    if state.startswith((*DATA_CLASSES, *APPLICATION_CLASSES)):
        return _refused(state, what, encoding, cause.diag.constraint_name)
    return unavailable(f"the database cannot take changes now: {what}", cause_of(cause), state)


def unavailable(what: str, cause: Cause, state: str | None = None) -> DatabaseUnavailable:
    """Return the error for a cause; its text is `what` happened, the cause's sentence and its next step."""
    return DatabaseUnavailable(f"{what}: {cause.sentence}; {cause.next_step}", cause, state)


def _refused(state: str, what: str, encoding: str, constraint: str | None) -> ChangeRefused:
    if state == ROWS_MISSING:
        what = "not every row was written: a trigger, rule or policy of the application suppresses it"
    elif state.startswith(APPLICATION_CLASSES):
        what = f"a trigger, rule or policy of the application raised {what}"
    elif encoding != UTF8 and state.startswith(UNREPRESENTABLE):
        what = f"{what}: the database's encoding {encoding} has no such character"
    is_passing = state in RACES or state.startswith(APPLICATION_CLASSES)
    message = f"the database refused the change: {what}"
    return ChangeRefused(message, retryable=is_passing, constraint=constraint)


def _driver_error(error: BaseException) -> psycopg.Error | None:
    cause = error.orig if isinstance(error, DBAPIError) else error
    return cause if isinstance(cause, psycopg.Error) else None


def _name(state: str) -> str:
    try:
        return psycopg.errors.lookup(state).__name__
    except KeyError:
        return "error"


def _place(diagnostic: Diagnostic) -> str:
    if diagnostic.constraint_name:
        return f", constraint {diagnostic.constraint_name}"
    return f", column {diagnostic.column_name}" if diagnostic.column_name else ""

"""Statements sent together: one round trip for all of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

import orjson
import psycopg
from sqlalchemy import Executable
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

from db.connection.session import BATCH_LIMITS, BEGIN, NO_JIT, settings_sql


class Pipeline:
    """Sends statements without waiting for the answers to earlier ones: one round trip for all of them.

    PostgreSQL still runs them one after the other, and each sees what was committed when it started.
    https://www.psycopg.org/psycopg3/docs/advanced/pipeline.html
    """

    def __init__(self, driver: psycopg.Connection[Any], sent: psycopg.Pipeline, schema: str | None) -> None:
        self._driver = driver
        self._sent = sent
        self._schema = schema

    def send(self, statement: Executable, **parameters: object) -> psycopg.Cursor[Any]:
        """Queue `statement`. Reading from the cursor waits for its answer and the answers before it."""
        sql, defaults = _compile(statement, self._schema)
        values = {
            name: array_literal(value) if isinstance(value, list | tuple) else value
            for name, value in parameters.items()
        }
        return self._driver.cursor().execute(cast("Any", sql), {**defaults, **values})

    def send_rows(self, statement: Executable, rows: Sequence[tuple[object, ...]]) -> None:
        """Queue a statement that reads `rows` from arrays called c0, c1 and so on, unless there are none."""
        if rows:
            columns = enumerate(zip(*rows, strict=True))
            self.send(statement, **{f"c{i}": column for i, column in columns})

    def send_ids(self, statement: Executable, ids: Sequence[str]) -> None:
        """Queue a statement that concerns `ids`, unless there are none."""
        if ids:
            self.send(statement, ids=ids)

    def send_no_rows(self, statement: Executable) -> None:
        """Queue `statement` with an empty array for each of its parameters."""
        names = (name for name, value in _compile(statement, self._schema)[1].items() if value is None)
        self.send(statement, **{name: [] for name in names})

    def wait(self) -> None:
        """Wait for all answers. Call this before reading while locks are held.

        Without it PostgreSQL would expect further statements, and none of its time limits would end the
        transaction if this process were frozen now.
        """
        self._sent.sync()


@contextmanager
def transaction(driver: psycopg.Connection[Any], schema: str | None) -> Iterator[Pipeline]:
    """Open a transaction and a Pipeline in it, with the limits of a batch; commit at the end.

    `driver` is in autocommit mode: psycopg waits for the answers to a BEGIN and a COMMIT of its own.
    """
    try:
        with driver.pipeline() as sent:
            driver.execute(BEGIN)
            driver.execute(NO_JIT)
            driver.execute(cast("Any", settings_sql(driver.info.server_version, BATCH_LIMITS)))
            yield Pipeline(driver, sent, schema)
            driver.execute("COMMIT")
    finally:
        if not driver.closed:
            driver.rollback()


def schema_map(schema: str | None) -> dict[str | None, str] | None:
    """Return SQLAlchemy's schema_translate_map for statements that name `schema`."""
    return None if schema is None else {None: schema}


@lru_cache(maxsize=256)
def _compile(statement: Executable, schema: str | None) -> tuple[str, dict[str, Any]]:
    dialect = cast("Any", PGDialect_psycopg)()
    compiled = cast("Any", statement).compile(
        dialect=dialect, schema_translate_map=schema_map(schema), render_schema_translate=schema is not None
    )
    return str(compiled), dict(compiled.params)


def array_literal(values: Sequence[object]) -> str:
    r"""Return values as PostgreSQL writes an array: texts, whole numbers, booleans, datetimes and None.

    It is their JSON in other brackets, unless a text contains a character that JSON writes as a letter (\n).
    https://www.postgresql.org/docs/current/arrays.html#ARRAYS-IO
    """
    json = orjson.dumps(values).decode()
    if "\\" in json.replace(r"\\", "").replace(r"\"", ""):
        return "{" + ",".join("NULL" if value is None else f'"{_escaped(value)}"' for value in values) + "}"
    return "{" + json[1:-1] + "}"


def _escaped(value: object) -> str:
    return str(value).replace("\\", r"\\").replace('"', r"\"")

"""Lists the transactions that hold locks on the tables of this service, and ends one."""

from typing import NamedTuple

import sqlalchemy as sa

from db.connection.engine import Database, schema_of
from db.schema import NAMESPACES, RELATIONS, TABLES

LOCKS = sa.table(
    "pg_locks",
    *(sa.column(name) for name in ("pid", "database", "relation", "mode", "granted")),
    schema="pg_catalog",
)
ACTIVITY = sa.table(
    "pg_stat_activity",
    *(sa.column(name) for name in ("pid", "datid", "application_name", "state", "xact_start")),
    schema="pg_catalog",
)
READS = "AccessShareLock"  # the lock of a SELECT


class Holder(NamedTuple):
    """A transaction that holds locks on `tables`; it only reads them unless `writes`.

    `program` is its application_name, "" without one. `state` and `open_s` are None if the role may not see
    them. `waits_for` are the pids of the transactions that it waits for.
    """

    pid: int
    program: str
    state: str | None
    open_s: float | None
    tables: list[str]
    writes: bool
    waits_for: list[int]


def holders(database: Database) -> list[Holder]:
    """Return the transactions that hold locks on these tables, the oldest first. Raises DatabaseError."""
    age = sa.cast(sa.extract("epoch", sa.func.clock_timestamp() - ACTIVITY.c.xact_start), sa.Float)
    name = sa.cast(RELATIONS.c.relname, sa.String)

    def look(connection: sa.Connection) -> list[Holder]:
        query = (
            sa.select(
                ACTIVITY.c.pid,
                ACTIVITY.c.application_name,
                ACTIVITY.c.state,
                age,
                sa.func.array_agg(name.distinct(), type_=sa.ARRAY(sa.String())),
                sa.func.bool_or(LOCKS.c.mode != READS),
                sa.func.pg_blocking_pids(ACTIVITY.c.pid, type_=sa.ARRAY(sa.Integer())),
            )
            .join(LOCKS, LOCKS.c.pid == ACTIVITY.c.pid)
            .join(RELATIONS, RELATIONS.c.oid == LOCKS.c.relation)
            .join(NAMESPACES, NAMESPACES.c.oid == RELATIONS.c.relnamespace)
            .where(
                LOCKS.c.granted,
                LOCKS.c.database == ACTIVITY.c.datid,
                NAMESPACES.c.nspname == (schema_of(connection) or sa.func.current_schema()),
                RELATIONS.c.relname.in_(TABLES),
                ACTIVITY.c.pid != sa.func.pg_backend_pid(),
            )
            .group_by(*(ACTIVITY.c[name] for name in ("pid", "application_name", "state", "xact_start")))
            .order_by(ACTIVITY.c.xact_start, ACTIVITY.c.pid)
        )
        return [Holder(*row) for row in connection.execute(query)]

    return database.run(look)


def end(database: Database, pid: int) -> bool:
    """End the session with that pid, which rolls its transaction back; return whether it existed.

    Raises DatabaseUnavailable, also if the role has no right to do that.
    """
    query = sa.select(sa.func.pg_terminate_backend(pid))
    return database.run(lambda connection: bool(connection.scalar(query)))

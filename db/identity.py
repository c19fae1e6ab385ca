"""The database that a URL leads to: its clock, and whether two URLs lead to the same tables."""

import secrets
from datetime import datetime

from sqlalchemy import BigInteger, Connection, func, literal, select

from db.connection.engine import Database, schema_of
from db.models import TIMESTAMPTZ, UserSync

KEY_BITS = 62


def clock(database: Database) -> datetime:
    """Return the database's current time. Raises DatabaseError."""
    query = select(func.clock_timestamp(type_=TIMESTAMPTZ))
    return database.run(lambda connection: connection.execute(query).scalar_one())


def leads_to_same_tables(database: Database, other: Database) -> bool:
    """Say whether both lead to the same table in the same database. Raises DatabaseError.

    A transaction on the first takes an advisory lock. If the second cannot get that lock, both are the same
    database. This works through a pooler and needs no rights. Names and ids would not do: a copy of a
    database, such as a branch of Neon, has the same ones.
    """
    key = literal(secrets.randbits(KEY_BITS), BigInteger)

    def held(connection: Connection) -> bool:
        table = _table(connection)
        connection.execute(select(func.pg_advisory_xact_lock(key)))
        is_free = select(func.pg_try_advisory_xact_lock(key))
        return other.run(lambda another: _table(another) == table and not another.scalar(is_free))

    return database.run(held)


def _table(connection: Connection) -> object:
    schema = schema_of(connection)
    name = UserSync.__tablename__ if schema is None else f'"{schema}".{UserSync.__tablename__}'
    return connection.scalar(select(func.to_regclass(name).cast(BigInteger)))

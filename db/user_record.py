"""Everything that the tables contain about one user, whatever the columns. Reads only."""

from typing import Any, NamedTuple

from sqlalchemy import Connection, FromClause, Select, select

from db.connection.engine import Database
from db.models import MembershipSync, OrganizationSync, User, UserProfile, UserSync

Row = dict[str, Any]


class UserRecord(NamedTuple):
    """One user's stored rows, by column; None or empty if there is none.

    `claims` are the other users' rows of `user_sync` that claim the same address, without it.
    """

    clerk_id: str
    row: Row | None
    sync: Row | None
    claims: list[Row]
    profile: Row | None
    memberships: list[Row]


def user_record(database: Database, clerk_id: str) -> UserRecord:
    """Return the rows of one user. Raises DatabaseError."""
    return database.run(lambda connection: _read(connection, clerk_id))


def _read(connection: Connection, clerk_id: str) -> UserRecord:
    sync = _one(connection, UserSync.__table__, clerk_id)
    return UserRecord(
        clerk_id,
        _one(connection, User.__table__, clerk_id),
        sync,
        _all(connection, _claims(clerk_id, sync["claimed_email"])) if sync and sync["claimed_email"] else [],
        _one(connection, UserProfile.__table__, clerk_id),
        _all(connection, _memberships(clerk_id)),
    )


def _claims(clerk_id: str, address: str) -> Select[Any]:
    columns = [column for column in UserSync.__table__.columns if column.name.startswith("claim_")]
    return select(UserSync.clerk_id, *columns).where(
        UserSync.claimed_email == address, UserSync.clerk_id != clerk_id
    )


def _memberships(clerk_id: str) -> Select[Any]:
    columns = [column for column in MembershipSync.__table__.columns if column.name != "clerk_id"]
    return (
        select(*columns, OrganizationSync.name)
        .select_from(MembershipSync)
        .outerjoin(OrganizationSync, OrganizationSync.id == MembershipSync.organization_id)
        .where(MembershipSync.clerk_id == clerk_id)
        .order_by(MembershipSync.joined_at)
    )


def _one(connection: Connection, table: FromClause, clerk_id: str) -> Row | None:
    return next(iter(_all(connection, select(table).where(table.c.clerk_id == clerk_id))), None)


def _all(connection: Connection, query: Select[Any]) -> list[Row]:
    return [dict(row) for row in connection.execute(query).mappings()]

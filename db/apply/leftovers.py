"""Finds and removes rows that changed settings have left behind."""

from typing import Any, NamedTuple

from sqlalchemy import delete, func, select

from db.connection.engine import Database
from db.merge.policy import Policy
from db.models import MembershipSync, OrganizationSync, User, UserProfile, UserSync


class Leftovers(NamedTuple):
    """Rows that the settings no longer keep: of deleted users (their ids), `user_profiles`, members."""

    users: tuple[str, ...] = ()
    profiles: int = 0
    memberships: int = 0

    @property
    def total(self) -> int:
        """The number of these rows."""
        return len(self.users) + self.profiles + self.memberships


def find(database: Database, policy: Policy) -> Leftovers:
    """Return the rows that other settings have left behind. Raises DatabaseError."""
    return Leftovers(
        () if policy.anonymize else _deleted_users(database),
        0 if policy.keeps_fields else _count(database, UserProfile),
        0 if policy.follows_memberships else _count(database, MembershipSync),
    )


def remove(database: Database, policy: Policy) -> None:
    """Empty the tables that the settings no longer use; rows of `users` stay. Raises DatabaseError."""
    models: list[Any] = [] if policy.keeps_fields else [UserProfile]
    models += [] if policy.follows_memberships else [MembershipSync, OrganizationSync]
    database.run(lambda connection: [connection.execute(delete(model)) for model in models])


def _deleted_users(database: Database) -> tuple[str, ...]:
    query = (
        select(User.clerk_id)
        .join(UserSync, UserSync.clerk_id == User.clerk_id)
        .where(UserSync.deleted_at.is_not(None))
    )
    return database.run(lambda connection: tuple(connection.scalars(query)))


def _count(database: Database, model: Any) -> int:
    query = select(func.count()).select_from(model)
    return database.run(lambda connection: connection.scalars(query).one())

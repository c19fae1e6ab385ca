"""The Clerk instances that have written to these tables, and the users that belong to one of them."""

from collections.abc import Sequence

from sqlalchemy import select

from db.connection.engine import Database
from db.models import InstanceSync, UserSync

MANY = 10


def seen(database: Database) -> list[str]:
    """Return the ids of the instances that have ever written, oldest first, at most MANY.

    There should be one: use a separate schema for each instance.
    """
    query = select(InstanceSync.id).order_by(InstanceSync.first_seen_at, InstanceSync.id).limit(MANY)
    return database.run(lambda connection: list(connection.scalars(query)))


def of_instance(database: Database, clerk_ids: Sequence[str], instance_id: str | None) -> set[str]:
    """Return those of the users whose absence from `instance_id` proves that they were deleted.

    These are the users whom this instance reported last. A user of an unknown instance counts as one of them
    only while no second instance has ever been seen.
    """
    query = select(UserSync.clerk_id, UserSync.instance_id).where(
        UserSync.clerk_id.in_(clerk_ids), UserSync.instance_id.is_not(None)
    )
    known = dict(database.run(lambda connection: connection.execute(query).all()))
    is_alone = len({*seen(database), *([instance_id] if instance_id else [])}) < 2
    return {
        clerk_id
        for clerk_id in clerk_ids
        if (known[clerk_id] == instance_id if clerk_id in known else is_alone)
    }

"""Gives placeholder addresses back to their users: the application may have written one into another row."""

from sqlalchemy import Connection, bindparam, func, select, update

from db.connection.engine import Database
from db.merge.change import PLACEHOLDER_DOMAIN, placeholder_address
from db.models import User


def free(database: Database) -> bool:
    """Give each row that holds another user's placeholder its own; return whether there was such a row."""
    return database.run(_free)


def _free(connection: Connection) -> bool:
    at_domain = f"@{PLACEHOLDER_DOMAIN}"
    found = (
        select(User.clerk_id, User.email)
        .where(User.email.endswith(at_domain), User.email != User.clerk_id + at_domain)
        .order_by(User.clerk_id.collate("C"))
        .with_for_update(key_share=True)
    )
    wrong = [
        row.clerk_id for row in connection.execute(found) if row.email != placeholder_address(row.clerk_id)
    ]
    if wrong:
        # Two rows may hold each other's placeholders, so first all of them give theirs up.
        parked = func.concat(func.gen_random_uuid(), at_domain)
        connection.execute(update(User).where(User.clerk_id.in_(wrong)).values(email=parked))
        own = [{"holder": clerk_id, "address": placeholder_address(clerk_id)} for clerk_id in wrong]
        set_own = update(User).where(User.clerk_id == bindparam("holder")).values(email=bindparam("address"))
        connection.execute(set_own, own)
    return bool(wrong)

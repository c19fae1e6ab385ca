"""Compares the stored users with Clerk's API. Reads only."""

from collections.abc import Callable, Iterator, Sequence
from enum import StrEnum
from typing import Any, NamedTuple, TypeVar

import orjson
from sqlalchemy import ARRAY, String, bindparam, cast, exists, func, select

from db.apply.profiles import stored_profile
from db.apply.statements import PROFILE_ROW, USER_ROW
from db.connection.engine import Database
from db.merge.change import UserChange, placeholder_address
from db.merge.policy import Policy
from db.merge.rows import StoredUser, SyncRow, UserRow
from db.models import User, UserProfile, UserSync
from db.times import to_ms

IDS_AT_A_TIME = 5000

HAS_TOMBSTONE = exists().where(UserSync.clerk_id == User.clerk_id, UserSync.deleted_at.is_not(None))
_living = select(User.clerk_id).where(~HAS_TOMBSTONE)
_ids = func.unnest(bindparam("ids", type_=ARRAY(String())))
_wanted = _ids.table_valued("clerk_id").render_derived()
# The rows of each of `ids` in `user_sync`, `users` and `user_profiles`, or nulls.
_all_rows = select(_wanted.c.clerk_id, *UserSync.__table__.columns, *USER_ROW, *PROFILE_ROW).select_from(
    _wanted.outerjoin(UserSync, UserSync.clerk_id == _wanted.c.clerk_id)
    .outerjoin(User, User.clerk_id == _wanted.c.clerk_id)
    .outerjoin(UserProfile, UserProfile.clerk_id == _wanted.c.clerk_id)
)

T = TypeVar("T")


class Kind(StrEnum):
    """How a stored user can differ from the user in Clerk."""

    MISSING = "missing"  # no row
    STALE = "stale"  # other columns
    CLAIM = "claim"  # the address claimed here is the same, but another user has it
    TOMBSTONE = "tombstone"  # deleted here, but not in Clerk


class Difference(NamedTuple):
    """A user who differs; `columns` are the columns that differ, if known."""

    kind: Kind
    clerk_id: str
    columns: tuple[str, ...] = ()


def read(database: Database, clerk_ids: Sequence[str]) -> dict[str, StoredUser]:
    """Return the stored state of each of those users, read in one statement."""
    rows = database.run_pipeline(lambda pipeline: pipeline.send(_all_rows, ids=list(clerk_ids)).fetchall())
    width = len(SyncRow._fields)
    return {
        clerk_id: StoredUser(
            _row(SyncRow, row[:width]), _row(UserRow, row[width:-3]), _row(stored_profile, row[-3:])
        )
        for clerk_id, *row in rows
    }


def compare(change: UserChange, stored: StoredUser, policy: Policy) -> list[Difference]:
    """Return how a user that Clerk shows as `change` differs from what is stored. Pure.

    A later login here is no difference: Clerk does not count every login that is recorded here.
    """
    if stored.is_deleted:
        return [Difference(Kind.TOMBSTONE, change.clerk_id)]
    if stored.user is None:
        return [Difference(Kind.MISSING, change.clerk_id)]
    is_kept_from = _is_kept_from(change, stored.sync, stored.user)
    columns = (
        *_columns(change, stored.user, policy, compares_email=not is_kept_from),
        *_fields(change, stored),
    )
    # An unverified claim may lose rightly; if the holder's claim is out of date, the holder differs too.
    is_verified = change.email is not None and change.email.verified
    return [
        *([Difference(Kind.STALE, change.clerk_id, columns)] if columns else []),
        *([Difference(Kind.CLAIM, change.clerk_id)] if is_kept_from and is_verified else []),
    ]


def holder(database: Database, address: str | None) -> str | None:
    """Return the user who has that address here, None if there is none."""
    query = select(User.clerk_id).where(User.email == address)
    return database.run(lambda connection: connection.scalar(query)) if address else None


def living_ids(database: Database) -> Iterator[list[str]]:
    """Yield the ids of all users who have a row and no tombstone, thousands at a time."""
    after = ""
    while ids := _living_ids(database, after):
        yield ids
        after = ids[-1]


def some_ids(database: Database, count: int) -> list[str]:
    """Return up to `count` ids of users with a row and no tombstone: half the smallest, half the greatest.

    Clerk's ids begin with the time, so these are the oldest and the newest users.
    """
    first, last = (
        _living.order_by(order).limit(count // 2) for order in (User.clerk_id.asc(), User.clerk_id.desc())
    )
    found = database.run(
        lambda connection: [*connection.scalars(first).all(), *connection.scalars(last).all()]
    )
    return list(dict.fromkeys(found))


def find(database: Database, clerk_id: str) -> dict[str, Any] | None:
    """Return the row of a user, by column; None if there is none, or the user was deleted."""
    query = select(cast(User.id, String).label("id"), *USER_ROW).where(
        User.clerk_id == clerk_id, ~HAS_TOMBSTONE
    )
    row = database.run(lambda connection: connection.execute(query).mappings().one_or_none())
    return None if row is None else dict(row)


def _is_kept_from(change: UserChange, sync: SyncRow | None, user: UserRow) -> bool:
    address = change.email.address if change.email else None
    claimed = sync.claimed_email if sync else None
    return address is not None and address == claimed and user.email == placeholder_address(user.clerk_id)


def _columns(change: UserChange, user: UserRow, policy: Policy, *, compares_email: bool) -> Iterator[str]:
    profile, claim, login_at = change.profile, change.email, change.login_at
    address = (claim and claim.address) or placeholder_address(change.clerk_id)
    if claim is not None and compares_email and user.email != address:
        yield "email"
    if profile is not None:
        if user.name != profile.name:
            yield "name"
        if policy.owns_organization and user.organization != profile.organization:
            yield "organization"
        if policy.owns_role and user.role != profile.role:
            yield "role"
        if to_ms(user.created_at) != profile.created_at:
            yield "created_at"
    if login_at is not None and (user.last_login_at is None or to_ms(user.last_login_at) < login_at):
        yield "last_login_at"


def _fields(change: UserChange, stored: StoredUser) -> list[str]:
    """Return the fields of the profile that differ."""
    if change.profile is None or change.profile.fields is None:
        return []
    shown = orjson.loads(change.profile.fields)
    kept = orjson.loads(stored.profile.profile) if stored.profile else {}
    return sorted(
        key for key in {*shown, *kept} if key not in shown or key not in kept or shown[key] != kept[key]
    )


def _living_ids(database: Database, after: str) -> list[str]:
    query = _living.where(User.clerk_id > after).order_by(User.clerk_id).limit(IDS_AT_A_TIME)
    return database.run(lambda connection: list(connection.scalars(query)))


def _row(kind: Callable[..., T], values: Sequence[Any]) -> T | None:
    return None if values[0] is None else kind(*values)

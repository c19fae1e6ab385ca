"""The statements of the apply.

Each takes a whole batch as arrays, one per column, so that their number does not grow with the batch
(`Pipeline.send_rows`).
"""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Executable,
    String,
    Text,
    and_,
    any_,
    bindparam,
    case,
    cast,
    column,
    delete,
    false,
    func,
    insert,
    literal_column,
    not_,
    select,
    text,
    true,
    union,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.sql.selectable import LateralFromClause, TableValuedAlias
from sqlalchemy.types import TypeEngine

from db.merge.policy import Policy
from db.merge.rows import SyncRow, UserRow
from db.models import (
    InstanceSync,
    MembershipSync,
    OrganizationSync,
    User,
    UserProfile,
    UserSync,
    WebhookEvent,
)

# Any two integers work, as long as no other code in the database uses the same first key for advisory locks.
ADDRESS_LOCK = 0x636C6572
ORGANIZATION_LOCK = 0x636C656F
WAIT_BRIEFLY = text("SET LOCAL lock_timeout = '200ms'")


def writes(policy: Policy) -> tuple[Executable, ...]:
    """Return the statements that an apply may write or check with; of updates of `users`, the widest."""
    always = (ADD_SYNC_ROWS, SET_EMAILS, UPDATE_SYNC_ROWS, DELETE_MEMBERSHIPS, DELETE_PROFILES)
    deleting = () if policy.anonymize else (DELETE_USERS,)
    column = SET_ORGANIZATIONS[policy.organization_value]
    members = (WRITE_ORGANIZATIONS, WRITE_MEMBERSHIPS, REQUIRE_MEMBERSHIPS, column)
    following = members if policy.follows_memberships else ()
    keeping = (WRITE_PROFILES, REQUIRE_PROFILES) if policy.keeps_fields else ()
    targets = {policy.left_alone, *([()] if policy.anonymize else [])}
    users = (write(left_alone) for left_alone in targets for write in (update_users, insert_users))
    recording = (REQUIRE_WRITTEN, REQUIRE_DELETED, ADD_INSTANCES, RECORD_EVENTS, REQUIRE_RECORDED)
    return (*always, *users, *deleting, *following, *keeping, *recording)


def organization_joined_last(clerk_id: ColumnElement[str], value: str) -> LateralFromClause:
    """Return name, id or slug of the organization that a user joined last and is still in; no row if none.

    OFFSET 0 makes PostgreSQL read the user's few memberships first. With outdated statistics it would
    otherwise read all members of each organization, for every user.
    """
    found: ColumnElement[str | None] = OrganizationSync.__table__.c[value]
    named = (
        select(found.label("value"))
        .where(
            OrganizationSync.id == MembershipSync.organization_id,
            OrganizationSync.deleted_at.is_(None),
            found.is_not(None),
        )
        .offset(0)
        .lateral("named")
    )
    return (
        select(named.c.value)
        .select_from(MembershipSync)
        .join(named, true())
        .where(MembershipSync.clerk_id == clerk_id, MembershipSync.ended_at.is_(None))
        .order_by(MembershipSync.joined_at.desc(), MembershipSync.id.collate("C").desc())
        .limit(1)
        .lateral("joined_last")
    )


def _types(model: Any, names: Iterable[str]) -> dict[str, TypeEngine[Any]]:
    """Return the columns' types, texts without their length: a cast to a length would cut them."""
    types = {name: model.__table__.c[name].type for name in names}
    return {name: type(type_)() if isinstance(type_, String) else type_ for name, type_ in types.items()}


def _array(name: str) -> ColumnElement[Sequence[str]]:
    return bindparam(name, type_=ARRAY(String()))


def _unnested(array: ColumnElement[Any], name: str) -> TableValuedAlias:
    return func.unnest(array).table_valued(name).render_derived()


def _rows(types: dict[str, TypeEngine[Any]]) -> TableValuedAlias:
    arrays = [bindparam(f"c{i}", type_=ARRAY(type_)) for i, type_ in enumerate(types.values())]
    named = [column(name, type_) for name, type_ in types.items()]
    return func.unnest(*arrays).table_valued(*named).render_derived()


def _insert_or_replace(table: Any) -> Executable:
    """Insert rows of all columns of `table`, or replace those that have the same key."""
    source = _rows({column.name: column.type for column in table.columns})
    statement = upsert(table).from_select(source.c.keys(), select(source))
    keys = table.primary_key.columns.keys()
    others = {name: value for name, value in statement.excluded.items() if name not in keys}
    return statement.on_conflict_do_update(index_elements=keys, set_=others)


def _set_organizations(value: str) -> Executable:
    joined_last = organization_joined_last(_concerned.c.clerk_id, value)
    found = (
        select(_concerned.c.clerk_id, joined_last.c.value)
        .select_from(_concerned.outerjoin(joined_last, true()))
        .subquery("found")
    )
    return (
        update(User)
        .where(User.clerk_id == found.c.clerk_id, User.organization.is_distinct_from(found.c.value))
        .values(organization=found.c.value)
    )


@cache
def insert_users(left_alone: tuple[str, ...]) -> Executable:
    """Insert rows of USER_COLUMNS; the columns `left_alone` get their defaults."""
    source = _rows(USER_COLUMNS)
    names = [name for name in USER_COLUMNS if name not in left_alone]
    return insert(User).from_select(names, select(*(source.c[name] for name in names)))


@cache
def update_users(left_alone: tuple[str, ...]) -> Executable:
    """Update rows of USER_COLUMNS, without the columns `left_alone`.

    Setting a column to its own value would fire the application's triggers `UPDATE OF` that column, and needs
    the right to update it. Setting the e-mail also locks the row against foreign keys, if a trigger runs
    before each update.
    """
    source = _rows(USER_COLUMNS)
    values = {name: source.c[name] for name in USER_COLUMNS if name not in ("clerk_id", *left_alone)}
    return update(User).where(User.clerk_id == source.c.clerk_id).values(values)


def _require(*conditions: ColumnElement[bool]) -> Executable:
    """Raise ROWS_MISSING unless all conditions hold.

    A trigger, rule or policy of the application can suppress a write without an error. The row counts that
    PostgreSQL returns do not help: in a pipeline the client reads them only after the commit.
    """
    return select(true()).limit(case((and_(*conditions), 1), else_=-1))


def _are_there(key: Any, ids: str, *conditions: ColumnElement[bool]) -> ColumnElement[bool]:
    """Say whether there is a row for each of `ids` that meets the conditions."""
    count = select(func.count()).where(key == any_(_array(ids)), *conditions).scalar_subquery()
    return count == func.cardinality(_array(ids))


def _are_written(key: Any, ids: str, *conditions: ColumnElement[bool]) -> ColumnElement[bool]:
    """Say whether this transaction, or a subtransaction, has written each row of `ids`."""
    age = func.age(literal_column(f"{key.table.name}.xmin"))
    return _are_there(key, ids, age <= 0, *conditions)


def _are_gone(key: Any, ids: str) -> ColumnElement[bool]:
    """Say whether there is no row for any of `ids`."""
    return not_(select(1).where(key == any_(_array(ids))).exists())


SYNC_COLUMNS = _types(UserSync, SyncRow._fields)
USER_COLUMNS = _types(User, UserRow._fields)
# The columns of a UserRow, and of a ProfileRow with the profile as text.
USER_ROW = [User.__table__.c[name] for name in UserRow._fields]
PROFILE_ROW: list[Any] = [UserProfile.clerk_id, cast(UserProfile.profile, Text), UserProfile.updated_at]
EVENT_COLUMNS = _types(WebhookEvent, ("svix_id", "type", "clerk_id", "event_at", "received_at", "outcome"))

_ids, _changed, _addresses = _array("ids"), _array("changed"), _array("addresses")
_any_id, _any_changed = any_(_ids), any_(_changed)
_contested = union(
    select(_unnested(_addresses, "address")),
    select(UserSync.claimed_email).where(UserSync.clerk_id == _any_id, UserSync.claimed_email.is_not(None)),
)

# Make sure that every Clerk id in `ids` (sorted) has a row in `user_sync` to lock.
ADD_SYNC_ROWS = (
    upsert(UserSync).from_select(["clerk_id"], select(_unnested(_ids, "clerk_id"))).on_conflict_do_nothing()
)

# Lock and return the `user_sync` rows of `ids`, ordered by the bytes of the id.
LOCK_SYNC_ROWS = (
    select(*UserSync.__table__.columns)
    .where(UserSync.clerk_id == _any_id)
    .order_by(UserSync.clerk_id.collate("C"))
    .with_for_update(key_share=True)
)

# Lock the addresses in `addresses` and those that the users in `ids` claim, always in one order.
# Row locks are not enough: if one transaction releases an address while another claims it, neither sees the
# other's row. The locks end with the transaction.
_address = _contested.subquery().c.address
_keys = select(func.hashtext(_address).label("key")).distinct().order_by("key").offset(0).subquery()
LOCK_ADDRESSES = select(func.count(func.pg_advisory_xact_lock(ADDRESS_LOCK, _keys.c.key))).select_from(_keys)

# Return the rows of the users in `ids`.
READ_USERS = select(*USER_ROW).where(User.clerk_id == _any_id)

# Return each contested address, then the greatest claim on it by a user who has a row and is not in
# `all_ids`, then the row that holds it now, with whether its claim is missing; NULLs where there is none.
# LIMIT makes PostgreSQL look up each address. Without statistics it would otherwise read all of `users`.
_wanted = _contested.subquery("contested")
_claim = (
    select(
        UserSync.clerk_id,
        UserSync.claim_verified,
        UserSync.claim_updated_at,
        UserSync.claim_observed_at,
        User.email.label("current"),
    )
    .join(User, User.clerk_id == UserSync.clerk_id)
    .where(UserSync.claimed_email == _wanted.c.address, not_(UserSync.clerk_id == any_(_array("all_ids"))))
    .order_by(
        UserSync.claim_verified.desc(),
        UserSync.claim_updated_at.desc(),
        UserSync.claim_observed_at.desc(),
        UserSync.clerk_id.collate("C").desc(),
    )
    .limit(1)
    .lateral("claim")
)
_holder = (
    select(*USER_ROW, UserSync.claim_updated_at.is_(None).label("is_unclaimed"))
    .outerjoin(UserSync, UserSync.clerk_id == User.clerk_id)
    .where(User.email == _wanted.c.address)
    .limit(1)
    .lateral("holder")
)
READ_CONTESTED = select(_wanted.c.address, *_claim.c, *_holder.c).select_from(
    _wanted.outerjoin(_claim, true()).outerjoin(_holder, true())
)

# `ids` and the users who are in the organizations in `changed` now.
# An OR of both conditions would use no index. Neither would a join, because PostgreSQL assumes an average
# number of members for a new organization, which has few. For an array it assumes few.
_members = select(MembershipSync.clerk_id).where(
    MembershipSync.organization_id == _any_changed, MembershipSync.ended_at.is_(None)
)
_ids_and_members = union(
    select(_unnested(_ids, "clerk_id")),
    select(_unnested(func.array(_members.scalar_subquery()), "clerk_id")),
)
_concerned = _ids_and_members.subquery("concerned")

# Lock the rows of `ids`, ordered by the bytes of the id.
# FOR NO KEY UPDATE does not conflict with a transaction of the application that adds rows with a foreign key
# to the user.
_in_order = select(User.clerk_id).order_by(User.clerk_id.collate("C")).with_for_update(key_share=True)
LOCK_USERS = _in_order.where(User.clerk_id == _any_id)

# Lock the rows of `ids` and of the members of organizations in `changed`, as LOCK_USERS does.
LOCK_USERS_AND_MEMBERS = _in_order.where(User.clerk_id.in_(_ids_and_members))

# Lock the organizations in `changed`; share the lock of those that the users in `ids` are members of.
_incoming = _unnested(_changed, "id")
_both = union_all(
    select(_incoming.c.id, true().label("is_exclusive")),
    select(MembershipSync.organization_id, false()).where(
        MembershipSync.clerk_id == _any_id, MembershipSync.ended_at.is_(None)
    ),
).subquery()
_organizations = (
    select(func.hashtext(_both.c.id).label("key"), func.bool_or(_both.c.is_exclusive).label("is_exclusive"))
    .group_by("key")
    .order_by("key")
    .offset(0)
    .subquery()
)
_lock = (ORGANIZATION_LOCK, _organizations.c.key)
_exclusive, _shared = func.pg_advisory_xact_lock(*_lock), func.pg_advisory_xact_lock_shared(*_lock)
LOCK_ORGANIZATIONS = select(
    func.count(case((_organizations.c.is_exclusive, cast(_exclusive, Text)), else_=cast(_shared, Text)))
).select_from(_organizations)

# Return the stored organizations in `ids`.
READ_ORGANIZATIONS = select(*OrganizationSync.__table__.columns).where(OrganizationSync.id == _any_id)

# Return the stored memberships of the users in `ids`, ordered by id.
READ_MEMBERSHIPS = (
    select(*MembershipSync.__table__.columns)
    .where(MembershipSync.clerk_id == _any_id)
    .order_by(MembershipSync.id.collate("C"))
)

# Return the rows of `user_profiles` of the users in `ids`.
READ_PROFILES = select(*PROFILE_ROW).where(UserProfile.clerk_id == _any_id)

WRITE_PROFILES = _insert_or_replace(UserProfile.__table__)
WRITE_ORGANIZATIONS = _insert_or_replace(OrganizationSync.__table__)
WRITE_MEMBERSHIPS = _insert_or_replace(MembershipSync.__table__)

# Delete the rows of the users in `ids`.
DELETE_PROFILES = delete(UserProfile).where(UserProfile.clerk_id == _any_id)
DELETE_MEMBERSHIPS = delete(MembershipSync).where(MembershipSync.clerk_id == _any_id)
DELETE_USERS = delete(User).where(User.clerk_id == _any_id)

# Set the organization of the users in `ids` and of the members of the organizations in `changed`, by the
# column that is written: the organization's name, id or slug. Deleted users get none.
SET_ORGANIZATIONS = {value: _set_organizations(value) for value in ("name", "id", "slug")}

# Set c1, the address, for the users in c0.
_held = _rows({"clerk_id": String(), "email": String()})
SET_EMAILS = update(User).where(User.clerk_id == _held.c.clerk_id).values(email=_held.c.email)

# Update rows of SYNC_COLUMNS.
_sync = _rows(SYNC_COLUMNS)
UPDATE_SYNC_ROWS = (
    update(UserSync)
    .where(UserSync.clerk_id == _sync.c.clerk_id)
    .values({name: value for name, value in _sync.c.items() if name != "clerk_id"})
)

# Make sure that every Clerk instance in `ids` (sorted) has a row in `instance_sync`.
ADD_INSTANCES = (
    upsert(InstanceSync).from_select(["id"], select(_unnested(_ids, "id"))).on_conflict_do_nothing()
)

# Insert rows of EVENT_COLUMNS; a svix-id that already has a row keeps it.
RECORD_EVENTS = (
    upsert(WebhookEvent)
    .from_select(list(EVENT_COLUMNS), select(_rows(EVENT_COLUMNS)))
    .on_conflict_do_nothing(index_elements=["svix_id"])
)

# ADD_SYNC_ROWS writes a new row with nothing but the id; every update of it sets one of these.
_is_updated = (
    func.num_nonnulls(
        UserSync.profile_updated_at,
        UserSync.claim_updated_at,
        UserSync.last_login_at,
        UserSync.deleted_at,
        UserSync.instance_seen_at,
    )
    > 0
)

# Raise ROWS_MISSING unless this transaction has written the rows `ids` of `users` and `sync_ids` of
# `user_sync`, and no row of `gone` is left in `users`.
REQUIRE_WRITTEN = _require(
    _are_written(User.clerk_id, "ids"),
    _are_written(UserSync.clerk_id, "sync_ids", _is_updated),
    _are_gone(User.clerk_id, "gone"),
)

# The same for what DELETE_PROFILES and DELETE_MEMBERSHIPS leave of the users in `ids`.
REQUIRE_DELETED = _require(_are_gone(UserProfile.clerk_id, "ids"), _are_gone(MembershipSync.clerk_id, "ids"))

# The same for rows of `user_profiles`.
REQUIRE_PROFILES = _require(
    _are_written(UserProfile.clerk_id, "ids"), _are_gone(UserProfile.clerk_id, "gone")
)

# The same for organizations, and for `memberships` of the users in `ids`.
REQUIRE_MEMBERSHIPS = _require(
    _are_written(OrganizationSync.id, "organizations"),
    _are_written(MembershipSync.id, "memberships", MembershipSync.clerk_id == _any_id),
)

# The same for the ledger and for `instance_sync`, whose rows may be older than this transaction.
REQUIRE_RECORDED = _require(
    _are_there(WebhookEvent.svix_id, "svix_ids"), _are_there(InstanceSync.id, "instances")
)

# Find the users in c0 whose address is not c1 yet, unless the stored claim is c1 or newer than c2.
_move = _rows({"clerk_id": String(), "address": String(), "updated_at": BigInteger()})
_moving = (
    select(User.clerk_id)
    .join(_move, User.clerk_id == _move.c.clerk_id)
    .outerjoin(UserSync, UserSync.clerk_id == User.clerk_id)
    .where(
        User.email != _move.c.address,
        UserSync.claimed_email.is_distinct_from(_move.c.address),
        func.coalesce(UserSync.claim_updated_at, -1) <= _move.c.updated_at,
    )
)

# Find which of `ids` have a row in each table that is locked, and which users lose an address. UNLOCKED_IDS
# leaves out the rows that another transaction has locked: for an update, and for the loss of an address.
_models = (UserSync, User, UserProfile)
_stored = tuple(select(model.clerk_id).where(model.clerk_id == _any_id) for model in _models)
STORED_IDS = (*_stored, _moving)
UNLOCKED_IDS = (
    *(query.with_for_update(key_share=True, skip_locked=True) for query in _stored),
    _moving.with_for_update(skip_locked=True, of=User),
)

"""The statements of the apply.

Each takes a whole batch as arrays, one per column, so that their number does not grow with the batch.
"""

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from sqlalchemy import (
    ARRAY,
    BindParameter,
    Boolean,
    ColumnElement,
    CompoundSelect,
    Executable,
    Integer,
    Select,
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
    literal,
    literal_column,
    not_,
    select,
    true,
    union,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.sql.selectable import LateralFromClause, TableValuedAlias
from sqlalchemy.types import TypeEngine

from db.connection.pipeline import Pipeline
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

# Any two integers do, as long as no other code in the database locks by the same first one.
ADDRESS_LOCK = 0x636C6572
ORGANIZATION_LOCK = 0x636C656F


def _types(model: Any, names: Iterable[str]) -> dict[str, TypeEngine[Any]]:
    """Return the columns' types. Of texts without the length, as a cast to it cuts them."""
    types = {name: model.__table__.c[name].type for name in names}
    return {name: type(it)() if isinstance(it, String) else it for name, it in types.items()}


SYNC_COLUMNS = _types(UserSync, SyncRow._fields)
USER_COLUMNS = _types(User, UserRow._fields)
EVENT_COLUMNS = _types(WebhookEvent, ("svix_id", "type", "clerk_id", "event_at", "received_at", "outcome"))


def send_rows(pipeline: Pipeline, statement: Executable, rows: Sequence[tuple[object, ...]]) -> None:
    """Send a statement that reads its rows from arrays called c0, c1 and so on, unless there are none."""
    if rows:
        pipeline.send(
            statement, **{f"c{i}": list(column) for i, column in enumerate(zip(*rows, strict=True))}
        )


def send_ids(pipeline: Pipeline, statement: Executable, ids: Sequence[str]) -> None:
    """Send a statement that concerns `ids`, unless there are none."""
    if ids:
        pipeline.send(statement, ids=ids)


@cache
def add_sync_rows() -> Executable:
    """Make sure that every Clerk id in `ids` (sorted) has a row in `user_sync` to lock."""
    ids = func.unnest(_array("ids")).table_valued("clerk_id", name="src").render_derived()
    return upsert(UserSync).from_select(["clerk_id"], select(ids.c.clerk_id)).on_conflict_do_nothing()


@cache
def lock_sync_rows() -> Executable:
    """Lock and return the `user_sync` rows of `ids`, always in the order of their bytes."""
    return (
        select(*UserSync.__table__.columns)
        .where(UserSync.clerk_id == any_(_array("ids")))
        .order_by(UserSync.clerk_id.collate("C"))
        .with_for_update()
    )


@cache
def lock_addresses() -> Executable:
    """Lock the addresses in `addresses` and those that the users in `ids` claim, always in one order.

    Row locks cannot do it: when one transaction lets an address go while another claims it, neither sees the
    other's row. The locks end with the transaction.
    """
    contested = _contested().subquery()
    keys = select(func.hashtext(contested.c.address).label("key")).distinct().order_by("key").offset(0)
    ordered = keys.subquery()
    return select(
        func.count(func.pg_advisory_xact_lock(cast(literal(ADDRESS_LOCK), Integer), ordered.c.key))
    ).select_from(ordered)


@cache
def read_users() -> Executable:
    """Return the rows of the users in `ids`."""
    return select(*_user_columns()).where(User.clerk_id == any_(_array("ids")))


@cache
def read_holders() -> Executable:
    """Return the rows that hold one of the contested addresses now, and of each whether it lacks a claim."""
    return (
        select(*_user_columns(), UserSync.claim_updated_at.is_(None))
        .outerjoin(UserSync, UserSync.clerk_id == User.clerk_id)
        .where(User.email.in_(_contested()))
    )


@cache
def read_competing() -> Executable:
    """Return the greatest claim on each contested address by a user who has a row and is not in `all_ids`."""
    contested = _contested().subquery("contested")
    claim = (
        select(
            UserSync.clerk_id,
            UserSync.claim_verified,
            UserSync.claim_updated_at,
            UserSync.claim_observed_at,
            User.email.label("current"),
        )
        .join(User, User.clerk_id == UserSync.clerk_id)
        .where(
            UserSync.claimed_email == contested.c.address,
            not_(UserSync.clerk_id == any_(_array("all_ids"))),
        )
        .order_by(
            UserSync.claim_verified.desc(),
            UserSync.claim_updated_at.desc(),
            UserSync.claim_observed_at.desc(),
            UserSync.clerk_id.collate("C").desc(),
        )
        .limit(1)
        .lateral("claim")
    )
    return select(contested.c.address, *claim.c).select_from(contested.join(claim, true()))


@cache
def lock_users() -> Executable:
    """Lock the rows of `ids`, always in the order of their bytes.

    FOR NO KEY UPDATE: a transaction of the application that adds rows with a foreign key to a user shares
    the user's row, and is not in the way.
    """
    return (
        select(User.clerk_id)
        .where(User.clerk_id == any_(_array("ids")))
        .order_by(User.clerk_id.collate("C"))
        .with_for_update(key_share=True)
    )


@cache
def lock_users_and_members() -> Executable:
    """Lock the rows of `ids` and of the members of organizations in `changed`, as `lock_users` does."""
    return (
        select(User.clerk_id)
        .where(User.clerk_id.in_(_concerned()))
        .order_by(User.clerk_id.collate("C"))
        .with_for_update(key_share=True)
    )


@cache
def lock_organizations() -> Executable:
    """Lock the organizations in `changed`, and share those that the users in `ids` are members of now."""
    changed = func.unnest(_array("changed")).table_valued("id", name="incoming").render_derived()
    both = union_all(
        select(changed.c.id, true().label("alone")),
        select(MembershipSync.organization_id, false()).where(
            MembershipSync.clerk_id == any_(_array("ids")), MembershipSync.ended_at.is_(None)
        ),
    ).subquery()
    keys = (
        select(func.hashtext(both.c.id).label("key"), func.bool_or(both.c.alone).label("alone"))
        .group_by("key")
        .order_by("key")
        .offset(0)
        .subquery()
    )
    namespace = cast(literal(ORGANIZATION_LOCK), Integer)
    alone = cast(func.pg_advisory_xact_lock(namespace, keys.c.key), Text)
    shared = cast(func.pg_advisory_xact_lock_shared(namespace, keys.c.key), Text)
    return select(func.count(case((keys.c.alone, alone), else_=shared))).select_from(keys)


@cache
def read_organizations() -> Executable:
    """Return what is stored of the organizations in `ids`."""
    return select(*OrganizationSync.__table__.columns).where(OrganizationSync.id == any_(_array("ids")))


@cache
def read_memberships() -> Executable:
    """Return what is stored of the memberships of the users in `ids`, ordered by id."""
    return (
        select(*MembershipSync.__table__.columns)
        .where(MembershipSync.clerk_id == any_(_array("ids")))
        .order_by(MembershipSync.id.collate("C"))
    )


@cache
def read_profiles() -> Executable:
    """Return the rows of `user_profiles` of the users in `ids`, the profile as text."""
    text = cast(UserProfile.profile, Text)
    return select(UserProfile.clerk_id, text, UserProfile.updated_at).where(
        UserProfile.clerk_id == any_(_array("ids"))
    )


@cache
def write_profiles() -> Executable:
    """Insert or replace rows of `user_profiles`."""
    return _insert_or_replace(UserProfile.__table__)


@cache
def delete_profiles() -> Executable:
    """Delete the rows of `user_profiles` of the users in `ids`."""
    return delete(UserProfile).where(UserProfile.clerk_id == any_(_array("ids")))


@cache
def write_organizations() -> Executable:
    """Insert or replace rows of `organization_sync`."""
    return _insert_or_replace(OrganizationSync.__table__)


@cache
def write_memberships() -> Executable:
    """Insert or replace rows of `membership_sync`."""
    return _insert_or_replace(MembershipSync.__table__)


@cache
def delete_memberships() -> Executable:
    """Delete the memberships of the users in `ids`."""
    return delete(MembershipSync).where(MembershipSync.clerk_id == any_(_array("ids")))


@cache
def set_organizations(value: str) -> Executable:
    """Set the organization of the users in `ids` and of the members of the organizations in `changed`.

    `value` is what stands for an organization: its name, id or slug.

    A deleted user is a member of none any more, and gets none.
    """
    concerned = _concerned().subquery("concerned")
    joined_last = organization_joined_last(concerned.c.clerk_id, value)
    found = (
        select(concerned.c.clerk_id, joined_last.c.value)
        .select_from(concerned.outerjoin(joined_last, true()))
        .subquery("found")
    )
    return (
        update(User)
        .where(User.clerk_id == found.c.clerk_id, User.organization.is_distinct_from(found.c.value))
        .values(organization=found.c.value)
    )


def organization_joined_last(clerk_id: ColumnElement[str], value: str) -> LateralFromClause:
    """Return the name, id or slug of the organization that a user joined last and is in; no row for none.

    The user's few memberships are to be read first. PostgreSQL, while its statistics are not of late, would
    rather go through all members of each organization, for every user: OFFSET 0 keeps it from that.
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


@cache
def set_emails() -> Executable:
    """Set c1, the address, for the users in c0."""
    source = _rows({"clerk_id": String(), "email": String()})
    return update(User).where(User.clerk_id == source.c.clerk_id).values(email=source.c.email)


@cache
def delete_users() -> Executable:
    """Delete the rows of `ids`."""
    return delete(User).where(User.clerk_id == any_(_array("ids")))


@cache
def insert_users() -> Executable:
    """Insert rows of USER_COLUMNS."""
    source = _rows(USER_COLUMNS)
    return insert(User).from_select(list(USER_COLUMNS), select(*(source.c[name] for name in USER_COLUMNS)))


@cache
def update_users() -> Executable:
    """Update rows of USER_COLUMNS, then whether e-mail, role and organization are kept."""
    flags = {name: Boolean() for name in ("keeps_email", "keeps_role", "keeps_organization")}
    source = _rows({**USER_COLUMNS, **flags})
    return (
        update(User)
        .where(User.clerk_id == source.c.clerk_id)
        .values(
            email=case((source.c.keeps_email, User.email), else_=source.c.email),
            name=source.c.name,
            organization=case((source.c.keeps_organization, User.organization), else_=source.c.organization),
            role=case((source.c.keeps_role, User.role), else_=source.c.role),
            created_at=source.c.created_at,
            last_login_at=source.c.last_login_at,
        )
    )


@cache
def update_sync_rows() -> Executable:
    """Update rows of SYNC_COLUMNS."""
    source = _rows(SYNC_COLUMNS)
    values = {name: source.c[name] for name in SYNC_COLUMNS if name != "clerk_id"}
    return update(UserSync).where(UserSync.clerk_id == source.c.clerk_id).values(values)


@cache
def add_instances() -> Executable:
    """Make sure that every Clerk instance in `ids` (sorted) has a row in `instance_sync`."""
    ids = func.unnest(_array("ids")).table_valued("id", name="src").render_derived()
    return upsert(InstanceSync).from_select(["id"], select(ids.c.id)).on_conflict_do_nothing()


@cache
def record_events() -> Executable:
    """Insert rows of EVENT_COLUMNS; a svix-id that is there keeps its row."""
    source = _rows(EVENT_COLUMNS)
    return (
        upsert(WebhookEvent)
        .from_select(list(EVENT_COLUMNS), select(*(source.c[name] for name in EVENT_COLUMNS)))
        .on_conflict_do_nothing(index_elements=["svix_id"])
    )


@cache
def require_written() -> Executable:
    """Raise ROWS_MISSING unless this transaction has written each row of `ids`, and none of `gone` is left.

    `ids` are rows of `users`, `sync_ids` of `user_sync`. A trigger, rule or policy of the application can
    suppress a write without an error. The number of rows that PostgreSQL returns for a statement is no help:
    the client knows it only once the transaction is committed.
    """
    expected = func.cardinality(_array("ids")) + func.cardinality(_array("sync_ids"))
    written = _written(User.__table__, "ids") + _written(UserSync.__table__, "sync_ids")
    left = select(func.count()).where(User.clerk_id == any_(_array("gone"))).scalar_subquery()
    return select(literal(1)).limit(case((and_(written == expected, left == 0), 1), else_=-1))


def _written(table: Any, ids: str) -> ColumnElement[int]:
    """Count the rows of `ids` whose newest version is of this transaction, or of a subtransaction."""
    rows = table.alias("written")
    age = func.age(literal_column("written.xmin"))
    return select(func.count()).where(rows.c.clerk_id == any_(_array(ids)), age <= 0).scalar_subquery()


@cache
def writes(policy: Policy) -> tuple[Executable, ...]:
    """Return every statement that an apply may write with."""
    always = (add_sync_rows, set_emails, update_users, insert_users, update_sync_rows, delete_memberships)
    deleting = () if policy.anonymize else (delete_users,)
    following = (write_organizations, write_memberships) if policy.follows_memberships else ()
    keeping = (write_profiles,) if policy.keeps_fields else ()
    chosen = (*always, *deleting, *following, *keeping, delete_profiles, add_instances, record_events)
    # A cached function with a parameter: type checkers do not see a missing argument.
    column = (set_organizations(policy.organization_value),) if policy.follows_memberships else ()
    return (*(statement() for statement in chosen), *column)


@cache
def stored_ids() -> tuple[Executable, ...]:
    """Return the statements that find which of `ids` have a row, for each table that is locked."""
    return tuple(_ids_of(table) for table in (UserSync, User))


@cache
def unlocked_ids() -> tuple[Executable, ...]:
    """Return those of `stored_ids`, without the rows that another transaction has locked."""
    return tuple(
        _ids_of(table).with_for_update(key_share=True, skip_locked=True) for table in (UserSync, User)
    )


def _ids_of(table: type[User | UserSync]) -> Select[str]:
    return select(table.clerk_id).where(table.clerk_id == any_(_array("ids")))


def _insert_or_replace(table: Any) -> Executable:
    """Insert rows of all columns of `table`, or replace those that have the same key."""
    names = [each.name for each in table.columns]
    keys = [each.name for each in table.primary_key]
    source = _rows({each.name: each.type for each in table.columns})
    statement = upsert(table).from_select(names, select(*(source.c[name] for name in names)))
    return statement.on_conflict_do_update(
        index_elements=keys, set_={name: statement.excluded[name] for name in names if name not in keys}
    )


def _concerned() -> CompoundSelect[str]:
    """Return `ids` and who is in the organizations in `changed` now.

    An OR of both would use no index. Nor would a join when PostgreSQL guesses at the number of members: new
    organizations have few, and it takes them for average ones. In an array it expects few.
    """
    members = select(MembershipSync.clerk_id).where(
        MembershipSync.organization_id == any_(_array("changed")), MembershipSync.ended_at.is_(None)
    )
    both = (_array("ids"), func.array(members.scalar_subquery()))
    sources = (func.unnest(each).table_valued("clerk_id").render_derived() for each in both)
    return union(*(select(source.c.clerk_id) for source in sources))


def _array(name: str) -> BindParameter[Sequence[str]]:
    return bindparam(name, type_=ARRAY(String()))


def _rows(types: dict[str, TypeEngine[Any]]) -> TableValuedAlias:
    arrays = [bindparam(f"c{i}", type_=ARRAY(type_)) for i, type_ in enumerate(types.values())]
    named = [column(name, type_) for name, type_ in types.items()]
    return func.unnest(*arrays).table_valued(*named, name="src").render_derived()


def _contested() -> CompoundSelect[str]:
    incoming = func.unnest(_array("addresses")).table_valued("address", name="incoming").render_derived()
    return union(
        select(incoming.c.address),
        select(UserSync.claimed_email).where(
            and_(UserSync.clerk_id == any_(_array("ids")), UserSync.claimed_email.is_not(None))
        ),
    )


def _user_columns() -> list[ColumnElement[Any]]:
    return [User.__table__.c[name] for name in USER_COLUMNS]

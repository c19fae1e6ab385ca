"""Compares the stored memberships with Clerk's API. Reads only.

Used with ORGANIZATION_SOURCE=membership, for users who have a row and no tombstone.
"""

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from sqlalchemy import literal, select, true, tuple_

from db.apply import statements
from db.apply.memberships import stored_membership, stored_organization
from db.connection.engine import Database
from db.drift.users import HAS_TOMBSTONE, IDS_AT_A_TIME
from db.merge.change import Membership, Organization, UserChange, Version
from db.models import MembershipSync, OrganizationSync, User
from db.times import to_ms


class HeldMembership(NamedTuple):
    """A stored membership and its organization."""

    membership: Membership
    organization: Organization


# The memberships of one user, ended ones included.
MembershipsById = Mapping[str, HeldMembership]

_texts = attrgetter("name", "slug", "image_url")  # of an organization


def read(database: Database, clerk_ids: Sequence[str]) -> dict[str, MembershipsById]:
    """Return the stored memberships of those users; users without a row are left out."""
    query = (
        select(User.clerk_id, *MembershipSync.__table__.columns[1:], *OrganizationSync.__table__.columns[1:])
        .select_from(User)
        .outerjoin(MembershipSync, MembershipSync.clerk_id == User.clerk_id)
        .outerjoin(OrganizationSync, OrganizationSync.id == MembershipSync.organization_id)
        .where(User.clerk_id.in_(clerk_ids), ~HAS_TOMBSTONE)
    )
    found: dict[str, dict[str, HeldMembership]] = {}
    for clerk_id, *row in database.run(lambda connection: connection.execute(query).all()):
        memberships = found.setdefault(clerk_id, {})
        if row[0] is not None:
            memberships[row[0]] = _held(row)
    return dict(found)


def differs(shown: UserChange, local: MembershipsById) -> bool:
    """Say whether a user's memberships in Clerk differ from the stored ones. Pure."""
    organizations = {organization.id: organization for organization in shown.organizations}
    return any(
        _differs(membership, local.get(membership.id), organizations[membership.organization_id])
        for membership in shown.memberships
    )


def may_have_moved(shown: UserChange, local: MembershipsById, recent_ms: int) -> bool:
    """Say whether a difference may be outdated: one side changed recently, or the stored side is newer."""
    unknown = Version(0, 0)
    versions = {organization.id: organization.version or unknown for organization in shown.organizations}
    return any(
        membership.joined_at >= recent_ms
        or versions[membership.organization_id].updated_at >= recent_ms
        or (membership.role_version or unknown).updated_at >= recent_ms
        or _is_newer(local.get(membership.id), versions[membership.organization_id])
        for membership in shown.memberships
    )


def current(database: Database) -> Iterator[list[tuple[str, Membership]]]:
    """Yield all memberships that have not ended, each with its user, thousands at a time.

    Those of an organization that was deleted have ended with it.
    """
    after = ("", "")
    while rows := _current(database, after):
        yield [(clerk_id, Membership(id_, of, to_ms(joined_at))) for clerk_id, id_, of, joined_at in rows]
        after = rows[-1][:2]


def wrong_organization(database: Database, clerk_ids: Sequence[str], value: str) -> list[str]:
    """Return the users whose `users.organization` differs from their stored memberships.

    `value` is ORGANIZATION_VALUE: name, id or slug.
    """
    joined_last = statements.organization_joined_last(User.__table__.c.clerk_id, value)
    query = (
        select(User.clerk_id)
        .outerjoin(joined_last, true())
        .where(
            User.clerk_id.in_(clerk_ids),
            ~HAS_TOMBSTONE,
            User.organization.is_distinct_from(joined_last.c.value),
        )
    )
    return database.run(lambda connection: list(connection.scalars(query)))


def _differs(shown: Membership, held: HeldMembership | None, organization: Organization) -> bool:
    if held is None or held.membership.ended_at is not None or held.organization.deleted_at is not None:
        return True
    if held.membership.organization_id != shown.organization_id:
        return True
    if held.membership.joined_at < shown.joined_at or shown.role not in (None, held.membership.role):
        return True
    return organization.name is not None and _texts(held.organization) != _texts(organization)


def _is_newer(held: HeldMembership | None, version: Version) -> bool:
    if held is None:
        return False
    organization = held.organization
    has_ended = held.membership.ended_at is not None or organization.deleted_at is not None
    return has_ended or (organization.version is not None and organization.version > version)


def _current(database: Database, after: tuple[str, str]) -> list[Any]:
    names = ("clerk_id", "id", "organization_id", "joined_at")
    query = (
        select(*(MembershipSync.__table__.c[name] for name in names))
        .join(User, User.clerk_id == MembershipSync.clerk_id)
        .outerjoin(OrganizationSync, OrganizationSync.id == MembershipSync.organization_id)
        .where(
            tuple_(MembershipSync.clerk_id, MembershipSync.id) > tuple_(*map(literal, after)),
            MembershipSync.ended_at.is_(None),
            OrganizationSync.deleted_at.is_(None),
            ~HAS_TOMBSTONE,
        )
        .order_by(MembershipSync.clerk_id, MembershipSync.id)
        .limit(IDS_AT_A_TIME)
    )
    return [tuple(row) for row in database.run(lambda connection: connection.execute(query).all())]


def _held(row: Sequence[Any]) -> HeldMembership:
    membership = stored_membership(row[:7])
    return HeldMembership(membership, stored_organization([membership.organization_id, *row[7:]]))

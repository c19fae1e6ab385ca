"""ORGANIZATION_SOURCE=membership: `users.organization` is the organization that a user joined last and is in.

A part of the one transaction of `db.apply.users`. The column is computed by PostgreSQL from what is stored of
memberships and organizations, as one renamed organization concerns any number of users outside the batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import psycopg

from db.apply import statements
from db.connection.pipeline import Pipeline
from db.merge.change import Membership, Organization, UserChange, Version, merge_organizations
from db.merge.incoming import Outcome, ReceivedChange
from db.times import maybe_datetime, maybe_ms, to_datetime, to_ms


class PendingReads(NamedTuple):
    """What was asked of the database, its answers still under way."""

    concerned: list[str]
    organizations: psycopg.Cursor[Any]
    memberships: psycopg.Cursor[Any]


class StoredMemberships(NamedTuple):
    """What is stored of the organizations in a batch, and of its users' memberships."""

    concerned: list[str]
    organizations: dict[str, Organization]
    memberships: dict[str, tuple[Membership, ...]]


class MembershipWrites(NamedTuple):
    """What is to be written, and whose column may change by it: users, and the members of organizations.

    `renamed` are the organizations whose name or end is new; the others were only seen again. `news` tells of
    each change in the batch whether it said something new of an organization.
    """

    concerned: list[str]
    renamed: list[str]
    organizations: list[Organization]
    memberships: list[tuple[str, Membership]]
    news: list[bool]


def lock_and_ask(pipeline: Pipeline, batch: Sequence[ReceivedChange]) -> PendingReads:
    """Lock the organizations concerned, in one order, and ask what is stored of them and of the memberships.

    An organization that the batch says something of is locked for itself, one that a user in the batch is a
    member of is shared: a rename waits for users who are just being given the old name.
    """
    changed = sorted({organization.id for incoming in batch for organization in _facts(incoming)})
    changes = [incoming.change for incoming in batch if isinstance(incoming.change, UserChange)]
    concerned = sorted({change.clerk_id for change in changes if _concerns_organization(change)})
    pipeline.send(statements.LOCK_ORGANIZATIONS, changed=changed, ids=concerned)
    return PendingReads(
        concerned,
        pipeline.send(statements.READ_ORGANIZATIONS, ids=changed),
        pipeline.send(statements.READ_MEMBERSHIPS, ids=concerned),
    )


def read(asked: PendingReads) -> StoredMemberships:
    """Return what the database answered."""
    memberships: dict[str, list[Membership]] = {}
    for clerk_id, *row in asked.memberships.fetchall():
        memberships.setdefault(clerk_id, []).append(stored_membership(row))
    organizations = [stored_organization(row) for row in asked.organizations.fetchall()]
    return StoredMemberships(
        asked.concerned,
        {it.id: it for it in organizations},
        {clerk_id: tuple(them) for clerk_id, them in memberships.items()},
    )


def decide(
    stored: StoredMemberships, known: dict[str, UserChange], batch: Sequence[ReceivedChange]
) -> MembershipWrites:
    """Merge what the batch says into what is stored; return what differs."""
    merged = dict(stored.organizations)
    news = []
    for incoming in batch:
        said = [merge_organizations(_stored(merged, fact.id), fact) for fact in _facts(incoming)]
        news.append(any(it != _stored(merged, it.id) for it in said))
        merged.update((it.id, it) for it in said)
    return MembershipWrites(
        stored.concerned,
        [it.id for it in merged.values() if _shows(it) != _shows(_stored(stored.organizations, it.id))],
        [it for it in merged.values() if it != _stored(stored.organizations, it.id)],
        [
            (clerk_id, membership)
            for clerk_id in stored.concerned
            for membership in _unstored(known[clerk_id], stored)
        ],
        news,
    )


def write(pipeline: Pipeline, writes: MembershipWrites, value: str) -> None:
    """Send the writes, then the new value of the column for all users concerned: ORGANIZATION_VALUE's."""
    organizations = [_organization_row(it) for it in writes.organizations]
    statements.send_rows(pipeline, statements.WRITE_ORGANIZATIONS, organizations)
    memberships = [_membership_row(*it) for it in writes.memberships]
    statements.send_rows(pipeline, statements.WRITE_MEMBERSHIPS, memberships)
    if writes.concerned or writes.renamed:
        pipeline.send(statements.SET_ORGANIZATIONS[value], ids=writes.concerned, changed=writes.renamed)


def outcomes(writes: MembershipWrites, of_users: Sequence[Outcome]) -> list[Outcome]:
    """Return what each change did, given what it did to its user."""
    return [
        Outcome.APPLIED if is_new else outcome for outcome, is_new in zip(of_users, writes.news, strict=True)
    ]


def _facts(incoming: ReceivedChange) -> Sequence[Organization]:
    change = incoming.change
    return (change,) if isinstance(change, Organization) else change.organizations


def _stored(organizations: Mapping[str, Organization], id_: str) -> Organization:
    return organizations.get(id_) or Organization(id_)


def _shows(organization: Organization) -> tuple[object, ...]:
    """Return what may stand in the column `organization` of its members."""
    return organization.name, organization.slug, organization.deleted_at is not None


def _unstored(known: UserChange, stored: StoredMemberships) -> list[Membership]:
    there = set(stored.memberships.get(known.clerk_id, ()))
    return [membership for membership in known.memberships if membership not in there]


def _concerns_organization(change: UserChange) -> bool:
    """Say whether the column may change: by a membership, or a row that appears."""
    return bool(change.memberships) or change.profile is not None


def stored_organization(row: Sequence[Any]) -> Organization:
    """Return what a row of `organization_sync` says."""
    id_, name, updated_at, observed_at, deleted_at, slug, image_url = row
    version = None if name is None else Version(updated_at, observed_at)
    return Organization(id_, version, name, maybe_ms(deleted_at), slug, image_url)


def stored_membership(row: Sequence[Any]) -> Membership:
    """Return what a row of `membership_sync` says, without its first column, the user."""
    id_, organization_id, joined_at, ended_at, role, updated_at, observed_at = row
    version = None if role is None else Version(updated_at, observed_at)
    return Membership(id_, organization_id, to_ms(joined_at), maybe_ms(ended_at), version, role)


def _organization_row(it: Organization) -> tuple[object, ...]:
    version = it.version or (None, None)
    return it.id, it.name, *version, maybe_datetime(it.deleted_at), it.slug, it.image_url


def _membership_row(clerk_id: str, it: Membership) -> tuple[object, ...]:
    times = to_datetime(it.joined_at), maybe_datetime(it.ended_at)
    return clerk_id, it.id, it.organization_id, *times, it.role, *(it.role_version or (None, None))

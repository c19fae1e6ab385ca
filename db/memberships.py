"""ORGANIZATION_SOURCE=membership: `users.organization` is the organization that a user joined last and is in.

A part of the one transaction of `db.users`. The column is computed by PostgreSQL from what is stored of
memberships and organizations, as one renamed organization concerns any number of users outside the batch.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import psycopg

from db import sql
from db.change import Membership, Organization, UserChange, Version, merge_organizations
from db.engine import Pipeline, columns
from db.ledger import Incoming
from db.times import maybe_datetime, maybe_ms, to_datetime, to_ms


class Asked(NamedTuple):
    """What was asked of the database, its answers still under way."""

    concerned: list[str]
    organizations: psycopg.Cursor[Any]
    memberships: psycopg.Cursor[Any]


class Roster(NamedTuple):
    """What is stored of the organizations in a batch, and of its users' memberships."""

    concerned: list[str]
    organizations: dict[str, Organization]
    memberships: dict[str, tuple[Membership, ...]]


class RosterWrites(NamedTuple):
    """What is to be written, and whose column may change by it."""

    concerned: list[str]
    organizations: list[Organization]
    memberships: list[tuple[str, Membership]]
    left: list[str]


def facts(batch: Iterable[Incoming]) -> list[Organization]:
    """Return what a batch says of organizations."""
    found: list[Organization] = []
    for incoming in batch:
        change = incoming.change
        found += [change] if isinstance(change, Organization) else change.organizations
    return found


def lock_and_ask(pipeline: Pipeline, batch: Sequence[Incoming]) -> Asked:
    """Lock the organizations concerned, in one order, and ask what is stored of them and of the memberships.

    An organization that the batch says something of is locked for itself, one that a user in the batch is a
    member of is shared: a rename waits for whoever is just being given the old name.
    """
    changed = sorted({organization.id for organization in facts(batch)})
    changes = [incoming.change for incoming in batch if isinstance(incoming.change, UserChange)]
    concerned = sorted({change.clerk_id for change in changes if _concerns_organization(change)})
    pipeline.send(sql.lock_organizations(), changed=changed, ids=concerned)
    return Asked(
        concerned,
        pipeline.send(sql.read_organizations(), ids=changed),
        pipeline.send(sql.read_memberships(), ids=concerned),
    )


def read(asked: Asked) -> Roster:
    """Return what the database answered."""
    memberships: dict[str, tuple[Membership, ...]] = {}
    for id_, clerk_id, organization_id, joined_at, ended_at in asked.memberships.fetchall():
        membership = Membership(id_, organization_id, to_ms(joined_at), maybe_ms(ended_at))
        memberships[clerk_id] = (*memberships.get(clerk_id, ()), membership)
    organizations = [_organization(*row) for row in asked.organizations.fetchall()]
    return Roster(asked.concerned, {it.id: it for it in organizations}, memberships)


def decide(roster: Roster, known: dict[str, UserChange], batch: Sequence[Incoming]) -> RosterWrites:
    """Merge what the batch says into what is stored; return what differs."""
    merged: dict[str, Organization] = {}
    for fact in facts(batch):
        before = merged.get(fact.id) or roster.organizations.get(fact.id) or Organization(fact.id)
        merged[fact.id] = merge_organizations(before, fact)
    return RosterWrites(
        roster.concerned,
        [it for it in merged.values() if it != roster.organizations.get(it.id)],
        [
            (clerk_id, membership)
            for clerk_id in roster.concerned
            for membership in known[clerk_id].memberships
            if membership not in roster.memberships.get(clerk_id, ())
        ],
        [clerk_id for clerk_id in roster.memberships if known[clerk_id].deleted_at is not None],
    )


def write(pipeline: Pipeline, writes: RosterWrites) -> None:
    """Send the writes, then the new value of the column for everyone concerned."""
    if writes.organizations:
        rows = [_organization_row(it) for it in writes.organizations]
        sql.send_rows(pipeline, sql.write_organizations(), columns(rows, 5))
    if writes.memberships:
        rows = [_membership_row(*it) for it in writes.memberships]
        sql.send_rows(pipeline, sql.write_memberships(), columns(rows, 5))
    if writes.left:
        pipeline.send(sql.delete_memberships(), ids=writes.left)
    changed = [it.id for it in writes.organizations]
    if writes.concerned or changed:
        pipeline.send(sql.set_organizations(), ids=writes.concerned, changed=changed)


def _concerns_organization(change: UserChange) -> bool:
    """Say whether the column may change: by a membership, a row that appears, or one that goes."""
    return bool(change.memberships) or change.profile is not None or change.deleted_at is not None


def _organization(
    id_: str, name: str | None, updated_at: int, observed_at: int, deleted_at: datetime | None
) -> Organization:
    version = None if name is None else Version(updated_at, observed_at)
    return Organization(id_, version, name, maybe_ms(deleted_at))


def _organization_row(it: Organization) -> tuple[object, ...]:
    version = it.version or (None, None)
    return it.id, it.name, *version, maybe_datetime(it.deleted_at)


def _membership_row(clerk_id: str, it: Membership) -> tuple[object, ...]:
    return it.id, clerk_id, it.organization_id, to_datetime(it.joined_at), maybe_datetime(it.ended_at)

"""ORGANIZATION_SOURCE=membership: `users.organization` is the organization that a user joined last and is in.

A part of the one transaction of `db.apply.users`. PostgreSQL computes the column from the stored memberships
and organizations, because one renamed organization can concern any number of users outside the batch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from db.apply import statements
from db.connection.pipeline import Pipeline
from db.merge.change import Membership, Organization, UserChange, Version, merge_organizations
from db.merge.incoming import Outcome, ReceivedChange
from db.times import maybe_datetime, maybe_ms, to_datetime, to_ms


class StoredMemberships(NamedTuple):
    """The stored organizations of a batch, and the stored memberships of its users."""

    concerned: list[str]
    organizations: dict[str, Organization]
    memberships: dict[str, tuple[Membership, ...]]


class MembershipWrites(NamedTuple):
    """The rows to write, and the users and organizations whose members' column may change.

    `renamed` are the organizations whose name or deletion is new. `news` says for each change of the batch
    whether it contained anything new about an organization.
    """

    concerned: list[str]
    renamed: list[str]
    organizations: list[Organization]
    memberships: list[tuple[str, Membership]]
    news: list[bool]


def lock_and_ask(pipeline: Pipeline, batch: Sequence[ReceivedChange]) -> Callable[[], StoredMemberships]:
    """Lock the organizations of the batch, in one order, and send the queries for them and the memberships.

    Returns a function that reads the answers.

    An organization that the batch changes gets an exclusive lock; one that a user in the batch is a member of
    gets a shared lock. So a rename waits for batches that are writing the old name.
    """
    changed = sorted({organization.id for incoming in batch for organization in _facts(incoming)})
    changes = [incoming.change for incoming in batch if isinstance(incoming.change, UserChange)]
    concerned = sorted({change.clerk_id for change in changes if _concerns_organization(change)})
    pipeline.send(statements.LOCK_ORGANIZATIONS, changed=changed, ids=concerned)
    organizations = pipeline.send(statements.READ_ORGANIZATIONS, ids=changed)
    memberships = pipeline.send(statements.READ_MEMBERSHIPS, ids=concerned)

    def read() -> StoredMemberships:
        by_user: dict[str, list[Membership]] = {}
        for clerk_id, *row in memberships.fetchall():
            by_user.setdefault(clerk_id, []).append(stored_membership(row))
        return StoredMemberships(
            concerned,
            {row[0]: stored_organization(row) for row in organizations.fetchall()},
            {clerk_id: tuple(found) for clerk_id, found in by_user.items()},
        )

    return read


def decide(
    stored: StoredMemberships, known: dict[str, UserChange], batch: Sequence[ReceivedChange]
) -> MembershipWrites:
    """Merge the batch into the stored state; return what differs."""
    before = stored.organizations
    merged = dict(before)
    news = []
    for incoming in batch:
        facts = [merge_organizations(_stored(merged, fact.id), fact) for fact in _facts(incoming)]
        news.append(any(fact != _stored(merged, fact.id) for fact in facts))
        merged.update((fact.id, fact) for fact in facts)
    changed = [organization for id_, organization in merged.items() if organization != _stored(before, id_)]
    renamed = [new.id for new in changed if _shows(new) != _shows(_stored(before, new.id))]
    memberships = [
        (clerk_id, membership)
        for clerk_id in stored.concerned
        for membership in _unstored(known[clerk_id], stored)
    ]
    return MembershipWrites(stored.concerned, renamed, changed, memberships, news)


def write(pipeline: Pipeline, writes: MembershipWrites, value: str) -> None:
    """Send the writes, then set the column to ORGANIZATION_VALUE for all users that may be affected."""
    organizations = [_organization_row(organization) for organization in writes.organizations]
    pipeline.send_rows(statements.WRITE_ORGANIZATIONS, organizations)
    memberships = [_membership_row(clerk_id, membership) for clerk_id, membership in writes.memberships]
    pipeline.send_rows(statements.WRITE_MEMBERSHIPS, memberships)
    if organizations or memberships:
        pipeline.send(
            statements.REQUIRE_MEMBERSHIPS,
            organizations=[organization.id for organization in writes.organizations],
            ids=[clerk_id for clerk_id, _ in writes.memberships],
            memberships=[membership.id for _, membership in writes.memberships],
        )
    if writes.concerned or writes.renamed:
        pipeline.send(statements.SET_ORGANIZATIONS[value], ids=writes.concerned, changed=writes.renamed)


def outcomes(writes: MembershipWrites, of_users: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcome of each change, given its outcome for the user alone."""
    return [
        Outcome.APPLIED if is_new else outcome for outcome, is_new in zip(of_users, writes.news, strict=True)
    ]


def _facts(incoming: ReceivedChange) -> Sequence[Organization]:
    change = incoming.change
    return (change,) if isinstance(change, Organization) else change.organizations


def _stored(organizations: Mapping[str, Organization], id_: str) -> Organization:
    return organizations.get(id_) or Organization(id_)


def _shows(organization: Organization) -> tuple[object, ...]:
    """Return the values that the column `organization` of its members can have."""
    return organization.name, organization.slug, organization.deleted_at is not None


def _unstored(known: UserChange, stored: StoredMemberships) -> list[Membership]:
    before = set(stored.memberships.get(known.clerk_id, ()))
    return [membership for membership in known.memberships if membership not in before]


def _concerns_organization(change: UserChange) -> bool:
    """Say whether the column may change: by a membership, or a row that appears."""
    return bool(change.memberships) or change.profile is not None


def stored_organization(row: Sequence[Any]) -> Organization:
    """Return the organization in a row of `organization_sync`."""
    id_, name, updated_at, observed_at, deleted_at, slug, image_url = row
    version = None if name is None else Version(updated_at, observed_at)
    return Organization(id_, version, name, maybe_ms(deleted_at), slug, image_url)


def stored_membership(row: Sequence[Any]) -> Membership:
    """Return the membership in a row of `membership_sync`, given without its first column, the user."""
    id_, organization_id, joined_at, ended_at, role, updated_at, observed_at = row
    version = None if role is None else Version(updated_at, observed_at)
    return Membership(id_, organization_id, to_ms(joined_at), maybe_ms(ended_at), version, role)


def _organization_row(organization: Organization) -> tuple[object, ...]:
    id_, version, name, deleted_at, slug, image_url = organization
    return id_, name, *(version or (None, None)), maybe_datetime(deleted_at), slug, image_url


def _membership_row(clerk_id: str, membership: Membership) -> tuple[object, ...]:
    id_, organization_id, joined_at, ended_at, version, role = membership
    times = to_datetime(joined_at), maybe_datetime(ended_at)
    return clerk_id, id_, organization_id, *times, role, *(version or (None, None))

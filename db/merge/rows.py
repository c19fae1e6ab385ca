"""Converts between the stored rows of a batch's users and changes. Pure: no I/O."""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from db.merge.address import storable_address
from db.merge.change import (
    DEFAULT_ROLE,
    DELETED_NAME,
    EmailClaim,
    Membership,
    Organization,
    Profile,
    Source,
    UserChange,
    Version,
    latest_source,
    merge,
    placeholder_address,
)
from db.merge.incoming import Outcome, ReceivedChange
from db.merge.policy import Policy
from db.times import LATEST, maybe_datetime, maybe_ms, to_datetime, to_ms

# The version of a row that the application wrote: older than every event.
UNVERSIONED = Version(-1, -1)


class SyncRow(NamedTuple):
    """A row of `user_sync`, its columns in their order."""

    clerk_id: str
    profile_updated_at: int | None = None
    profile_observed_at: int | None = None
    claimed_email: str | None = None
    claim_updated_at: int | None = None
    claim_observed_at: int | None = None
    last_login_at: datetime | None = None
    deleted_at: datetime | None = None
    claim_verified: bool = False
    instance_id: str | None = None
    instance_seen_at: int | None = None


class UserRow(NamedTuple):
    """A row of `users` without its `id`."""

    clerk_id: str
    email: str
    name: str
    organization: str | None
    role: str
    created_at: datetime
    last_login_at: datetime | None


class TargetRow(NamedTuple):
    """The row that a user must have. The columns `left_alone` are not written."""

    row: UserRow
    left_alone: tuple[str, ...]


class ProfileRow(NamedTuple):
    """A row of `user_profiles`, the profile as canonical JSON."""

    clerk_id: str
    profile: str
    updated_at: datetime


class StoredUser(NamedTuple):
    """A user's rows in `user_sync`, `users` and `user_profiles`, None where there is none."""

    sync: SyncRow | None = None
    user: UserRow | None = None
    profile: ProfileRow | None = None

    @property
    def is_deleted(self) -> bool:
        """Whether there is a tombstone."""
        return self.sync is not None and self.sync.deleted_at is not None


def stored_change(
    clerk_id: str, stored: StoredUser, memberships: tuple[Membership, ...], policy: Policy
) -> UserChange:
    """Return a user's stored state as a change; a missing row of `users` counts as no profile."""
    sync, user = stored.sync or SyncRow(clerk_id), stored.user
    moments = (sync.last_login_at, user and user.last_login_at)
    logins = [moment for moment in moments if moment and moment < LATEST]
    return UserChange(
        sync.clerk_id,
        None if user is None else _stored_profile(sync, user, stored.profile, policy),
        _stored_claim(sync, user),
        to_ms(max(logins)) if logins else None,
        maybe_ms(sync.deleted_at),
        memberships,
        source=None if sync.instance_id is None else Source(sync.instance_seen_at or 0, sync.instance_id),
    )


def apply_batch(
    known: dict[str, UserChange], batch: Sequence[ReceivedChange], policy: Policy
) -> tuple[dict[str, UserChange], list[Outcome]]:
    """Merge the batch into the known state; return the new state, and the outcome of each change.

    Organizations are merged elsewhere (`db.apply.memberships`), which may change the outcome. A new instance
    is stored, but does not make the outcome `applied`.
    """
    known = {clerk_id: redact_deleted(change, policy) for clerk_id, change in known.items()}
    outcomes = []
    for incoming in batch:
        if isinstance(incoming.change, Organization):
            says_something = incoming.change != Organization(incoming.change.id)
            follows = policy.follows_memberships
            outcomes.append(Outcome.STALE if follows and says_something else Outcome.IGNORED)
            continue
        change = _own_part(incoming.change, policy)
        before = known[change.clerk_id]
        after = redact_deleted(merge(before, change), policy)
        known[change.clerk_id] = after._replace(source=latest_source(before.source, incoming.source))
        if after != before:
            outcomes.append(Outcome.APPLIED)
        else:
            says_nothing = change == UserChange(change.clerk_id)
            outcomes.append(Outcome.IGNORED if says_nothing else Outcome.STALE)
    return known, outcomes


def _own_part(change: UserChange, policy: Policy) -> UserChange:
    if not change.organizations and (policy.follows_memberships or not change.memberships):
        return change
    return change._replace(
        organizations=(), memberships=change.memberships if policy.follows_memberships else ()
    )


def redact_deleted(change: UserChange, policy: Policy) -> UserChange:
    """Return the state that may be kept of a user: after a deletion, nothing personal."""
    if change.deleted_at is None:
        return change
    profile = change.profile if policy.anonymize else None
    if profile is not None:
        profile = profile._replace(name=DELETED_NAME, organization=None, role=DEFAULT_ROLE, fields=None)
    return UserChange(change.clerk_id, profile, deleted_at=change.deleted_at, source=change.source)


def sync_row(change: UserChange) -> SyncRow:
    """Return the row of `user_sync` for the known state."""
    profile = change.profile.version if change.profile else None
    claim = change.email.version if change.email else None
    return SyncRow(
        change.clerk_id,
        profile and profile.updated_at,
        profile and profile.observed_at,
        change.email and change.email.address,
        claim and claim.updated_at,
        claim and claim.observed_at,
        maybe_datetime(change.login_at),
        maybe_datetime(change.deleted_at),
        change.email is not None and change.email.verified,
        change.source and change.source.instance_id,
        change.source and change.source.seen_at,
    )


def target_row(
    change: UserChange, stored: UserRow | None, email: str | None, policy: Policy
) -> TargetRow | None:
    """Return the row of `users` for the known state; None if there must be none.

    `email` is the address that the user gets, None if the stored one stays.
    """
    profile = change.profile
    if profile is None:
        return None
    left_alone = policy.left_alone if change.deleted_at is None else ()
    row = UserRow(
        change.clerk_id,
        email or (stored.email if stored else placeholder_address(change.clerk_id)),
        profile.name,
        stored.organization if stored and "organization" in left_alone else profile.organization,
        stored.role if stored and "role" in left_alone else profile.role,
        to_datetime(profile.created_at),
        maybe_datetime(change.login_at),
    )
    keeps_email = stored is not None and row.email == stored.email
    return TargetRow(row, (*left_alone, "email") if keeps_email else left_alone)


def profile_row(change: UserChange) -> ProfileRow | None:
    """Return the row of `user_profiles` for the known state; None if there must be none."""
    profile = change.profile
    if profile is None or profile.fields is None:
        return None
    return ProfileRow(change.clerk_id, profile.fields, to_datetime(profile.version.updated_at))


def _stored_profile(sync: SyncRow, user: UserRow, stored: ProfileRow | None, policy: Policy) -> Profile:
    return Profile(
        _version(sync.profile_updated_at, sync.profile_observed_at),
        to_ms(user.created_at),
        user.name,
        user.organization if policy.owns_organization else None,
        user.role if policy.owns_role else DEFAULT_ROLE,
        stored.profile if stored and policy.keeps_fields else None,
    )


def _stored_claim(sync: SyncRow, user: UserRow | None) -> EmailClaim | None:
    if sync.claim_updated_at is not None:
        version = _version(sync.claim_updated_at, sync.claim_observed_at)
        return EmailClaim(version, sync.claimed_email, sync.claim_verified)
    if user is not None and storable_address(user.email):  # a placeholder, even another user's, is no claim
        return EmailClaim(UNVERSIONED, user.email)
    return None


def _version(updated_at: int | None, observed_at: int | None) -> Version:
    return UNVERSIONED if updated_at is None or observed_at is None else Version(updated_at, observed_at)

"""The one function that writes users: a batch of changes becomes rows, in one transaction.

The stored state is read as a change, merged with the batch by `db.merge.change.merge`, and written back.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import psycopg

from db.apply import memberships, placeholders, profiles, statements
from db.apply.memberships import MembershipWrites, StoredMemberships
from db.apply.profiles import stored_profile
from db.connection.engine import Database
from db.connection.errors import ROWS_MISSING, ChangeRefused
from db.connection.pipeline import Pipeline
from db.merge.change import UserChange, Version, placeholder_address
from db.merge.claims import ClaimRank, CompetingClaim, resolve
from db.merge.incoming import Outcome, ReceivedChange
from db.merge.policy import Policy
from db.merge.rows import (
    ProfileRow,
    StoredUser,
    SyncRow,
    TargetRow,
    UserRow,
    apply_batch,
    stored_change,
    sync_row,
    target_row,
)
from db.models import EMAIL_INDEX
from db.times import maybe_datetime, to_datetime


class StoredState(NamedTuple):
    """The stored rows of a batch's users, and of other users who hold or claim their addresses."""

    sync: dict[str, SyncRow]
    users: dict[str, UserRow]
    contested: frozenset[str]
    competing: list[CompetingClaim]
    holders: list[UserRow]
    without_history: frozenset[str]
    memberships: StoredMemberships | None
    profiles: dict[str, ProfileRow]

    def change(self, clerk_id: str, policy: Policy) -> UserChange:
        """Return what is stored of a user."""
        rows = StoredUser(self.sync[clerk_id], self.users.get(clerk_id), self.profiles.get(clerk_id))
        stays = self.memberships.memberships.get(clerk_id, ()) if self.memberships else ()
        return stored_change(clerk_id, rows, stays, policy)


class UnrecordedClaims(Exception):
    """The batch takes addresses from rows that the application wrote, whose claims are not recorded yet."""

    def __init__(self, clerk_ids: frozenset[str]) -> None:
        super().__init__()
        self.clerk_ids = clerk_ids


class Writes(NamedTuple):
    """The writes to `users`: rows to delete or change, addresses to release and to assign."""

    gone: list[str]
    changed: tuple[list[TargetRow], list[TargetRow]]
    vacated: list[tuple[str, str]]
    assigned: list[tuple[str, str]]

    @property
    def touched(self) -> set[str]:
        """Return the users whose rows are deleted or changed."""
        changed = (target.row.clerk_id for step in self.changed for target in step)
        return {*self.gone, *changed, *(clerk_id for clerk_id, _ in (*self.vacated, *self.assigned))}


def apply(
    database: Database, batch: Sequence[ReceivedChange], policy: Policy, *, waits_briefly: bool = False
) -> list[Outcome]:
    """Merge `batch` into the tables and record it in the ledger; return what each change did, in order.

    1. Lock the users' rows in `user_sync`, in one order, then the addresses concerned, in one order, then
       the organizations.
    2. Read what is stored; each statement sees what others had committed when its locks were granted.
    3. Merge, and decide who has each address.
    4. Lock the rows of `users` to be written, in one order, and write.

    If a row without history loses its address, it is added to the batch, so that its claim is recorded, and
    all steps run again. They also run again after a row has given up another user's placeholder.

    Two round trips, whatever the size of the batch. If the process is killed, all or nothing is written. With
    `waits_briefly` a lock is waited for less long than BATCH_LIMITS say.
    Raises DatabaseUnavailable or ChangeRefused.
    """
    batch = [incoming.of_instance(policy.instance_id) for incoming in batch]
    added: frozenset[str] = frozenset()
    has_freed = False
    while batch:
        try:
            work = partial(_apply, batch=batch, added=added, policy=policy, waits_briefly=waits_briefly)
            return database.run_pipeline(work)
        except UnrecordedClaims as found:
            added |= found.clerk_ids
        except ChangeRefused as refused:
            if has_freed or refused.constraint != EMAIL_INDEX or not placeholders.free(database):
                raise
            has_freed = True
    return []


def _apply(
    pipeline: Pipeline,
    batch: Sequence[ReceivedChange],
    added: frozenset[str],
    policy: Policy,
    *,
    waits_briefly: bool,
) -> list[Outcome]:
    if waits_briefly:
        pipeline.send(statements.WAIT_BRIEFLY)
    stored = _lock_and_read(pipeline, batch, added, policy)
    before = {clerk_id: stored.change(clerk_id, policy) for clerk_id in stored.sync}
    known, outcomes = apply_batch(before, batch, policy)
    writes = _decide(known, stored, policy)
    losing = stored.without_history.intersection(clerk_id for clerk_id, _ in writes.vacated)
    if losing:
        raise UnrecordedClaims(losing)
    member_writes = stored.memberships and memberships.decide(stored.memberships, known, batch)
    touched = writes.touched
    _lock_users(pipeline, touched, member_writes)
    _write_users(pipeline, writes, stored)
    synced = _write_sync(pipeline, known, stored.sync)
    if touched or synced:
        ids = sorted(touched.difference(writes.gone))
        pipeline.send(statements.REQUIRE_WRITTEN, ids=ids, sync_ids=synced, gone=writes.gone)
    deleted = [
        clerk_id
        for clerk_id, change in known.items()
        if change.deleted_at is not None and before[clerk_id].deleted_at is None
    ]
    # Whether or not profiles and memberships are kept now, they may have been.
    for statement in (statements.DELETE_MEMBERSHIPS, statements.DELETE_PROFILES, statements.REQUIRE_DELETED):
        pipeline.send_ids(statement, deleted)
    if policy.keeps_fields:
        profiles.write(pipeline, known, stored.profiles)
    if member_writes:
        outcomes = memberships.outcomes(member_writes, outcomes)
        memberships.write(pipeline, member_writes, policy.organization_value)
    _record(pipeline, batch, outcomes)
    return outcomes


def _lock_and_read(
    pipeline: Pipeline, batch: Sequence[ReceivedChange], added: frozenset[str], policy: Policy
) -> StoredState:
    changes = [incoming.change for incoming in batch if isinstance(incoming.change, UserChange)]
    ids = sorted({*added, *(change.clerk_id for change in changes)})
    moving = [change for change in changes if _concerns_address(change)]
    concerned = sorted({change.clerk_id for change in moving})
    addresses = sorted({change.email.address for change in moving if change.email and change.email.address})

    pipeline.send(statements.ADD_SYNC_ROWS, ids=ids)
    sync = pipeline.send(statements.LOCK_SYNC_ROWS, ids=ids)
    if concerned:
        pipeline.send(statements.LOCK_ADDRESSES, ids=concerned, addresses=addresses)
    read_memberships = memberships.lock_and_ask(pipeline, batch) if policy.follows_memberships else None
    users = pipeline.send(statements.READ_USERS, ids=ids)
    fields = pipeline.send(statements.READ_PROFILES, ids=ids) if policy.keeps_fields else None
    contested: Any = ()
    if concerned:
        contested = pipeline.send(statements.READ_CONTESTED, ids=concerned, addresses=addresses, all_ids=ids)
    pipeline.wait()

    sync_rows = {row[0]: SyncRow(*row) for row in sync.fetchall()}
    if len(sync_rows) < len(ids):  # suppressed as REQUIRE_WRITTEN says, or deleted meanwhile
        raise psycopg.errors.lookup(ROWS_MISSING)
    claims = [(row[0], row[1:6], row[6:]) for row in contested]
    held = [
        (UserRow(*row), is_unclaimed) for _, _, (*row, is_unclaimed) in claims if is_unclaimed is not None
    ]
    return StoredState(
        sync_rows,
        {row[0]: UserRow(*row) for row in users.fetchall()},
        frozenset(address for address, _, _ in claims),
        [_competing_claim(address, claim) for address, claim, _ in claims if claim[0] is not None],
        [row for row, _ in held],
        frozenset(
            row.clerk_id for row, is_unclaimed in held if is_unclaimed and row.clerk_id not in sync_rows
        ),
        read_memberships() if read_memberships else None,
        {row[0]: stored_profile(*row) for row in fields} if fields else {},
    )


def _competing_claim(address: str, claim: Sequence[Any]) -> CompetingClaim:
    clerk_id, verified, updated_at, observed_at, current = claim
    return CompetingClaim(address, ClaimRank(verified, Version(updated_at, observed_at), clerk_id), current)


def _concerns_address(change: UserChange) -> bool:
    """Say whether a change can move an address: a new claim, a row that appears, or one that goes."""
    return change.profile is not None or change.email is not None or change.deleted_at is not None


def _decide(known: dict[str, UserChange], stored: StoredState, policy: Policy) -> Writes:
    holder_of = resolve(known.values(), stored.competing, stored.contested)
    targets = _targets(known, stored, holder_of, policy)
    changed = [target for clerk_id, target in targets.items() if target.row != stored.users.get(clerk_id)]
    first, second, parked = _steps(changed, stored.users)
    return Writes(
        gone=sorted(stored.users.keys() - targets.keys()),
        changed=(first, second),
        vacated=[(id_, placeholder_address(id_)) for id_ in (*_vacated(stored, holder_of), *parked)],
        assigned=_assigned(stored.competing, holder_of),
    )


def _lock_users(pipeline: Pipeline, touched: set[str], member_writes: MembershipWrites | None) -> None:
    if member_writes:
        ids = sorted(touched.union(member_writes.concerned))
        pipeline.send(statements.LOCK_USERS_AND_MEMBERS, ids=ids, changed=member_writes.renamed)
    else:
        pipeline.send_ids(statements.LOCK_USERS, sorted(touched))


def _write_users(pipeline: Pipeline, writes: Writes, stored: StoredState) -> None:
    pipeline.send_ids(statements.DELETE_USERS, writes.gone)
    pipeline.send_rows(statements.SET_EMAILS, writes.vacated)
    for step in writes.changed:
        for left_alone in sorted({target.left_alone for target in step}):
            rows = [target.row for target in step if target.left_alone == left_alone]
            old = [row for row in rows if row.clerk_id in stored.users]
            new = [row for row in rows if row.clerk_id not in stored.users]
            pipeline.send_rows(statements.update_users(left_alone), old)
            pipeline.send_rows(statements.insert_users(left_alone), new)
    pipeline.send_rows(statements.SET_EMAILS, writes.assigned)


def _targets(
    known: dict[str, UserChange], stored: StoredState, holder_of: dict[str, str], policy: Policy
) -> dict[str, TargetRow]:
    emails = {clerk_id: address for address, clerk_id in holder_of.items()}
    return {
        clerk_id: target
        for clerk_id, change in known.items()
        if (target := target_row(change, stored.users.get(clerk_id), _email(change, emails, stored), policy))
    }


def _email(change: UserChange, emails: dict[str, str], stored: StoredState) -> str | None:
    """Return the address that the user gets, None if it stays as it is.

    It stays if the batch does not concern it: then its lock is not held, and another transaction may be
    releasing or assigning it right now.
    """
    claimed = change.email.address if change.email and change.deleted_at is None else None
    if claimed is not None and claimed not in stored.contested:
        return None
    return emails.get(change.clerk_id) or placeholder_address(change.clerk_id)


def _vacated(stored: StoredState, holder_of: dict[str, str]) -> list[str]:
    """Return the users outside the batch who hold an address that now belongs to another user."""
    return [
        row.clerk_id
        for row in stored.holders
        if row.clerk_id not in stored.sync and holder_of.get(row.email, row.clerk_id) != row.clerk_id
    ]


def _steps(
    changed: list[TargetRow], stored: dict[str, UserRow]
) -> tuple[list[TargetRow], list[TargetRow], list[str]]:
    """Return the rows to write first, those to write second, and the users who get a placeholder before.

    PostgreSQL checks uniqueness row by row. A row is written once, so that a trigger sees each change once;
    only in a cycle or a longer chain does a row have the placeholder in between.
    """
    holders = {row.email: row.clerk_id for target in changed if (row := stored.get(target.row.clerk_id))}
    first: list[TargetRow] = []
    second: list[TargetRow] = []
    for target in changed:
        is_free = holders.get(target.row.email, target.row.clerk_id) == target.row.clerk_id
        (first if is_free else second).append(target)
    waiting = {target.row.clerk_id for target in second}
    wanted = {target.row.email for target in second}
    parked = [id_ for address, id_ in holders.items() if address in wanted and id_ in waiting]
    return first, second, parked


def _assigned(competing: Sequence[CompetingClaim], holder_of: dict[str, str]) -> list[tuple[str, str]]:
    """Return the users outside the batch who get an address that was released."""
    return [
        (rank.clerk_id, address)
        for address, rank, current in competing
        if holder_of[address] == rank.clerk_id and current != address
    ]


def _record(pipeline: Pipeline, batch: Sequence[ReceivedChange], outcomes: Sequence[Outcome]) -> None:
    """Send the ledger's rows, one for each delivery, and the instances; what is there keeps its row."""
    rows = [
        (i.svix_id, i.type, i.subject, maybe_datetime(i.event_at), to_datetime(i.received_at), outcome.value)
        for i, outcome in zip(batch, outcomes, strict=True)
        if i.svix_id is not None
    ]
    pipeline.send_rows(statements.RECORD_EVENTS, rows)
    instances = sorted({incoming.instance_id for incoming in batch if incoming.instance_id is not None})
    pipeline.send_ids(statements.ADD_INSTANCES, instances)
    svix_ids = list({row[0] for row in rows})
    if svix_ids or instances:
        pipeline.send(statements.REQUIRE_RECORDED, svix_ids=svix_ids, instances=instances)


def _write_sync(pipeline: Pipeline, known: dict[str, UserChange], stored: dict[str, SyncRow]) -> list[str]:
    """Send the rows that differ; return their Clerk ids."""
    rows = [row for change in known.values() if (row := sync_row(change)) != stored[row.clerk_id]]
    pipeline.send_rows(statements.UPDATE_SYNC_ROWS, rows)
    return [row.clerk_id for row in rows]

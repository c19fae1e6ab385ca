"""Reads one user from Clerk's API into the tables, and returns the row."""

from enum import StrEnum
from typing import Any, NamedTuple

from db.drift import users as user_drift
from db.merge.change import UserChange, merge
from db.times import to_ms
from worker.clerk.api import ClerkRefused, Page, unexpected
from worker.clerk.changes import user_change
from worker.sync.context import RECENT_MS, SyncContext
from worker.sync.reconcile_memberships import memberships_now

OTHERS = 20


class PullOutcome(StrEnum):
    """The result of a pull."""

    FOUND = "found"
    DELETED = "deleted"  # Clerk has no such user; now deleted here
    ABSENT = "absent"  # Clerk has no such user; nothing was changed here
    UNPROVEN = "unproven"  # Clerk has none of the other local users either; nothing was changed here
    ELSEWHERE = "elsewhere"  # not in Clerk; may be a user of another instance, so nothing was changed here


class Pulled(NamedTuple):
    """The result of a pull; `user` is the row, None if there is none."""

    outcome: PullOutcome
    user: dict[str, Any] | None = None


def pull(context: SyncContext, clerk_id: str, *, confirmed: bool) -> Pulled:
    """Read one user from Clerk into the tables. If Clerk has no such user, the local one is deleted for good.

    A user of another Clerk instance than the key's is not deleted. Unless `confirmed` (an operator has
    checked the id), these are not deleted either: a user without a row, a user who signed up within the last
    minute (Clerk may not return new users yet), and any user while Clerk has none of the other local users.
    Raises ClerkApiError, DatabaseError, Stopped, and the errors of the limiter of `context.api`.
    """
    context.api.check_instance()
    page = context.api.user(clerk_id)
    if page.entries:
        return _store(context, clerk_id, page)
    if not confirmed and not _is_settled(context, clerk_id):
        return Pulled(PullOutcome.ABSENT)
    if not context.own([clerk_id]):
        return Pulled(PullOutcome.ELSEWHERE)
    others = [other for other in user_drift.some_ids(context.database, OTHERS) if other != clerk_id]
    second_look = context.api.users([clerk_id, *others])
    if clerk_id in second_look.ids:
        return _store(context, clerk_id, second_look)
    if not confirmed and others and not set(others) & set(second_look.ids):
        return Pulled(PullOutcome.UNPROVEN)
    context.write([UserChange(clerk_id, deleted_at=second_look.observed_at)], second_look.observed_at)
    return Pulled(PullOutcome.DELETED)


def _store(context: SyncContext, clerk_id: str, page: Page) -> Pulled:
    users = [user for user in page.users if user.id == clerk_id]
    if not users:
        raise unexpected("that user")
    change = user_change(users[0], page.observed_at)
    if context.policy.follows_memberships:
        change = merge(change, memberships_now(context, clerk_id))
    refused = context.write([change], page.observed_at)
    if refused:
        raise ClerkRefused(refused[0].reason)
    return Pulled(PullOutcome.FOUND, user_drift.find(context.database, clerk_id))


def _is_settled(context: SyncContext, clerk_id: str) -> bool:
    """Say whether the user has a row and signed up before the last minute."""
    user = user_drift.find(context.database, clerk_id)
    return user is not None and to_ms(user["created_at"]) < context.api.clock_ms() - RECENT_MS

"""Finds and fixes differences of memberships: a part of `worker.sync.reconcile`.

1. List all memberships of the instance, 500 per request, and compare each page with the tables. An entry that
   cannot be read counts as listed, by its id if that can be read.
2. Check again the users who differ but may have changed meanwhile, after deliveries have had time to arrive,
   and all users with a membership here that was not listed: it has ended if the user's own complete list does
   not show it either.
3. The end of a membership is final. Hence the refusals, as for deleted users.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import reduce
from typing import NamedTuple

from db.drift import memberships as membership_drift
from db.drift import users as user_drift
from db.drift.memberships import MembershipsById
from db.merge.change import (
    Membership,
    UserChange,
    merge,
    merge_by_id,
    merge_memberships,
    merge_organizations,
)
from worker.clerk.api import MAX_PAGE, Page
from worker.clerk.changes import member_change
from worker.clerk.lookup import Members, members_of
from worker.clerk.pagination import Position, paginate_members
from worker.sync.context import RECENT_MS, ROWS_AT_A_TIME, SyncContext
from worker.threads import chunks

ASKED_ALONE = 20  # users; for more, all memberships are listed if that takes fewer requests

OnProgress = Callable[[int, int], object]


class MemberReport(NamedTuple):
    """The result for memberships: how many Clerk lists, how many are stored, and which of these have ended.

    The last are changes that end them, one for each user.
    """

    listed: int
    local: int
    ended: tuple[UserChange, ...]


class MemberDrift:
    """Compares memberships and corrects them. `allow_deletes` replaces the limit of RECONCILE_MAX_DELETE."""

    def __init__(self, context: SyncContext, allow_deletes: int | None, on_progress: OnProgress) -> None:
        self._context = context
        self._allow_deletes = allow_deletes
        self._on_progress = on_progress
        self._recent_ms = context.api.clock_ms() - RECENT_MS
        self._listed: set[int] = set()  # hashes of ids
        self._without_id = 0
        self._here = 0
        self._unlisted: dict[str, list[Membership]] = {}
        self._suspects: set[str] = set()
        self._differing: set[str] = set()
        self._wrong_column: set[str] = set()
        self._ended: list[UserChange] = []

    @property
    def stale(self) -> set[str]:
        """The users whose memberships differ, or whose column `organization` does not match them."""
        return self._differing | self._wrong_column

    @property
    def is_doubtful(self) -> bool:
        """Whether any user must be checked again."""
        return bool(self._suspects or self._unlisted)

    def report(self) -> MemberReport:
        """Return the report; `stale` is separate."""
        return MemberReport(len(self._listed), self._here, tuple(self._ended))

    def first_look(self) -> str | None:
        """Compare all memberships that Clerk lists; say why the listing proves nothing, if so.

        Raises ClerkApiError, DatabaseError, Stopped.
        """
        counted = self._context.api.count_members()
        for step in paginate_members(self._context.api, Position()):
            counted = min(counted, step.page.total or 0)
            self._listed.update(map(hash, step.page.ids))
            self._without_id += len(step.page.entries) - len(step.page.ids)
            for shown, stored in self._differences(changes_in(step.page)):
                self._differing.add(shown.clerk_id)
                if membership_drift.may_have_moved(shown, stored, self._recent_ms):
                    self._suspects.add(shown.clerk_id)
            self._on_progress(step.position.seen, counted)
        self._look_here()
        listed = len(self._listed) + self._without_id
        if listed < counted:
            came = f"{listed} of {counted} memberships came"
            return f"the listing was cut short: {came}. Try again later"
        return None

    def second_look(self, gone: Collection[str]) -> str | None:
        """Check all doubtful users again, except those who are `gone`; say why nothing may end, if so.

        Raises like `first_look`.
        """
        unlisted = {clerk_id: them for clerk_id, them in self._unlisted.items() if clerk_id not in gone}
        refusal = self._refusal(sum(map(len, unlisted.values())))
        if refusal is not None:
            self._differing |= unlisted.keys()
            return refusal
        doubtful = self._suspects | unlisted.keys()
        self._differing -= doubtful
        for changes in self._confirmed(self._suspects - unlisted.keys(), len(self._listed)):
            self._differing |= {shown.clerk_id for shown, _ in self._differences(changes)}
        for members in members_of(self._context.api, unlisted):
            self._look_at(members, unlisted[members.clerk_id])
            self._on_progress(0, 0)
        return None

    def fix(self, report: MemberReport, clerk_ids: Iterable[str]) -> list[str]:
        """End the memberships that have ended by `report`, and merge Clerk's memberships of those users.

        Return the ids of users who still differ. Raises like `first_look`.
        """
        left: set[str] = set()
        for ended in chunks(report.ended, ROWS_AT_A_TIME):
            left |= {clerk_id for clerk_id, _ in self._context.write(ended, self._context.api.clock_ms())}
        wanted = {*clerk_ids, *(change.clerk_id for change in report.ended)}
        for changes in self._confirmed(wanted, report.listed):
            left |= {clerk_id for clerk_id, _ in self._context.write(changes, self._context.api.clock_ms())}
            left |= {shown.clerk_id for shown, _ in self._differences(changes)}
        for chunk in chunks(wanted, ROWS_AT_A_TIME):
            left |= set(self._wrong_organization(chunk))
        return sorted(left)

    def _wrong_organization(self, clerk_ids: Sequence[str]) -> list[str]:
        value = self._context.policy.organization_value
        return membership_drift.wrong_organization(self._context.database, clerk_ids, value)

    def _look_here(self) -> None:
        """Find the stored memberships that were not listed, and columns that do not match the tables.

        A membership that began after the listing cannot have been in it.
        """
        for rows in membership_drift.current(self._context.database):
            self._here += len(rows)
            for clerk_id, membership in rows:
                if hash(membership.id) not in self._listed and membership.joined_at < self._recent_ms:
                    self._unlisted.setdefault(clerk_id, []).append(membership)
        own = self._context.own(self._unlisted)
        self._unlisted = {clerk_id: them for clerk_id, them in self._unlisted.items() if clerk_id in own}
        for clerk_ids in user_drift.living_ids(self._context.database):
            self._wrong_column.update(self._wrong_organization(clerk_ids))

    def _look_at(self, members: Members, unlisted: Sequence[Membership]) -> None:
        """Compare one user's own list; `unlisted` memberships that it lacks have ended."""
        page = members.page
        if page is None:  # the user was deleted meanwhile
            return
        if any(self._differences(changes_in(page))):
            self._differing.add(members.clerk_id)
        current = {membership.id for membership in _current(self._context, members.clerk_id)}
        ended = _ended(page, [membership for membership in unlisted if membership.id in current])
        if ended:
            self._differing.add(members.clerk_id)
            self._ended.append(UserChange(members.clerk_id, memberships=ended))

    def _confirmed(self, clerk_ids: Collection[str], listed: int) -> Iterator[list[UserChange]]:
        """Yield Clerk's current memberships of those users, in as few requests as possible."""
        if len(clerk_ids) <= max(ASKED_ALONE, listed // MAX_PAGE):
            of_each = members_of(self._context.api, sorted(clerk_ids))
            pages = (members.page for members in of_each if members.page)
        else:
            pages = (step.page for step in paginate_members(self._context.api, Position()))
        for page in pages:
            self._on_progress(0, 0)
            yield [change for change in changes_in(page) if change.clerk_id in clerk_ids]

    def _differences(self, changes: Sequence[UserChange]) -> Iterator[tuple[UserChange, MembershipsById]]:
        """Yield the local users whose memberships differ from Clerk's, with the stored ones."""
        stored = membership_drift.read(self._context.database, [change.clerk_id for change in changes])
        for change in changes:
            local = stored.get(change.clerk_id)
            if local is not None and membership_drift.differs(change, local):
                yield change, local

    def _refusal(self, ends: int) -> str | None:
        """Say why so many memberships must not end, None if they may."""
        override = f"If they have ended indeed: --allow-deletes {ends}"
        allowed = self._allow_deletes
        if allowed is None:
            if ends and not len(self._listed):
                return f"Clerk lists no memberships, and {self._here} are here. {override}"
            allowed = self._context.deletions_allowed(self._here)
        if ends > allowed:
            gone = f"{ends} of {self._here} memberships are not in Clerk"
            return f"{gone}, more than {allowed} at a time. {override}"
        return None


def changes_in(page: Page) -> list[UserChange]:
    """Return what a page of memberships says, one change for each user."""
    found: defaultdict[str, list[UserChange]] = defaultdict(list)
    for member in page.members:
        found[member.user_id].append(member_change(member, page.observed_at))
    return [
        UserChange(  # all at once: merging one by one takes quadratic time
            clerk_id,
            memberships=merge_by_id(merge_memberships, (), [it for each in them for it in each.memberships]),
            organizations=merge_by_id(
                merge_organizations, (), [it for each in them for it in each.organizations]
            ),
        )
        for clerk_id, them in found.items()
    ]


def memberships_now(context: SyncContext, clerk_id: str) -> UserChange:
    """Return Clerk's current memberships of one user, and ends for the stored ones that have ended.

    A membership has ended if two requests both lack it, unless it began recently. Raises ClerkApiError,
    DatabaseError, Stopped.
    """
    recent_ms = context.api.clock_ms() - RECENT_MS
    local = [membership for membership in _current(context, clerk_id) if membership.joined_at < recent_ms]
    page = _page(context, clerk_id)
    shown = changes_in(page) if page else []
    ended = _ended(page, local) if page else ()
    if ended:
        again = _page(context, clerk_id)
        ended = _ended(again, ended) if again else ()
    change = UserChange(clerk_id, memberships=merge_by_id(merge_memberships, (), ended))
    return reduce(merge, (it for it in shown if it.clerk_id == clerk_id), change)


def _page(context: SyncContext, clerk_id: str) -> Page | None:
    return next(members_of(context.api, [clerk_id])).page


def _current(context: SyncContext, clerk_id: str) -> list[Membership]:
    """Return the stored memberships of one user that have not ended."""
    stored = membership_drift.read(context.database, [clerk_id]).get(clerk_id, {})
    return [held.membership for held in stored.values() if held.membership.ended_at is None]


def _ended(page: Page, memberships: Sequence[Membership]) -> tuple[Membership, ...]:
    """Return the memberships that a user's own list lacks; none if any entry of the list has no id."""
    if len(page.ids) < len(page.entries):
        return ()
    shown = set(page.ids)
    return tuple(
        membership._replace(ended_at=page.observed_at)
        for membership in memberships
        if membership.id not in shown
    )

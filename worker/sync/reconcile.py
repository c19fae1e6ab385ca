"""Finds the differences between the tables and Clerk (drift), and fixes them through the merge.

1. List all of Clerk's users and compare each page with the tables. Only a hash of each listed id is kept: it
   has 64 bits and a random key in every process (PEP 456), so ids with the same hash cannot be constructed.
2. A listing with fewer users than Clerk counts, readable or not, does not prove any deletion: the
   reconciliation ends here. Before that the end of the listing is read again: a user who signed up after it
   was read may be counted in place of one who was deleted before the listing reached that user.
3. Check again, by id, the local users who were not listed, and those who may have changed meanwhile, after
   deliveries have had time to arrive. A user was deleted only if Clerk answers a request for that single user
   with "not found".
4. If memberships determine `organization`, compare them too (`worker.sync.reconcile_memberships`).
5. Fixing reads each user once more and merges; a user deleted in Clerk gets a tombstone, which is final.
   Hence the refusals: see `Report.refusal`.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import starmap
from typing import Any, NamedTuple

import structlog

from db.apply import leftovers
from db.apply.leftovers import Leftovers
from db.drift import users as user_drift
from db.drift.users import Difference, Kind
from db.merge.change import CLERK_ID, UserChange
from db.merge.rows import StoredUser
from db.times import to_ms
from worker.clerk.api import Page
from worker.clerk.changes import user_change
from worker.clerk.lookup import confirm_by_id, look_up
from worker.clerk.pagination import Position, paginate
from worker.sync.context import RECENT_MS, ROWS_AT_A_TIME, SyncContext
from worker.sync.reconcile_memberships import MemberDrift, MemberReport, OnProgress
from worker.threads import chunks

ALL_UNKNOWN_FROM = 3  # local users, none of them in Clerk: the key may be of another instance
SETTLE_S = 3.0  # time for deliveries of the newest changes to arrive

log = structlog.get_logger("worker.sync.reconcile")


class Stale(NamedTuple):
    """A user whose row differs in these columns."""

    clerk_id: str
    columns: tuple[str, ...]


class Claim(NamedTuple):
    """A user whose address the user `held_by` has here, but not in Clerk; None if no user has it."""

    clerk_id: str
    held_by: str | None


class Report(NamedTuple):
    """The drift: the users who differ, and how. Only ids and names of columns.

    listed      number of users in Clerk's listing; `counted` is the number that Clerk gives
    local       number of users who have a row
    ghost       users who have a row and were deleted in Clerk, each with the time (ms) of that observation
    tombstone   users who were deleted here, but not in Clerk
    invalid     entries of the listing that cannot be read
    refusal     why nothing may be fixed by this report, whose ghosts are then unproven; None if it may
    memberships the result for memberships, if used; their users are stale in the column `organization`
    elsewhere   number of users with a row who were not listed, but may belong to another Clerk instance
    leftovers   rows that changed settings have left behind
    """

    listed: int
    counted: int
    local: int
    missing: list[str]
    stale: list[Stale]
    ghost: dict[str, int]
    claims: list[Claim]
    tombstone: list[str]
    invalid: int
    refusal: str | None
    memberships: MemberReport | None = None
    elsewhere: int = 0
    leftovers: Leftovers = Leftovers()

    @property
    def to_refresh(self) -> list[str]:
        """The ids of the users to read from Clerk once more."""
        holders = [claim.held_by for claim in self.claims if claim.held_by]
        stale, claims = ([user.clerk_id for user in users] for users in (self.stale, self.claims))
        return [*self.missing, *stale, *claims, *holders]

    @property
    def wrong_organization(self) -> list[str]:
        """The ids of the users whose organization differs."""
        return [user.clerk_id for user in self.stale if "organization" in user.columns]

    @property
    def differing(self) -> int:
        """The number of users who differ, plus the rows that changed settings have left behind."""
        lists = (self.missing, self.stale, self.ghost, self.claims, self.tombstone)
        return sum(len(users) for users in lists) + self.leftovers.total


class Reconcile:
    """Compares the tables with Clerk, and corrects them.

    `on_progress` is called with the number of users seen and expected; `allow_deletes` replaces the limit of
    RECONCILE_MAX_DELETE.
    """

    def __init__(
        self,
        context: SyncContext,
        *,
        allow_deletes: int | None = None,
        settle_s: float = SETTLE_S,
        on_progress: OnProgress = lambda _seen, _expected: None,
    ) -> None:
        self._context = context
        self._allow_deletes = allow_deletes
        self._settle_s = settle_s
        self._on_progress = on_progress

    def report(self) -> Report:
        """Compare all users. Raises ClerkApiError, DatabaseError, Stopped."""
        api = self._context.api
        api.check_instance()
        before = api.count()
        found, listed = _Found(), set[int]()
        end = self._first_look(found, listed, Position(), before)
        counted = min(before, api.count())
        if len(listed) + found.invalid < counted:
            self._first_look(found, listed, end, before)
        local, unlisted = self._unlisted(listed)
        own = self._context.own(unlisted)
        elsewhere, unlisted = len(unlisted) - len(own), [it for it in unlisted if it in own]
        refusal = _listing_refusal(len(listed), found.invalid, counted, local)
        if refusal is None and elsewhere == local >= ALL_UNKNOWN_FROM:
            override = "If it is right: clerk-sync backfill"
            refusal = f"all {local} users here are of another instance: check CLERK_SECRET_KEY. {override}"
        members = self._member_drift() if self._context.policy.follows_memberships else None
        if members and refusal is None:
            refusal = members.first_look()
        ghost: dict[str, int] = {}
        if refusal is None and (found.suspects or unlisted or (members and members.is_doubtful)):
            self._context.api.stopping.pause(self._settle_s)
            suspects = self._look_at_suspects(found)
            refusal, ghost = self._ghosts(found, [*suspects, *unlisted], local)
            if members and refusal is None:
                refusal = members.second_look(ghost)
        if members:
            found.note_organizations(members.stale)
        return Report(
            listed=len(listed),
            counted=counted,
            local=local,
            missing=list(found.differing[Kind.MISSING]),
            stale=list(starmap(Stale, found.differing[Kind.STALE].items())),
            ghost=ghost,
            claims=list(starmap(Claim, found.differing[Kind.CLAIM].items())),
            tombstone=list(found.differing[Kind.TOMBSTONE]),
            invalid=found.invalid,
            refusal=refusal,
            memberships=members.report() if members else None,
            elsewhere=elsewhere,
            leftovers=leftovers.find(self._context.database, self._context.policy),
        )

    def refresh(self, report: Report) -> Report:
        """Read the users in `report` from Clerk and merge them; return the report of those who still differ.

        The columns stay those of `report`, which must have no `refusal`. Deletes no user and ends no
        membership. Raises like `report`.
        """
        _require_trusted(report)
        left = set(self._refresh(self._refresh(report.to_refresh)))
        stale = left | self._members_left(report)
        return report._replace(
            missing=[clerk_id for clerk_id in report.missing if clerk_id in left],
            stale=[user for user in report.stale if user.clerk_id in stale],
            claims=[claim for claim in report.claims if claim.clerk_id in left],
        )

    def fix(self, report: Report) -> list[str]:
        """Correct the differences in `report`; return the ids of users who still differ.

        `report` must have no `refusal`. Raises like `report`.
        """
        _require_trusted(report)
        differing = self._refresh(report.to_refresh)
        not_deleted = self._delete_ghosts(report.ghost)
        left = self._refresh(differing)  # after its holder was refreshed or deleted, an address is free
        if report.memberships is not None:
            left += self._member_drift().fix(
                report.memberships, [*report.missing, *report.wrong_organization]
            )
        left += self._remove_leftovers(report.leftovers)
        return list(dict.fromkeys([*left, *not_deleted, *report.tombstone]))

    def _remove_leftovers(self, found: Leftovers) -> list[str]:
        """Remove the rows that the settings no longer keep; return the users whom the database refused."""
        if found.total:
            leftovers.remove(self._context.database, self._context.policy)
        refused = []
        for chunk in chunks(found.users, ROWS_AT_A_TIME):  # an empty change applies the settings
            changes = [UserChange(clerk_id) for clerk_id in chunk]
            refused += self._context.write(changes, self._context.api.clock_ms())
        return [clerk_id for clerk_id, _ in refused]

    def _members_left(self, report: Report) -> set[str]:
        """Merge the memberships in `report`; return the users whose organization still differs."""
        members = report.memberships
        if members is None:
            return set()
        unended = members._replace(ended=())
        left = self._member_drift().fix(unended, [*report.missing, *report.wrong_organization])
        return {*left, *(change.clerk_id for change in members.ended)}

    def _member_drift(self) -> MemberDrift:
        return MemberDrift(self._context, self._allow_deletes, self._on_progress)

    def _first_look(self, found: "_Found", listed: set[int], position: Position, expected: int) -> Position:
        """Compare all users that are listed after `position`; return the position of the last one."""
        recent_ms = self._context.api.clock_ms() - RECENT_MS
        for step in paginate(self._context.api, position):
            page, position = step
            ids = page.ids
            listed.update(map(hash, ids))
            found.invalid += len(page.entries) - len(ids)
            for change, stored, differences in self._compared(page):
                found.note(differences)
                if _may_have_moved(change, stored, differences, recent_ms):
                    found.suspects.add(change.clerk_id)
            self._on_progress(position.seen, expected)
        return position

    def _unlisted(self, listed: set[int]) -> tuple[int, list[str]]:
        """Return how many users have a row, and which of them were not listed, but have a valid Clerk id."""
        local, unlisted = 0, []
        for ids in user_drift.living_ids(self._context.database):
            local += len(ids)
            unlisted += [clerk_id for clerk_id in ids if hash(clerk_id) not in listed]
        return local, [clerk_id for clerk_id in unlisted if CLERK_ID.fullmatch(clerk_id)]

    def _look_at_suspects(self, found: "_Found") -> list[str]:
        """Compare the suspects again; return those whom Clerk did not return."""
        not_returned = []
        for look in look_up(self._context.api, sorted(found.suspects)):
            found.forget([*look.page.ids, *look.not_returned])
            self._note(found, look.page)
            not_returned += look.not_returned
        return not_returned

    def _ghosts(
        self, found: "_Found", candidates: list[str], local: int
    ) -> tuple[str | None, dict[str, int]]:
        """Return why no user may be deleted, if so, and the ghosts among the candidates, with times.

        If there are more candidates than may be deleted, they are not requested one by one. A user who has
        only just signed up is no ghost: Clerk may not return new users yet.
        """
        recent_ms = self._context.api.clock_ms() - RECENT_MS
        not_returned: dict[str, int] = {}
        own = self._context.own(candidates)
        for look in look_up(self._context.api, sorted(own)):
            self._note(found, look.page)
            not_returned |= dict.fromkeys(look.not_returned, look.page.observed_at)
        doubtful = self._living(not_returned, recent_ms)
        refusal = self._ghost_refusal(len(doubtful), local)
        if refusal is not None:
            return refusal, {clerk_id: not_returned[clerk_id] for clerk_id in doubtful}
        gone: dict[str, int] = {}
        for look in confirm_by_id(self._context.api, not_returned):
            self._note(found, look.page)
            gone |= dict.fromkeys(look.not_returned, look.page.observed_at)
        return None, {clerk_id: gone[clerk_id] for clerk_id in self._living(gone, recent_ms)}

    def _note(self, found: "_Found", page: Page) -> None:
        for change, _, differences in self._compared(page):
            found.note(differences, self._holder(change, differences))

    def _refresh(self, clerk_ids: Sequence[str]) -> list[str]:
        """Read users once more and merge Clerk's data; return the ids of those who still differ."""
        left, not_returned = [], []
        for look in look_up(self._context.api, dict.fromkeys(clerk_ids)):
            left += self._merge(look.page)
            not_returned += look.not_returned
        for look in confirm_by_id(self._context.api, not_returned):
            left += self._merge(look.page)
            left += self._living(look.not_returned)
        return left

    def _merge(self, page: Page) -> list[str]:
        """Merge the users of a page; return the ids of those who still differ."""
        changes = [user_change(user, page.observed_at) for user in page.users]
        self._context.write(changes, page.observed_at)
        return [change.clerk_id for change, _, differences in self._compared(page) if differences]

    def _delete_ghosts(self, ghosts: dict[str, int]) -> list[str]:
        """Write tombstones; return the ids of the users whom the database refused."""
        refused = []
        for chunk in chunks(ghosts, ROWS_AT_A_TIME):
            tombstones = [UserChange(clerk_id, deleted_at=ghosts[clerk_id]) for clerk_id in chunk]
            refused += self._context.write(tombstones, ghosts[chunk[0]])
            log.info("gone in Clerk, deleted here", users=len(chunk))
        return [clerk_id for clerk_id, _ in refused]

    def _compared(self, page: Page) -> Iterator[tuple[UserChange, StoredUser, list[Difference]]]:
        changes = [user_change(user, page.observed_at) for user in page.users]
        stored = user_drift.read(self._context.database, [change.clerk_id for change in changes])
        for change in changes:
            local = stored[change.clerk_id]
            yield change, local, user_drift.compare(change, local, self._context.policy)

    def _living(self, clerk_ids: Iterable[str], before_ms: float = math.inf) -> list[str]:
        """Return the users among those who have a row and no tombstone, and signed up before `before_ms`."""
        return [
            clerk_id
            for chunk in chunks(clerk_ids, ROWS_AT_A_TIME)
            for clerk_id, local in user_drift.read(self._context.database, chunk).items()
            if local.user and not local.is_deleted and to_ms(local.user.created_at) < before_ms
        ]

    def _holder(self, change: UserChange, differences: Iterable[Difference]) -> str | None:
        """Return the user who has the address that this user claims."""
        if change.email is None or all(difference.kind is not Kind.CLAIM for difference in differences):
            return None
        return user_drift.holder(self._context.database, change.email.address)

    def _ghost_refusal(self, ghosts: int, local: int) -> str | None:
        """Say why so many users must not be deleted, None if they may."""
        override = f"If they are gone indeed: --allow-deletes {ghosts}"
        allowed = self._allow_deletes
        if allowed is None:
            if local == ghosts >= ALL_UNKNOWN_FROM:
                return f"Clerk knows none of the {local} users here: check CLERK_SECRET_KEY. {override}"
            allowed = self._context.deletions_allowed(local)
        if ghosts > allowed:
            return f"{ghosts} of {local} users are gone in Clerk, more than {allowed} at a time. {override}"
        return None


class _Found:
    """The users who differ, by kind, and those to check again."""

    def __init__(self) -> None:
        self.differing: dict[Kind, dict[str, Any]] = {kind: {} for kind in Kind}
        self.suspects: set[str] = set()
        self.invalid = 0

    def note(self, differences: Iterable[Difference], holder: str | None = None) -> None:
        """Add the differences of a user; `holder` is the user who has the claimed address."""
        for kind, clerk_id, columns in differences:
            self.differing[kind][clerk_id] = holder if kind is Kind.CLAIM else columns

    def note_organizations(self, clerk_ids: Iterable[str]) -> None:
        """Add users who are stale in the column `organization`."""
        stale = self.differing[Kind.STALE]
        for clerk_id in sorted(clerk_ids):
            stale[clerk_id] = tuple(dict.fromkeys((*stale.get(clerk_id, ()), "organization")))

    def forget(self, clerk_ids: Iterable[str]) -> None:
        """Remove the differences of those users."""
        for clerk_id in clerk_ids:
            for differing in self.differing.values():
                differing.pop(clerk_id, None)


def _require_trusted(report: Report) -> None:
    """Raise ValueError if the report has a refusal."""
    if report.refusal is not None:
        raise ValueError(report.refusal)


def _listing_refusal(listed: int, invalid: int, counted: int, local: int) -> str | None:
    """Say why the listing does not prove any deletion, None if it does."""
    if listed + invalid < counted:
        return f"the listing was cut short: {listed + invalid} of {counted} users came. Try again later"
    if not listed and local:
        override = "If they are gone indeed: clerk-sync pull ID, for each"
        return f"Clerk lists no users, and {local} are here: check CLERK_SECRET_KEY. {override}"
    return None


def _may_have_moved(
    change: UserChange, stored: StoredUser, differences: Sequence[Difference], recent_ms: int
) -> bool:
    """Say whether a difference may be outdated: one side changed recently, or the stored side is newer."""
    if not differences:
        return False
    if any(difference.kind in {Kind.CLAIM, Kind.TOMBSTONE} for difference in differences):
        return True
    theirs = (0, 0) if change.profile is None else change.profile.version
    ours = (0, 0)
    if stored.sync and stored.sync.profile_updated_at and stored.sync.profile_observed_at:
        ours = (stored.sync.profile_updated_at, stored.sync.profile_observed_at)
    return ours > theirs or max(ours[0], theirs[0], change.login_at or 0) >= recent_ms

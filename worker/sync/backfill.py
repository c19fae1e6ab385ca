"""Reads every user from Clerk's API into the tables, with the same merge as deliveries.

A profile's time of observation is that of its request, so that later events win, in whatever order they
arrive. The progress of a full run is stored in the database, beside the rows: an interrupted run resumes
there, and a database restored from a backup resumes from its own position.

With ORGANIZATION_SOURCE=membership all memberships follow the users, because Clerk does not say which of
them have changed.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import structlog
from pydantic import TypeAdapter, ValidationError

from config import Settings
from db import progress
from db.drift import users as user_drift
from db.drift.users import Kind
from db.merge.change import UserChange, merge
from db.merge.policy import Policy
from db.merge.rows import StoredUser, stored_change
from db.times import now_ms
from worker.clerk.api import LAST_UPDATED_FIRST, Entry, InvalidEntry, Page
from worker.clerk.changes import user_change
from worker.clerk.pagination import PageStep, Position, paginate, paginate_members
from worker.clerk.payloads import ClerkUser, FieldSources
from worker.sync.context import RejectedUser, SyncContext
from worker.sync.reconcile_memberships import changes_in
from worker.threads import results

TASK = "backfill"
GOES_ON_WITHIN = timedelta(days=1)  # later, too many of the users read first have changed
OVERLAP_MS = 600_000  # allowance for different clocks, and for a delay of Clerk's listings

COUNTED = ("seen", "created", "updated", "unchanged", "invalid", "refused", "memberships")
MAX_TROUBLES = 20
PAGES_AT_ONCE = 3  # PostgreSQL writes one while the next is prepared

log = structlog.get_logger("worker.sync.backfill")


class BackfillStats(NamedTuple):
    """The results of a run so far, over all interruptions. `expected` is the number of users at Clerk.

    Of the `seen` entries, `invalid` could not be read and `refused` were refused by the database; all others
    were `created`, `updated` or `unchanged`. `troubles` lists the first that were left out, and why.
    `memberships` of `memberships_expected` were read.
    """

    seen: int = 0
    created: int = 0
    updated: int = 0
    unchanged: int = 0
    invalid: int = 0
    refused: int = 0
    expected: int = 0
    troubles: tuple[str, ...] = ()
    memberships: int = 0
    memberships_expected: int = 0

    def plus(self, more: "BackfillStats") -> "BackfillStats":
        """Return the sum of both; the expected numbers stay."""
        sums: Any = {name: getattr(self, name) + getattr(more, name) for name in COUNTED}
        return self._replace(troubles=(*self.troubles, *more.troubles)[:MAX_TROUBLES], **sums)

    @property
    def is_cut_short(self) -> bool:
        """Whether the listing ended before it had all users that Clerk counts."""
        return self.seen < self.expected or self.memberships < self.memberships_expected


class SyncCursor(NamedTuple):
    """Up to which time a run has read changes (ms): the next run need not read them again.

    `began_at` is the start of the run, by Clerk's clock once a page was read. `newest` is the last update
    among all users who were read, `refused` the first one among those whom the database refused.
    """

    began_at: int
    newest: int = 0
    refused: int | None = None

    def past(self, page: Page, refused: Iterable[RejectedUser]) -> "SyncCursor":
        """Return the cursor after a page that was read, some of whose users were refused."""
        updates = {user.id: user.updated_at or 0 for user in page.users}
        refused_at = [updates[clerk_id] for clerk_id, _ in refused if clerk_id in updates]
        if self.refused is not None:
            refused_at.append(self.refused)
        newest = max([self.newest, *updates.values()])
        began_at = min(self.began_at, page.observed_at)
        return SyncCursor(began_at, newest, min(refused_at, default=None))

    @property
    def since(self) -> int:
        """The argument of the next `Backfill.since`.

        It is not the start of this run, because Clerk's listing may be delayed, and lack recent users. The
        last update in the listing proves that it was complete up to then; OVERLAP_MS is the allowance for the
        rest.
        """
        reached = max(0, min(self.began_at, self.newest) - OVERLAP_MS)
        return reached if self.refused is None else min(reached, self.refused)


class Checkpoint(NamedTuple):
    """The progress of a run: its position among users and memberships, and its results."""

    reach: SyncCursor
    done: BackfillStats = BackfillStats()
    position: Position = Position()
    members: Position = Position()


class PageResult(NamedTuple):
    """A page that was written, its results, and the users whom the database refused."""

    step: PageStep
    done: BackfillStats
    refused: list[RejectedUser]


OnProgress = Callable[[BackfillStats], object]


class Backfill:
    """Reads users from Clerk's API into the tables. `on_progress` is called after every page."""

    def __init__(self, context: SyncContext, on_progress: OnProgress = lambda _: None) -> None:
        self._context = context
        self._on_progress = on_progress
        self._source = fingerprint(context.settings)
        self._at = Checkpoint(SyncCursor(0))
        self._is_full = False

    @property
    def reach(self) -> SyncCursor:
        """The cursor of the last run, over all its interruptions."""
        return self._at.reach

    def resumable(self) -> BackfillStats | None:
        """Return the results of an interrupted run that can be resumed, None if there is none."""
        saved = self._saved()
        return None if saved is None else saved.done

    def everything(self, *, restart: bool = False) -> BackfillStats:
        """Read every user; resume where the last run was interrupted or cut short, unless `restart`.

        A run that was resumed and is cut short all the same makes the next one start over.

        Raises ClerkApiError, DatabaseError, and Stopped; everything read until then is kept.
        """
        api = self._context.api
        api.check_instance()
        saved = None if restart else self._saved()
        self._is_full = True
        self._at = saved or Checkpoint(SyncCursor(now_ms()))
        before = api.count()
        self._expect(expected=before)
        self._read_users(paginate(api, self._at.position))
        self._expect(expected=min(before, api.count()))
        self._read_members()
        if saved or not self._at.done.is_cut_short:  # what is missing even after the end may stand before it
            progress.clear(self._context.database, TASK)
        return self._at.done

    def since(self, since_ms: int) -> BackfillStats:
        """Read the users updated at `since_ms` or later, the last updated first. Raises like `everything`."""
        api = self._context.api
        api.check_instance()
        self._is_full = False
        self._at = Checkpoint(SyncCursor(now_ms()))
        self._read_users(self._recent(paginate(api, Position(), LAST_UPDATED_FIRST), since_ms))
        self._read_members()
        return self._at.done

    def _recent(self, steps: Iterable[PageStep], since_ms: int) -> Iterator[PageStep]:
        """Yield the steps without the users updated before `since_ms`, and end at the first of these.

        If there is none, all users were listed: then fewer than Clerk counts mean that it was cut short.
        """
        for step in steps:
            recent = [entry for entry in step.page.entries if _is_recent(entry, since_ms)]
            yield step._replace(page=step.page._replace(entries=recent))
            if len(recent) < len(step.page.entries):
                return
        self._expect(expected=self._context.api.count())

    def _read_users(self, steps: Iterator[PageStep]) -> None:
        """Write the pages, several at a time; record each, in order."""
        stopping = self._context.api.stopping
        for step, done, refused in results(self._write_users, steps, stopping, PAGES_AT_ONCE):
            reach = self._at.reach.past(step.page, refused)
            self._advance(done, position=step.position, reach=reach)

    def _read_members(self) -> None:
        """Write all memberships in the same way, if the settings use them."""
        if not self._context.policy.follows_memberships:
            return
        api = self._context.api
        expected = api.count_members()
        self._expect(memberships_expected=expected)
        steps = paginate_members(api, self._at.members)
        for step, done, _ in results(self._write_members, steps, api.stopping, PAGES_AT_ONCE):
            expected = min(expected, step.page.total or 0)
            self._expect(memberships_expected=expected)
            self._advance(done, members=step.position)

    def _expect(self, **numbers: Any) -> None:
        self._at = self._at._replace(done=self._at.done._replace(**numbers))

    def _advance(self, done: BackfillStats, **moved: Any) -> None:
        """Record a page; save the progress of a full run, which the next one resumes."""
        self._at = self._at._replace(done=self._at.done.plus(done), **moved)
        if self._is_full:
            parts = {name: part._asdict() for name, part in self._at._asdict().items()}
            progress.save(self._context.database, TASK, {"source": self._source, **parts})
        self._on_progress(self._at.done)

    def _write_users(self, step: PageStep) -> PageResult:
        """Write a page of users, and count its results."""
        page = step.page
        changes = [user_change(user, page.observed_at) for user in page.users]
        kinds = self._kinds(changes)
        refused = self._context.write(changes, page.observed_at)
        for clerk_id, _ in refused:
            kinds.pop(clerk_id, None)
        count = Counter(kinds.values())
        done = _left_out("entry", step, refused)._replace(
            seen=len(page.entries),
            created=count["created"],
            updated=count["updated"],
            unchanged=count["unchanged"],
        )
        return PageResult(step, done, refused)

    def _write_members(self, step: PageStep) -> PageResult:
        """Write a page of memberships, and count its results."""
        page = step.page
        refused = self._context.write(changes_in(page), page.observed_at)
        done = _left_out("membership", step, refused)._replace(memberships=len(page.entries))
        return PageResult(step, done, refused)

    def _kinds(self, changes: list[UserChange]) -> dict[str, str]:
        """Return for each user what the merge will do: created, updated or unchanged."""
        stored = user_drift.read(self._context.database, [change.clerk_id for change in changes])
        return {
            change.clerk_id: _kind(change, stored[change.clerk_id], self._context.policy)
            for change in changes
        }

    def _saved(self) -> Checkpoint | None:
        state = progress.load(self._context.database, TASK, GOES_ON_WITHIN)
        if state is None or state.pop("source", None) != self._source:
            return None
        try:
            return TypeAdapter(Checkpoint).validate_python(state)
        except ValidationError:  # another version has saved it
            return None


def _left_out(what: str, step: PageStep, refused: list[RejectedUser]) -> BackfillStats:
    """Return the entries of a page that were left out, and why; log each."""
    entries = step.page.entries
    invalid = [
        (number, entry)
        for number, entry in enumerate(entries, start=step.position.seen - len(entries) + 1)
        if isinstance(entry, InvalidEntry)
    ]
    troubles = (
        *(f"{what} {number} was left out: {entry.reason}" for number, entry in invalid),
        *(f"{clerk_id} was left out: {reason}" for clerk_id, reason in refused),
    )
    for trouble in troubles:
        log.warning("left out", reason=trouble)
    return BackfillStats(invalid=len(invalid), refused=len(refused), troubles=troubles)


def _kind(change: UserChange, stored: StoredUser, policy: Policy) -> str:
    # Newer stored values stay, so the row is compared with the result of the merge.
    known = stored_change(change.clerk_id, stored, (), policy)
    differences = user_drift.compare(merge(known, change), stored, policy)
    kinds = {difference.kind for difference in differences}
    if Kind.MISSING in kinds:
        return "created"
    return "updated" if Kind.STALE in kinds else "unchanged"


def _is_recent(entry: Entry, since_ms: int) -> bool:
    updated_at = entry.updated_at if isinstance(entry, ClerkUser) else None
    return updated_at is None or updated_at >= since_ms


def fingerprint(settings: Settings) -> str:
    """Return what changes with the key and with what is read of each user; it reveals nothing of the key."""
    key = settings.clerk_secret_key.get_secret_value() if settings.clerk_secret_key else ""
    parts = settings.clerk_api_url, key, FieldSources.of(settings), settings.organization_value
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()

"""Lists all of Clerk's users page by page, and requests the next page while the current one is processed.

It uses a cursor (`starting_after`), one page ahead, because the cursor is in the page before. If the server
does not know the cursor or refuses it, it uses offsets, several pages ahead. With offsets, a deletion moves
users out of the next page. So each page overlaps the one before; a page without a common user may have left
some out and is requested again from a smaller offset. Memberships have no cursor and are always read by
offset.

A page that is too short does not end the listing; a page without new entries does. Users who signed up more
than a minute after the listing began are left out, so that sign-ups do not prolong it without end.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import structlog

from worker.clerk.api import MAX_PAGE, OLDEST_FIRST, ClerkApi, ClerkRefused, ClerkUnavailable, Entry, Page
from worker.shutdown import StopSignal
from worker.threads import AHEAD, await_result, in_background

OVERLAP = 20
CURSORS = (-1, -2, -OVERLAP)  # indexes of the users to try as cursor: any may have been deleted
GRACE_MS = 60_000
STEPS_BACK = 20

log = structlog.get_logger("worker.clerk.pagination")


class Position(NamedTuple):
    """The position in a listing: how many users were seen, the ids of the last ones, and whether by offset.

    `without_id` is the number of entries without an id after the last id: a page after that id contains them
    again.
    """

    seen: int = 0
    last_ids: tuple[str, ...] = ()
    by_offset: bool = False
    without_id: int = 0


class PageStep(NamedTuple):
    """A page without the users that the page before contained, and the position after it."""

    page: Page
    position: Position


class _CursorUnknown(Exception):
    """The server knows none of the possible cursors."""


def paginate(api: ClerkApi, start: Position, order_by: str = OLDEST_FIRST) -> Iterator[PageStep]:
    """Yield the users after `start`. Raises ClerkApiError, and Stopped once the process is to stop."""
    position = start
    if order_by == OLDEST_FIRST and not start.by_offset:
        try:
            for step in _by_cursor(api, position):
                position = step.position
                yield step
        except _CursorUnknown:
            log.info("the cursor is unknown to Clerk, continuing by offset", users=position.seen)
        else:
            return
    yield from _by_offset(
        lambda offset: api.page(order_by, offset=offset),
        api.stopping,
        position._replace(by_offset=True),
        latest_ms=api.clock_ms() + GRACE_MS if order_by == OLDEST_FIRST else None,
    )


def paginate_members(api: ClerkApi, start: Position, clerk_id: str | None = None) -> Iterator[PageStep]:
    """Yield the memberships after `start`, those of one user or of all, as `paginate` yields users."""
    page_at = api.members if clerk_id is None else partial(api.members_of, clerk_id)
    start = start._replace(by_offset=True)
    latest_ms = api.clock_ms() + GRACE_MS if clerk_id is None else None
    return _by_offset(page_at, api.stopping, start, latest_ms=latest_ms)


def _by_cursor(api: ClerkApi, position: Position) -> Iterator[PageStep]:
    latest_ms = api.clock_ms() + GRACE_MS
    following = in_background(_page_after, api, position)
    while True:
        page = await_result(following, api.stopping)
        fresh = _after_overlap(page, position)
        if not fresh.entries:
            return
        position = _moved(position, fresh)
        following = in_background(_page_after, api, position)
        yield PageStep(fresh, position)
        if _is_last(page, fresh) or _has_caught_up(page, latest_ms):
            return


def _page_after(api: ClerkApi, position: Position) -> Page:
    """Return the page after the last user in `position` whom the server knows. Raises _CursorUnknown."""
    ids = position.last_ids
    if not ids:
        return api.page(OLDEST_FIRST)
    for cursor in dict.fromkeys(ids[index] for index in CURSORS if -index <= len(ids)):
        try:
            page = api.page(OLDEST_FIRST, starting_after=cursor)
        except ClerkRefused as error:
            if error.status in {400, 404, 422}:
                continue
            raise
        if cursor not in page.ids:
            return page
        break  # a server that ignores the cursor starts again from the first page
    raise _CursorUnknown


def _by_offset(
    page_at: Callable[[int], Page], stopping: StopSignal, position: Position, *, latest_ms: int | None
) -> Iterator[PageStep]:
    """List by offset. With `latest_ms` the order is that of creation, and a later entry marks the end."""
    steps_back = 0
    pages = _PagesAhead(page_at)
    pages.go_to(max(0, position.seen - OVERLAP))
    while True:
        offset, page = pages.next(stopping)
        pages.end = page.total
        if offset > 0 and not set(page.ids) & set(position.last_ids):
            steps_back += 1
            if steps_back > STEPS_BACK:
                raise ClerkUnavailable("Clerk's users change faster than they can be listed: try again later")
            pages.go_to(max(0, offset - MAX_PAGE // 2))
            continue
        fresh = _after_overlap(page, position)
        if not fresh.entries:
            _is_last(page, fresh)
            return
        position = _moved(position._replace(seen=offset + len(page.entries) - len(fresh.entries)), fresh)
        is_short = len(page.entries) < MAX_PAGE  # else there may be more, whatever the total says
        if is_short:
            pages.go_to(max(0, position.seen - OVERLAP))
        yield PageStep(fresh, position)
        if is_short and page.total is not None and position.seen >= page.total:
            return
        if _is_last(page, fresh) or (latest_ms is not None and _has_caught_up(page, latest_ms)):
            return


class _PagesAhead:
    """Pages by offset, each overlapping the one before it, several of them requested at a time."""

    def __init__(self, page_at: Callable[[int], Page]) -> None:
        self._page_at = page_at
        self._asked: deque[tuple[int, Future[Page]]] = deque()
        self._dropped: list[Future[Page]] = []  # not needed any more, but still requests to Clerk
        self._next_offset = 0
        self.end: int | None = None  # the offset of the end of the list, if known

    def go_to(self, offset: int) -> None:
        """Continue from `offset`; drop the requested pages."""
        self._dropped += [future for _, future in self._asked]
        self._asked.clear()
        self._next_offset = offset

    def next(self, stopping: StopSignal) -> tuple[int, Page]:
        """Return the next page and its offset."""
        ahead = AHEAD if self._next_offset or self._asked else 1  # most lists fit into one page
        self._dropped = [future for future in self._dropped if not future.done()]
        while len(self._asked) < max(1, ahead - len(self._dropped)):
            if self._asked and self.end is not None and self._next_offset >= self.end:
                break
            future = in_background(self._page_at, self._next_offset)
            self._asked.append((self._next_offset, future))
            self._next_offset += MAX_PAGE - OVERLAP
        offset, future = self._asked.popleft()
        return offset, await_result(future, stopping)


def _after_overlap(page: Page, position: Position) -> Page:
    """Return the page without its entries up to the last one that was seen before."""
    seen = set(position.last_ids)
    before = [i for i, entry in enumerate(page.entries) if entry.id in seen]
    entries = page.entries[before[-1] + 1 :] if before else page.entries
    again = min(position.without_id, _without_id(entries))
    return page._replace(entries=entries[again:])


def _without_id(entries: Iterable[Entry]) -> int:
    """Return the number of entries before the first one that has an id."""
    return sum(1 for _ in takewhile(lambda entry: entry.id is None, entries))


def _is_last(page: Page, fresh: Page) -> bool:
    """Say whether a page has no new entries, so that it is the last. Raises ClerkRefused for a full page."""
    if fresh.ids:
        return False
    if len(page.entries) < MAX_PAGE:
        return True
    raise ClerkRefused("Clerk's API repeats the same page: check CLERK_API_URL")


def _has_caught_up(page: Page, latest_ms: int) -> bool:
    """Say whether the page is not full, and ends with a user who signed up after `latest_ms`."""
    last = page.known[-1].created_at if page.known else None
    return len(page.entries) < MAX_PAGE and last is not None and last > latest_ms


def _moved(position: Position, page: Page) -> Position:
    last_ids = (*position.last_ids, *page.ids)[-OVERLAP:]
    without_id = _without_id(reversed(page.entries)) + (0 if page.ids else position.without_id)
    return position._replace(seen=position.seen + len(page.entries), last_ids=last_ids, without_id=without_id)

"""Requests users by id: many at a time, and one by one to prove that a user was deleted."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from worker.clerk.api import MAX_IDS, MAX_PAGE, ClerkApi, ClerkUnavailable, Entry, Page
from worker.clerk.pagination import Position, paginate_members
from worker.threads import chunks, results


class LookupPage(NamedTuple):
    """A page of requested users, and the ids of those that it lacks.

    These may be deleted. But the answer may also be incomplete, or contain other users than requested. Only
    Clerk's "not found" for a single user proves the deletion.
    """

    page: Page
    not_returned: list[str]


def look_up(api: ClerkApi, clerk_ids: Iterable[str]) -> Iterator[LookupPage]:
    """Request all of `clerk_ids`, many at a time. Raises ClerkApiError and Stopped."""

    def look(asked: list[str]) -> LookupPage:
        page = api.users(asked)
        shown = {user.id: user for user in page.users}
        wanted = [shown[clerk_id] for clerk_id in asked if clerk_id in shown]
        return LookupPage(
            page._replace(entries=list[Entry](wanted)),
            [clerk_id for clerk_id in asked if clerk_id not in shown],
        )

    return results(look, chunks(clerk_ids, MAX_IDS), api.stopping)


def confirm_by_id(api: ClerkApi, clerk_ids: Iterable[str]) -> Iterator[LookupPage]:
    """Request each of `clerk_ids` alone: a missing user was deleted. Raises ClerkApiError and Stopped."""

    def look(clerk_id: str) -> LookupPage:
        page = api.user(clerk_id)
        return LookupPage(page, [] if page.entries else [clerk_id])

    return results(look, clerk_ids, api.stopping)


class Members(NamedTuple):
    """All memberships of one user, as one page; None if Clerk has no such user."""

    clerk_id: str
    page: Page | None


def members_of(api: ClerkApi, clerk_ids: Iterable[str]) -> Iterator[Members]:
    """Request the memberships of each of `clerk_ids`: a request for users does not return them.

    Raises ClerkApiError and Stopped; ClerkUnavailable also if the listing has fewer than the answer counts.
    """
    return results(lambda clerk_id: Members(clerk_id, _all_of(api, clerk_id)), clerk_ids, api.stopping)


def _all_of(api: ClerkApi, clerk_id: str) -> Page | None:
    page = api.members_of(clerk_id, 0)
    if page.total is None:
        return None
    if len(page.entries) < page.total or len(page.entries) >= MAX_PAGE:
        pages = [step.page for step in paginate_members(api, Position(), clerk_id)]
        page = page._replace(entries=[entry for each in pages for entry in each.entries])
        if len(page.entries) < min(each.total or 0 for each in (page, *pages)):
            raise ClerkUnavailable("Clerk's API shows fewer memberships than it counts: try again later")
    return page

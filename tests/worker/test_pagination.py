"""Walks through all users, while users come, go and change, and past servers that page in other ways."""

import time
from collections.abc import Iterator
from functools import partial
from itertools import count, islice

import pytest

from tests.support.fake_clerk import FakeClerk, Request, numbered_id, show_without_id
from tests.support.payloads import NOW, user
from tests.support.sync import api_alone, client
from worker.clerk.api import LAST_UPDATED_FIRST, ClerkApi, ClerkRefused, ClerkUnavailable, InvalidEntry
from worker.clerk.pagination import OVERLAP, PageStep, Position, paginate
from worker.shutdown import Stopped
from worker.threads import AHEAD

MANY = 1250


@pytest.fixture
def clerk() -> Iterator[FakeClerk]:
    with FakeClerk() as fake:
        fake.put_many(MANY)
        yield fake


@pytest.fixture
def api(clerk: FakeClerk) -> Iterator[ClerkApi]:
    with client(api_alone(clerk), patience_s=2) as made:
        yield made


@pytest.fixture(params=[True, False], ids=["cursor", "offset"])
def any_clerk(clerk: FakeClerk, request: pytest.FixtureRequest) -> FakeClerk:
    """A server that pages by cursor, and one that overlooks it."""
    clerk.knows_cursor = request.param
    return clerk


BEGINNING = Position()


def paginated(api: ClerkApi, start: Position = BEGINNING, **options: str) -> list[str]:
    """Return the ids that a walk shows, in its order."""
    return [clerk_id for step in paginate(api, start, **options) for clerk_id in step.page.ids]


def everyone(number: int = MANY) -> list[str]:
    return [numbered_id(i) for i in range(number)]


def test_everyone_is_seen_once_by_cursor(clerk: FakeClerk, api: ClerkApi) -> None:
    assert paginated(api) == everyone()
    lists = clerk.requests_for("/users")
    assert all("offset" not in request.parameters for request in lists)
    assert len(lists) <= MANY // 500 + 2


def test_everyone_is_seen_once_where_the_cursor_is_overlooked(clerk: FakeClerk, api: ClerkApi) -> None:
    clerk.knows_cursor = False
    clerk.before = partial(hold_the_first_by_offset, clerk)
    assert paginated(api) == everyone()
    assert 1 < clerk.most_at_once <= AHEAD + 1


def hold_the_first_by_offset(clerk: FakeClerk, request: Request) -> None:
    """Answer it only once another is on its way."""
    deadline = time.monotonic() + 10
    while request.parameter("offset") and clerk.most_at_once == 1 and time.monotonic() < deadline:
        time.sleep(0.01)


def test_everyone_is_seen_once_where_the_cursor_is_refused(clerk: FakeClerk, api: ClerkApi) -> None:
    clerk.before = partial(refuse_cursors, clerk)
    assert paginated(api) == everyone()


def refuse_cursors(clerk: FakeClerk, request: Request) -> None:
    if request.parameter("starting_after"):
        clerk.answer_next(422, '{"errors":[{"code":"form_param_unknown"}]}')


@pytest.mark.parametrize("size", [1, 7, 100, 499])
def test_pages_shorter_than_they_should_be_end_no_walk(
    any_clerk: FakeClerk, api: ClerkApi, size: int
) -> None:
    users = 60 if size < 10 else MANY
    any_clerk.remove(*everyone()[users:])
    any_clerk.shortens_pages_to = size
    if any_clerk.knows_cursor or size > OVERLAP:
        assert paginated(api) == everyone(users)


def test_no_user_is_a_short_walk(clerk: FakeClerk, api: ClerkApi) -> None:
    clerk.remove(*everyone())
    assert paginated(api) == []
    assert paginated(api, Position(100, (numbered_id(1),))) == []
    assert paginated(api, Position(100, (numbered_id(1),), by_offset=True)) == []


@pytest.mark.parametrize("order_by", ["+created_at", LAST_UPDATED_FIRST])
def test_a_server_that_overlooks_cursor_and_offset_is_noticed(
    clerk: FakeClerk, api: ClerkApi, order_by: str
) -> None:
    clerk.knows_cursor = False
    clerk.before = lambda request: none(request.parameters.pop("offset", None))
    with pytest.raises(ClerkRefused):
        paginated(api, order_by=order_by)


def test_users_without_an_id_stop_no_walk(clerk: FakeClerk, api: ClerkApi) -> None:
    for cursor in (numbered_id(499), numbered_id(MANY - 1)):
        clerk.before = partial(show_oddity, clerk, cursor)
        steps = list(paginate(api, Position()))
        assert [clerk_id for step in steps for clerk_id in step.page.ids] == everyone()
        assert sum(isinstance(entry, InvalidEntry) for step in steps for entry in step.page.entries) == 1


def show_oddity(clerk: FakeClerk, cursor: str, request: Request) -> None:
    if request.parameter("starting_after") == cursor:
        clerk.before = lambda _: None
        shown = clerk.ids()[clerk.ids().index(cursor) + 1 :][:499]
        clerk.answer_next(200, "[null" + "".join("," + clerk.text(clerk_id) for clerk_id in shown) + "]")


@pytest.mark.parametrize("at", [0, 498, 499, 500, 501, MANY - 1])
def test_entries_without_an_id_are_shown_once_wherever_they_stand(
    any_clerk: FakeClerk, api: ClerkApi, at: int
) -> None:
    without_id = {numbered_id(at), numbered_id(min(at + 1, MANY - 1))}
    any_clerk.before = partial(show_without_id, any_clerk, without_id)
    steps = list(paginate(api, Position()))
    assert sum(len(step.page.entries) for step in steps) == steps[-1].position.seen == MANY
    assert [it for step in steps for it in step.page.ids] == [it for it in everyone() if it not in without_id]


@pytest.mark.usefixtures("any_clerk")
def test_a_walk_goes_on_from_any_page(api: ClerkApi) -> None:
    for stop_after in range(1, 4):
        position = position_after(api, stop_after)
        assert paginated(api, position) == everyone()[position.seen :]


def position_after(api: ClerkApi, pages: int) -> Position:
    steps = paginate(api, Position())
    return [next(steps) for _ in range(pages)][-1].position


@pytest.mark.parametrize("gone", [1, 2, OVERLAP, 300])
def test_a_walk_goes_on_though_the_last_users_were_deleted(
    any_clerk: FakeClerk, api: ClerkApi, gone: int
) -> None:
    position = position_after(api, 2)
    any_clerk.remove(*everyone()[position.seen - gone : position.seen])
    assert set(paginated(api, position)) >= set(everyone()[position.seen :])


@pytest.mark.parametrize("deleted_at_a_time", [1, 15, 60, 400])
def test_no_user_is_skipped_while_others_are_deleted(
    any_clerk: FakeClerk, api: ClerkApi, deleted_at_a_time: int
) -> None:
    to_delete = iter(everyone()[:900])
    any_clerk.before = partial(delete_some, any_clerk, to_delete, deleted_at_a_time)
    seen = paginated(api)
    assert set(seen) >= set(any_clerk.ids())


def delete_some(clerk: FakeClerk, to_delete: Iterator[str], number: int, request: Request) -> None:
    if request.path == "/users":
        clerk.remove(*islice(to_delete, number))


def test_who_signs_up_meanwhile_is_seen_and_skips_no_user(any_clerk: FakeClerk, api: ClerkApi) -> None:
    any_clerk.before = partial(sign_up_some, any_clerk, 70)
    seen = paginated(api)
    assert set(seen) >= set(everyone())
    assert seen[: len(everyone())] == everyone()


def sign_up_some(clerk: FakeClerk, how_many: int, _: Request) -> None:
    if len(clerk.ids()) < MANY + 300:
        clerk.put_many(how_many, len(clerk.ids()))


def none(_: object) -> None:
    """Let a hook do something."""


def test_sign_ups_without_end_do_not_make_a_walk_without_end(clerk: FakeClerk, api: ClerkApi) -> None:
    later = count(4_000_000_000_000)
    clerk.before = lambda _: clerk.put(user(f"user_late{next(later)}", created_at=next(later)))
    assert len(paginated(api)) < MANY + 100


def test_last_updated_first_skips_no_user_while_users_change(clerk: FakeClerk, api: ClerkApi) -> None:
    clerk.before = partial(touch_some, clerk, iter(range(0, MANY, 9)), 30)
    changed = {numbered_id(number) for number in range(0, MANY, 9)}
    assert set(paginated(api, order_by=LAST_UPDATED_FIRST)) >= set(everyone()) - changed
    assert all("starting_after" not in request.parameters for request in clerk.requests_for("/users"))


def touch_some(clerk: FakeClerk, numbers: Iterator[int], how_many: int, _: Request) -> None:
    for number in islice(numbers, how_many):
        shown = clerk.user(numbered_id(number))
        clerk.put({**shown, "updated_at": NOW + number})


def test_a_listing_that_changes_faster_than_it_is_read_is_given_up(clerk: FakeClerk, api: ClerkApi) -> None:
    clerk.remove(*everyone()[700:])
    numbers = count(1)

    def replace_everyone(request: Request) -> None:
        refuse_cursors(clerk, request)
        clerk.remove(*clerk.ids())
        clerk.put_many(700, next(numbers) * MANY)

    clerk.before = replace_everyone
    with pytest.raises(ClerkUnavailable, match="faster"):
        paginated(api)


def test_a_stop_ends_a_walk_at_once(api: ClerkApi) -> None:
    steps: Iterator[PageStep] = paginate(api, Position())
    next(steps)
    api.stopping.request()
    with pytest.raises(Stopped):
        list(steps)

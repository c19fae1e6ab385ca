"""Memberships, where they decide: fetched, compared, fixed, and never from a list that proves nothing."""

from collections.abc import Callable
from contextlib import closing
from functools import partial
from random import Random
from typing import Any

import pytest

import config
from db.times import now_ms
from tests.support.fake_clerk import FakeClerk, Request, happen_at, numbered_id
from tests.support.payloads import (
    ACME,
    ANN,
    BEN,
    CAT,
    NOW,
    Json,
    body,
    dissolved,
    membership,
    membership_event,
    organization,
    organization_event,
    user,
    user_event,
)
from tests.support.settings import MakeSettings
from tests.support.sync import (
    api_settings,
    assert_refused,
    deliver,
    execute,
    filled,
    fix,
    open_context,
    query,
    report,
    rows,
)
from worker.clerk.api import ClerkRefused, ClerkUnavailable
from worker.shutdown import Stopped, StopSignal
from worker.sync.backfill import Backfill, BackfillStats
from worker.sync.context import SyncContext
from worker.sync.pull import PullOutcome, pull
from worker.sync.pull_service import PullService
from worker.sync.reconcile import Reconcile, Stale

ZOO = "org_zoo"
IN_ACME, IN_ZOO = "orgmem_a", "orgmem_b"


@pytest.fixture
def settings(make_settings: MakeSettings, clerk: FakeClerk) -> config.Settings:
    return api_settings(make_settings, clerk, organization_source="membership")


@pytest.fixture
def few(clerk: FakeClerk, both: SyncContext) -> SyncContext:
    """Ann joined Acme, then the zoo; Ben joined Acme; Cat nothing. So it is at Clerk and here."""
    clerk.put(user(ANN), user(BEN), user(CAT))
    clerk.put_members(
        membership(ANN, id=IN_ACME, created_at=NOW),
        membership(ANN, organization(ZOO, "Zoo"), id=IN_ZOO, created_at=NOW + 10),
        membership(BEN, id="orgmem_c", created_at=NOW + 20),
    )
    Backfill(both).everything()
    clerk.requests.clear()
    return both


def organizations(both: SyncContext) -> dict[str, str | None]:
    return {clerk_id: row.organization for clerk_id, row in rows(both.settings).items()}


def stale(*clerk_ids: str) -> list[Stale]:
    """Return what is to be found when those differ in their organization and no user in anything else."""
    return [Stale(clerk_id, ("organization",)) for clerk_id in sorted(clerk_ids)]


def test_it_reads_all_memberships_of_the_instance_five_hundred_at_a_time(
    clerk: FakeClerk, both: SyncContext
) -> None:
    clerk.put_many(1200)
    clerk.put_many_members(1100)
    done = Backfill(both).everything()
    assert (done.seen, done.memberships, done.memberships_expected) == (1200, 1100, 1100)
    assert not done.is_cut_short
    assert organizations(both)[numbered_id(7)] == "Firm 7"
    assert organizations(both)[numbered_id(1100)] is None
    lists = clerk.requests_for("/organization_memberships")
    assert len(lists) <= 4
    assert all(it.parameter("order_by") == "+created_at" for it in lists if it.parameter("limit") == "500")


@pytest.mark.parametrize("source", ["metadata", "none"])
def test_where_they_do_not_decide_not_a_single_request_more_is_sent(
    clerk: FakeClerk, settings: config.Settings, source: str
) -> None:
    clerk.put(user(ANN), user(BEN))
    clerk.put_members(membership(ANN))
    with open_context(settings.model_copy(update={"organization_source": source})) as both:
        Backfill(both).everything()
        Backfill(both).since(0)
        execute(settings, f"UPDATE users SET name = 'Other' WHERE clerk_id = '{ANN}'")
        clerk.remove(BEN)
        found = report(both)
        assert (found.differing, found.memberships) == (2, None)
        fix(both)
        pull(both, ANN, confirmed=True)
    assert [request.path for request in clerk.requests if "organization" in request.path] == []


BEFORE = {ANN: "Zoo", BEN: "Acme", CAT: None}
JOINED = membership(CAT, id="orgmem_d", created_at=NOW + 30)
RENAMED = organization(ACME, "New", updated_at=NOW + 100)
LOST: dict[str, tuple[Callable[[FakeClerk], None], list[str], dict[str, str | None]]] = {
    "a join": (lambda clerk: clerk.put_members(JOINED), [CAT], {CAT: "Acme"}),
    "a leave": (lambda clerk: clerk.remove_members(IN_ZOO), [ANN], {ANN: "Acme"}),
    "a leave of what was not joined last": (lambda clerk: clerk.remove_members(IN_ACME), [ANN], {}),
    "a leave of both": (lambda clerk: clerk.remove_members(IN_ACME, IN_ZOO), [ANN], {ANN: None}),
    "a rename": (lambda clerk: clerk.put_organization(RENAMED), [ANN, BEN], {BEN: "New"}),
    "an end of an organization": (lambda clerk: clerk.remove_organization(ACME), [ANN, BEN], {BEN: None}),
}


@pytest.mark.parametrize(("change", "differing", "after"), LOST.values(), ids=LOST)
def test_a_change_whose_webhook_was_lost_is_found_and_fixed(
    clerk: FakeClerk,
    few: SyncContext,
    change: Callable[[FakeClerk], None],
    differing: list[str],
    after: dict[str, str | None],
) -> None:
    change(clerk)
    assert report(few).stale == stale(*differing)
    assert organizations(few) == BEFORE
    assert fix(few) == []
    assert organizations(few) == BEFORE | after


def test_an_end_of_an_organization_that_was_delivered_is_no_drift(clerk: FakeClerk, few: SyncContext) -> None:
    clerk.remove_organization(ACME)
    deliver(few, organization_event("organization.deleted", dissolved(ACME), timestamp=NOW + 200))
    clerk.requests.clear()
    assert report(few).differing == 0
    assert not [it for it in clerk.requests if it.path.startswith("/users/user_")]


def test_who_joined_again_is_in_again(clerk: FakeClerk, few: SyncContext) -> None:
    clerk.remove_members("orgmem_c")
    assert fix(few) == []
    clerk.put_members(membership(BEN, id="orgmem_e", created_at=NOW + 40))
    assert fix(few) == []
    assert organizations(few)[BEN] == "Acme"
    deliver(few, membership_event(data=membership(BEN, id="orgmem_c", created_at=NOW + 20)))
    clerk.remove_members("orgmem_e")
    assert fix(few) == []
    assert organizations(few)[BEN] is None


def test_a_column_that_was_changed_elsewhere_is_found_and_fixed(few: SyncContext) -> None:
    execute(few.settings, f"UPDATE users SET organization = 'Own' WHERE clerk_id IN ('{BEN}', '{CAT}')")
    assert report(few).stale == stale(BEN, CAT)
    assert fix(few) == []
    assert organizations(few) == BEFORE


def test_other_columns_are_named_beside_it(clerk: FakeClerk, few: SyncContext) -> None:
    clerk.put(user(BEN, first_name="New", updated_at=NOW + 100, public_metadata={"role": "admin"}))
    clerk.remove_members("orgmem_c")
    assert report(few).stale == [Stale(BEN, ("name", "role", "organization"))]
    assert fix(few) == []


def test_memberships_of_who_is_missing_here_come_with_the_user(clerk: FakeClerk, few: SyncContext) -> None:
    clerk.put(*(user(f"user_{i}") for i in range(40)))
    clerk.put_members(*(membership(f"user_{i}", id=f"orgmem_n{i}") for i in range(40)))
    assert report(few).stale == []
    assert fix(few) == []
    assert organizations(few)["user_39"] == "Acme"


def test_memberships_of_who_is_gone_go_with_the_user_and_count_as_no_ends(
    clerk: FakeClerk, few: SyncContext
) -> None:
    clerk.remove(ANN)
    task = Reconcile(few, settle_s=0, allow_deletes=1)
    found = task.report()
    assert (list(found.ghost), found.stale, found.refusal) == ([ANN], [], None)
    assert task.fix(found) == []
    assert report(few).differing == 0
    assert query(few.settings, f"SELECT 1 FROM membership_sync WHERE clerk_id = '{ANN}'") == []


def test_what_was_only_left_out_of_the_listing_has_not_ended(clerk: FakeClerk, few: SyncContext) -> None:
    clerk.hidden_members = {IN_ACME, IN_ZOO}
    clerk.counts_members = 1
    clerk.before = partial(count_rightly, clerk)
    found = report(few)
    assert (found.differing, found.refusal) == (0, None)
    assert fix(few) == []
    assert organizations(few)[ANN] == "Zoo"


def count_rightly(clerk: FakeClerk, request: Request) -> None:
    """Count what is listed: one in the list of all, and all of a user's in the user's own."""
    clerk.counts_members = 1 if request.path == "/organization_memberships" else None


def test_a_listing_that_was_cut_short_ends_nothing(clerk: FakeClerk, both: SyncContext) -> None:
    filled(clerk, both, 1200, 1200)
    clerk.remove_members("orgmem_2fake00000003")
    clerk.counts_members = 1200
    for listed in (0, 1, 499, 500, 501, 1199):
        clerk.lists_members_at_most = listed
        assert_refused(both, "cut short", 10_000)
    assert_refused(both, "cut short")


def test_an_empty_listing_ends_nothing_until_an_operator_says_so(clerk: FakeClerk, few: SyncContext) -> None:
    clerk.remove_members(IN_ACME, IN_ZOO, "orgmem_c")
    assert_refused(few, "lists no memberships")
    assert_refused(few, "--allow-deletes 3", allow_deletes=2)
    assert fix(few, allow_deletes=3) == []
    assert set(organizations(few).values()) == {None}


@pytest.mark.parametrize(
    ("local", "gone", "percent", "is_refused"),
    [(30, 10, 5, False), (30, 11, 5, True), (300, 15, 5, False), (300, 16, 5, True), (300, 16, 6, False)],
)
def test_a_listing_that_shrank_too_much_ends_nothing(
    clerk: FakeClerk, settings: config.Settings, *, local: int, gone: int, percent: float, is_refused: bool
) -> None:
    with open_context(settings.model_copy(update={"reconcile_max_delete": percent})) as both:
        filled(clerk, both, local, local)
        clerk.remove_members(*(f"orgmem_2fake{i:08}" for i in range(gone)))
        if is_refused:
            assert_refused(both, f"--allow-deletes {gone}")
            assert not [it for it in clerk.requests if it.path.startswith("/users/user_")]
            assert_refused(both, f"--allow-deletes {gone}", gone - 1)
            assert fix(both, allow_deletes=gone) == []
        else:
            assert fix(both) == []
        assert sum(name is not None for name in organizations(both).values()) == local - gone


def show_members_of(
    clerk: FakeClerk, clerk_id: str, entries: list[Json | None], total: int, times: int = 1
) -> None:
    """Answer the next requests for the memberships of that user with these."""
    path = f"/users/{clerk_id}/organization_memberships"
    clerk.answer_next(200, body({"data": entries, "total_count": total}), path=path, times=times)


def test_a_users_own_list_that_was_cut_short_ends_nothing(clerk: FakeClerk, few: SyncContext) -> None:
    clerk.remove_members("orgmem_c")
    show_members_of(clerk, BEN, [], total=1, times=10)
    with pytest.raises(ClerkUnavailable, match="fewer memberships"):
        report(few)
    assert organizations(few)[BEN] == "Acme"


def test_a_users_own_list_that_cannot_be_read_ends_nothing(clerk: FakeClerk, few: SyncContext) -> None:
    clerk.remove_members("orgmem_c")
    show_members_of(clerk, BEN, [None], total=1)
    assert report(few).differing == 0


def unreadable(clerk_id: str, **fields: Any) -> Json:
    """Return a membership that does not say whose it is."""
    return {**membership(clerk_id, **fields), "public_user_data": None}


def show_members(clerk: FakeClerk, entries: list[Json], request: Request) -> None:
    if request.path == "/organization_memberships":
        shown = entries if request.parameter("offset") == "0" else []
        clerk.answer_next(200, body({"data": shown, "total_count": 3}), path=request.path)


@pytest.mark.parametrize("id_", ["orgmem_c", None])
def test_a_membership_that_cannot_be_read_is_counted_as_listed_and_has_not_ended(
    clerk: FakeClerk, few: SyncContext, id_: str | None
) -> None:
    entries = [
        membership(ANN, id=IN_ACME, created_at=NOW),
        membership(ANN, organization(ZOO, "Zoo"), id=IN_ZOO, created_at=NOW + 10),
        unreadable(BEN, id=id_, created_at=NOW + 20),
    ]
    clerk.before = partial(show_members, clerk, entries)
    found = report(few)
    assert (found.refusal, found.differing) == (None, 0)
    assert found.memberships is not None
    assert not found.memberships.ended


def test_a_membership_that_cannot_be_read_keeps_no_other_from_ending(
    clerk: FakeClerk, few: SyncContext
) -> None:
    clerk.remove_members(IN_ZOO)
    show_members_of(clerk, ANN, [unreadable(ANN, id=IN_ACME)], total=1)
    found = report(few)
    assert found.memberships is not None
    ((change),) = found.memberships.ended
    assert [it.id for it in change.memberships] == [IN_ZOO]


def test_many_memberships_that_cannot_be_read_stop_no_walk(clerk: FakeClerk, few: SyncContext) -> None:
    entries = [unreadable(ANN, id=f"orgmem_{i:04}") for i in range(1200)]

    def show(request: Request) -> None:
        if request.path == "/organization_memberships":
            at = int(request.parameter("offset", "0"))
            shown = {"data": entries[at : at + int(request.parameter("limit"))], "total_count": 1200}
            clerk.answer_next(200, body(shown), path=request.path)

    clerk.before = show
    done = Backfill(few).everything()
    assert (done.memberships, done.invalid, done.is_cut_short) == (1200, 1200, False)
    assert report(few).differing == 0


@pytest.mark.parametrize("ahead_s", [None, -600, 600])
def test_a_membership_that_has_only_just_begun_is_not_ended(
    clerk: FakeClerk, few: SyncContext, ahead_s: float | None
) -> None:
    clerk.ahead_s = ahead_s
    now = now_ms() + int((ahead_s or 0) * 1000)
    deliver(few, membership_event(data=membership(CAT, id="orgmem_d", created_at=now)))
    assert report(few).differing == 0
    assert pull(few, CAT, confirmed=True).outcome is PullOutcome.FOUND
    assert organizations(few)[CAT] == "Acme"


def test_a_membership_that_ended_here_and_is_at_clerk_is_drift_that_stays(few: SyncContext) -> None:
    deliver(
        few,
        membership_event(
            "organizationMembership.deleted", membership(BEN, id="orgmem_c", created_at=NOW + 20)
        ),
    )
    assert report(few).stale == stale(BEN)
    assert fix(few) == [BEN]


def join_many(clerk: FakeClerk, count: int) -> None:
    """Let Ann join so many organizations."""
    for i in range(count):
        of = organization(f"org_{i}", f"Firm {i}")
        clerk.put_members(membership(ANN, of, id=f"orgmem_{i:04}", created_at=NOW + i))


def test_a_user_in_more_organizations_than_one_page_holds(clerk: FakeClerk, both: SyncContext) -> None:
    clerk.put(user(ANN))
    join_many(clerk, 620)
    Backfill(both).everything()
    assert organizations(both) == {ANN: "Firm 619"}
    clerk.remove_members("orgmem_0619")
    assert fix(both) == []
    clerk.remove_members("orgmem_0618")
    pull(both, ANN, confirmed=True)
    assert organizations(both) == {ANN: "Firm 617"}
    assert query(both.settings, "SELECT count(*) FROM membership_sync WHERE ended_at IS NULL") == [(618,)]


def test_a_user_in_thousands_of_organizations_is_pulled_in_time(
    clerk: FakeClerk, settings: config.Settings
) -> None:
    clerk.put(user(ANN))
    join_many(clerk, 7000)
    with closing(PullService(settings)) as service:
        pulled = service.pull(ANN)
    assert pulled.user is not None, pulled
    assert pulled.user["organization"] == "Firm 6999"


@pytest.mark.parametrize("counts", [0, 1, 500, 501])
def test_a_count_that_is_too_low_ends_no_list_and_no_membership(
    clerk: FakeClerk, both: SyncContext, counts: int
) -> None:
    clerk.put_many(1100)
    clerk.put_many_members(1100)
    clerk.put(user(ANN))
    join_many(clerk, 620)
    clerk.counts_members = counts
    assert Backfill(both).everything().memberships == 1720
    pull(both, ANN, confirmed=True)
    assert report(both).differing == 0
    clerk.hidden_members = {"orgmem_0000"}
    assert report(both).differing == 0
    assert query(both.settings, "SELECT count(*) FROM membership_sync WHERE ended_at IS NULL") == [(1720,)]


def test_odd_entries_are_left_out_and_reported(clerk: FakeClerk, both: SyncContext) -> None:
    clerk.put(user(ANN))
    clerk.put_members(membership(ANN))
    shown = {"data": [None, {"id": "orgmem_x"}, membership(ANN)], "total_count": 3}
    clerk.answer_next(200, body(shown), path="/organization_memberships", times=2)
    done = Backfill(both).everything()
    assert (done.invalid, done.memberships, done.is_cut_short) == (2, 3, False)
    assert [it.partition(" was")[0] for it in done.troubles] == ["membership 1", "membership 2"]
    assert organizations(both) == {ANN: "Acme"}


def test_an_instance_without_organizations_is_reported_in_one_line(
    clerk: FakeClerk, both: SyncContext
) -> None:
    clerk.put(user(ANN))
    clerk.answer_next(
        403,
        '{"errors": [{"code": "organization_not_enabled_in_instance"}]}',
        path="/organization_memberships",
    )
    with pytest.raises(ClerkRefused, match="ORGANIZATION_SOURCE"):
        Backfill(both).everything()


def test_something_else_than_memberships_is_refused(clerk: FakeClerk, few: SyncContext) -> None:
    clerk.answer_next(200, "[]", path="/organization_memberships")
    with pytest.raises(ClerkRefused, match="CLERK_API_URL"):
        report(few)


def test_an_interrupted_backfill_goes_on_among_the_memberships(
    clerk: FakeClerk, settings: config.Settings
) -> None:
    clerk.put_many(1300)
    clerk.put_many_members(1300)
    stopping = StopSignal()

    def look(done: BackfillStats) -> None:
        if done.memberships:
            stopping.request()

    with open_context(settings, stopping) as both, pytest.raises(Stopped):
        Backfill(both, look).everything()
    clerk.requests.clear()
    with open_context(settings) as both:
        done = Backfill(both).everything()
        assert (done.seen, done.memberships, done.created) == (1300, 1300, 1300)
        assert report(both).differing == 0
        lists = [it for it in clerk.requests if it.parameter("limit") == "500"]
        assert lists[0].parameter("starting_after") == numbered_id(1299)


def test_a_list_that_ends_early_makes_no_whole_backfill(clerk: FakeClerk, both: SyncContext) -> None:
    clerk.put_many(600)
    clerk.put_many_members(600)
    clerk.lists_members_at_most = 500
    assert Backfill(both).everything().is_cut_short
    clerk.lists_members_at_most = None
    done = Backfill(both).everything()
    assert (done.seen, done.memberships, done.is_cut_short) == (600, 600, False)


def test_an_incremental_backfill_brings_joins_and_renames(clerk: FakeClerk, few: SyncContext) -> None:
    clerk.put_members(membership(CAT, id="orgmem_d"))
    clerk.put_organization(organization(ACME, "New", updated_at=NOW + 100))
    done = Backfill(few).since(NOW + 1000)
    assert (done.seen, done.memberships) == (0, 4)
    assert organizations(few) == {ANN: "Zoo", BEN: "New", CAT: "New"}


def test_a_pull_brings_joins_renames_and_ends(clerk: FakeClerk, few: SyncContext) -> None:
    clerk.remove_members(IN_ZOO)
    clerk.put_members(membership(CAT, id="orgmem_d"))
    clerk.put_organization(organization(ACME, "New", updated_at=NOW + 100))
    for clerk_id in (ANN, CAT):
        pulled = pull(few, clerk_id, confirmed=False)
        assert pulled.user is not None
        assert pulled.user["organization"] == "New"


def test_one_empty_answer_ends_nothing_in_a_pull(clerk: FakeClerk, few: SyncContext) -> None:
    show_members_of(clerk, ANN, [], total=0)
    pull(few, ANN, confirmed=False)
    assert organizations(few)[ANN] == "Zoo"
    assert report(few).differing == 0


Happen = Callable[[FakeClerk, SyncContext], None]


def join(clerk: FakeClerk, both: SyncContext) -> None:
    at = now_ms()
    shown = membership(CAT, id="orgmem_d", created_at=at, updated_at=at)
    clerk.put_members(shown)
    deliver(both, membership_event(data=shown))


def leave(clerk: FakeClerk, both: SyncContext) -> None:
    shown = membership(ANN, organization(ZOO, "Zoo"), id=IN_ZOO, created_at=NOW + 10)
    clerk.remove_members(IN_ZOO)
    deliver(both, membership_event("organizationMembership.deleted", shown, timestamp=now_ms()))


def rename(clerk: FakeClerk, both: SyncContext) -> None:
    shown = organization(ACME, "New", updated_at=now_ms())
    clerk.put_organization(shown)
    deliver(both, organization_event(data=shown))


def dissolve(clerk: FakeClerk, both: SyncContext) -> None:
    clerk.remove_organization(ACME)
    deliver(both, organization_event("organization.deleted", dissolved(ACME), timestamp=now_ms()))


@pytest.mark.parametrize("happen", [join, leave, rename, dissolve])
@pytest.mark.parametrize("after", range(7))
def test_what_happens_while_they_are_compared_is_no_drift(
    clerk: FakeClerk, few: SyncContext, happen: Happen, after: int
) -> None:
    clerk.before = partial(happen_at, clerk, partial(happen, clerk, few), after)
    assert report(few).differing == 0


@pytest.mark.parametrize("after", range(0, 9, 2))
def test_no_membership_is_skipped_while_others_end(clerk: FakeClerk, both: SyncContext, after: int) -> None:
    filled(clerk, both, 300, 300)
    clerk.shortens_pages_to = 100
    random = Random(after)
    gone = iter(random.sample(range(300), 60))

    def end_some(request: Request) -> None:
        if request.path == "/organization_memberships" and len(clerk.requests) > after:
            for _ in range(20):
                if (number := next(gone, None)) is not None:
                    clerk.remove_members(f"orgmem_2fake{number:08}")

    clerk.before = end_some
    found = report(both, allow_deletes=1000)
    assert found.refusal is None
    clerk.before = lambda _: None
    assert fix(both, allow_deletes=1000) == []
    assert len(clerk.member_ids()) < 300
    assert sum(map(bool, organizations(both).values())) == len(clerk.member_ids())


def test_a_user_who_signs_up_and_joins_beside_a_backfill(clerk: FakeClerk, both: SyncContext) -> None:
    clerk.put_many(600)
    clerk.put_many_members(600)

    def sign_up(request: Request) -> None:
        if request.path == "/organization_memberships" and ANN not in clerk.ids():
            clerk.put(user(ANN))
            clerk.put_members(membership(ANN))
            deliver(both, membership_event(data=membership(ANN)), user_event(data=user(ANN)))

    clerk.before = sign_up
    Backfill(both).everything()
    assert organizations(both)[ANN] == "Acme"
    assert report(both).differing == 0

"""Drift between the tables and Clerk: found, fixed, and never fixed from a listing that proves nothing."""

import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

import config
from db import instances
from db.times import now_ms
from tests.support.fake_clerk import FakeClerk, Request, happen_at, numbered_id, show_first
from tests.support.payloads import (
    ABSENT,
    ACME,
    ANN,
    BEN,
    CAT,
    NOW,
    deleted_event,
    email_entry,
    membership,
    organization,
    user,
    user_event,
)
from tests.support.sync import (
    assert_refused,
    count,
    deliver,
    execute,
    filled,
    fix,
    open_context,
    query,
    report,
    rows,
    tombstones,
)
from worker.sync.backfill import Backfill
from worker.sync.context import SyncContext
from worker.sync.pull import PullOutcome, pull
from worker.sync.reconcile import Claim, Reconcile, Report, Stale

OPERATIONS = Path(__file__).parents[2] / "docs" / "operations.md"


def test_equal_tables_have_no_drift(clerk: FakeClerk, both: SyncContext) -> None:
    filled(clerk, both, 1200)
    found = report(both)
    assert found == Report(1200, 1200, 1200, [], [], {}, [], [], 0, None)
    assert found.differing == 0


def test_no_user_anywhere_is_no_drift(both: SyncContext) -> None:
    assert report(both) == Report(0, 0, 0, [], [], {}, [], [], 0, None)


def test_who_is_missing_is_found_and_synced(clerk: FakeClerk, both: SyncContext) -> None:
    filled(clerk, both, 20)
    clerk.put_many(730, first=20)
    assert set(report(both).missing) == set(clerk.ids()[20:])
    assert count(both.settings) == 20
    assert fix(both) == []
    assert set(rows(both.settings)) == set(clerk.ids())


STALE: dict[str, tuple[str, str]] = {
    "email": ("email = 'other@example.com'", "email"),
    "name": ("name = 'Other'", "name"),
    "organization": ("organization = 'Other'", "organization"),
    "role": ("role = 'admin'", "role"),
    "created_at": ("created_at = created_at + interval '1 ms'", "created_at"),
    "login": ("last_login_at = NULL", "last_login_at"),
    "an older login": ("last_login_at = last_login_at - interval '1 h'", "last_login_at"),
}


@pytest.mark.parametrize(("change", "column"), STALE.values(), ids=STALE)
def test_a_stale_column_is_named_and_fixed(
    clerk: FakeClerk, both: SyncContext, change: str, column: str
) -> None:
    clerk.put(user(ANN, last_sign_in_at=NOW), user(BEN))
    Backfill(both).everything()
    before = rows(both.settings)
    execute(both.settings, f"UPDATE users SET {change} WHERE clerk_id = '{ANN}'")
    if column == "last_login_at":
        execute(both.settings, "UPDATE user_sync SET last_login_at = NULL")
    found = report(both)
    assert found.stale == [Stale(ANN, (column,))]
    assert found.differing == 1
    assert fix(both) == []
    assert rows(both.settings) == before


def test_what_differs_and_is_no_drift(clerk: FakeClerk, both: SyncContext) -> None:
    clerk.put(user(ANN, last_sign_in_at=NOW), user(BEN, email=None), user(CAT, email_addresses=ABSENT))
    Backfill(both).everything()
    execute(both.settings, "UPDATE users SET last_login_at = now()")
    deliver(both, deleted_event("user_gone"))
    assert report(both).differing == 0


@pytest.mark.parametrize(
    ("source", "change"), [("role_source", "role = 'admin'"), ("organization_source", "organization = 'Own'")]
)
def test_a_column_of_the_applications_own_is_not_compared(
    clerk: FakeClerk, settings: config.Settings, source: str, change: str
) -> None:
    clerk.put(user(ANN))
    with open_context(settings.model_copy(update={source: "none"})) as both:
        Backfill(both).everything()
        execute(settings, f"UPDATE users SET {change}")
        assert report(both).differing == 0
    with open_context(settings) as both:
        assert report(both).differing == 1


def test_who_is_gone_in_clerk_is_a_ghost_and_gets_a_tombstone(clerk: FakeClerk, both: SyncContext) -> None:
    filled(clerk, both, 30)
    gone = {numbered_id(i) for i in range(10)}
    clerk.remove(*gone)
    assert set(report(both).ghost) == gone
    assert count(both.settings) == 30
    assert fix(both) == []
    assert tombstones(both.settings) == gone
    assert set(rows(both.settings)) == set(clerk.ids())
    deliver(both, user_event("user.updated", user(numbered_id(3), updated_at=NOW + 9000)))
    assert numbered_id(3) not in rows(both.settings)


def test_a_ghost_is_anonymised_where_rows_are_kept(clerk: FakeClerk, settings: config.Settings) -> None:
    clerk.put(user(ANN), user(BEN))
    with open_context(settings.model_copy(update={"user_deletion": "anonymize"})) as both:
        Backfill(both).everything()
        clerk.remove(ANN)
        assert fix(both) == []
    assert rows(settings)[ANN].name == "Deleted user"


def test_who_was_only_left_out_of_the_listing_is_no_ghost(clerk: FakeClerk, both: SyncContext) -> None:
    filled(clerk, both, 300)
    clerk.hidden = {numbered_id(i) for i in range(0, 300, 3)}
    clerk.counts = 200
    found = report(both)
    assert (found.listed, found.local, found.ghost, found.refusal) == (200, 300, {}, None)


@pytest.mark.parametrize("ahead_s", [None, -600, 600])
def test_who_has_only_just_signed_up_is_no_ghost(
    clerk: FakeClerk, both: SyncContext, ahead_s: float | None
) -> None:
    clerk.ahead_s = ahead_s
    filled(clerk, both, 20)
    signed_up_at = now_ms() + int((ahead_s or 0) * 1000) - 10_000
    deliver(both, user_event(data=user(ANN, created_at=signed_up_at), timestamp=signed_up_at))
    assert fix(both) == []
    assert ANN in rows(both.settings)
    execute(
        both.settings,
        f"UPDATE users SET created_at = created_at - interval '1 minute' WHERE clerk_id = '{ANN}'",
    )
    assert fix(both) == []
    assert tombstones(both.settings) == {ANN}


def test_where_ids_are_overlooked_each_ghost_is_asked_for_alone(clerk: FakeClerk, both: SyncContext) -> None:
    filled(clerk, both, 600)
    clerk.knows_user_id = False
    clerk.remove(numbered_id(1))
    clerk.hidden = {numbered_id(2), numbered_id(599)}
    clerk.counts = 597
    assert list(report(both).ghost) == [numbered_id(1)]
    asked = {request.path for request in clerk.requests}
    assert asked >= {f"/users/{numbered_id(i)}" for i in (1, 2, 599)}


def test_rows_that_are_not_clerks_are_left_alone(clerk: FakeClerk, both: SyncContext) -> None:
    filled(clerk, both, 5)
    for clerk_id in ("legacy/1", "../users", "a b", "count"):
        insert = "INSERT INTO users (clerk_id, email, name)"
        execute(both.settings, f"{insert} VALUES ('{clerk_id}', md5('{clerk_id}') || '@example.com', 'Own')")
    assert report(both).ghost == {}


@pytest.mark.parametrize("shown", [0, 1, 50])
def test_a_short_answer_to_a_question_for_ids_proves_nothing(
    clerk: FakeClerk, both: SyncContext, shown: int
) -> None:
    filled(clerk, both, 300)
    clerk.remove(numbered_id(1))
    clerk.hidden = {numbered_id(i) for i in range(2, 62)}
    clerk.counts = 239
    clerk.before = partial(cut_answers_by_id, clerk, shown)
    found = report(both)
    assert numbered_id(1) in found.ghost
    assert list(found.ghost) == [numbered_id(1)] or found.refusal


def cut_answers_by_id(clerk: FakeClerk, shown: int, request: Request) -> None:
    if asked := request.parameters.get("user_id"):
        clerk.show_next([clerk.user(clerk_id) for clerk_id in asked if clerk_id in clerk.ids()][:shown])


def test_a_listing_that_was_cut_short_deletes_no_user(clerk: FakeClerk, both: SyncContext) -> None:
    filled(clerk, both, 1200)
    clerk.remove(numbered_id(0))
    clerk.put(user(ANN))
    for listed in (1, 499, 500, 501, 1199):
        clerk.lists_at_most = listed
        assert_refused(both, "cut short", 10_000)
    assert_refused(both, "cut short")


@pytest.mark.parametrize("allow_deletes", [None, 10_000])
@pytest.mark.parametrize("counts", [None, 0])
def test_an_empty_listing_deletes_no_user(
    clerk: FakeClerk, both: SyncContext, counts: int | None, allow_deletes: int | None
) -> None:
    filled(clerk, both, 5)
    clerk.lists_at_most, clerk.counts = 0, counts
    assert_refused(both, "cut short" if counts is None else "lists no users", allow_deletes)


def test_where_no_users_are_listed_the_refusal_names_the_way_on(clerk: FakeClerk, both: SyncContext) -> None:
    filled(clerk, both, 5)
    clerk.remove(*clerk.ids())
    assert_refused(both, "clerk-sync pull ID", 10_000)
    assert pull(both, numbered_id(3), confirmed=True).outcome is PullOutcome.DELETED
    assert tombstones(both.settings) == {numbered_id(3)}


@pytest.mark.parametrize(
    ("local", "gone", "percent", "is_refused"),
    [
        (30, 10, 5, False),
        (30, 11, 5, True),
        (300, 15, 5, False),
        (300, 16, 5, True),
        (300, 16, 6, False),
        (300, 10, 0, False),
        (300, 11, 0, True),
        (30, 29, 100, False),
    ],
)
def test_a_listing_that_shrank_too_much_deletes_no_user(
    clerk: FakeClerk, settings: config.Settings, *, local: int, gone: int, percent: float, is_refused: bool
) -> None:
    with open_context(settings.model_copy(update={"reconcile_max_delete": percent})) as both:
        filled(clerk, both, local)
        clerk.remove(*(numbered_id(i) for i in range(gone)))
        if is_refused:
            assert_refused(both, f"--allow-deletes {gone}")
            assert_refused(both, f"--allow-deletes {gone}", gone - 1)
            assert fix(both, allow_deletes=gone) == []
        else:
            assert_refused(both, f"--allow-deletes {gone}", 0)
            assert fix(both) == []
        assert count(settings) == local - gone


def test_a_key_that_knows_no_user_here_deletes_no_user(clerk: FakeClerk, both: SyncContext) -> None:
    filled(clerk, both, 6)
    clerk.remove(*clerk.ids())
    clerk.put(user(ANN), user(BEN))
    assert_refused(both, "CLERK_SECRET_KEY")
    assert fix(both, allow_deletes=6) == []
    assert rows(both.settings).keys() == {ANN, BEN}


def test_a_key_of_another_instance_than_all_users_here_fixes_nothing(
    clerk: FakeClerk, both: SyncContext
) -> None:
    filled(clerk, both, 3)
    clerk.instance_id = "ins_other"
    clerk.remove(*clerk.ids())
    clerk.put(user(ANN), user(BEN))
    with open_context(both.settings) as wrong:
        assert_refused(wrong, "CLERK_SECRET_KEY")
        assert_refused(wrong, "CLERK_SECRET_KEY", allow_deletes=100)
        Backfill(wrong).everything()
        assert fix(wrong) == []
    assert count(both.settings) == 5


def test_a_claim_that_clerk_does_not_know_is_found_and_fixed(clerk: FakeClerk, both: SyncContext) -> None:
    """Ben had Ann's address once, and the word that he let it go was lost."""
    deliver(both, user_event(data=user(BEN, "shared@example.com", updated_at=NOW + 500)))
    deliver(both, user_event(data=user(ANN, "shared@example.com", updated_at=NOW + 100)))
    clerk.put(user(ANN, "shared@example.com", updated_at=NOW + 100))
    clerk.put(user(BEN, "ben@example.com", updated_at=NOW + 600))
    found = report(both)
    assert found.claims == [Claim(ANN, BEN)]
    assert found.stale == [Stale(BEN, ("email",))]
    assert fix(both) == []
    assert {clerk_id: row.email for clerk_id, row in rows(both.settings).items()} == {
        ANN: "shared@example.com",
        BEN: "ben@example.com",
    }


def test_an_address_that_a_ghost_holds_goes_to_its_user(clerk: FakeClerk, both: SyncContext) -> None:
    deliver(both, user_event(data=user(BEN, "shared@example.com", updated_at=NOW + 500)))
    deliver(both, user_event(data=user(ANN, "shared@example.com", updated_at=NOW + 100)))
    clerk.put(user(ANN, "shared@example.com", updated_at=NOW + 100))
    found = report(both)
    assert (found.claims, list(found.ghost)) == ([Claim(ANN, BEN)], [BEN])
    assert fix(both) == []
    assert rows(both.settings)[ANN].email == "shared@example.com"


def test_an_unverified_claim_that_loses_is_no_drift(clerk: FakeClerk, both: SyncContext) -> None:
    entry = email_entry("shared@example.com", verified=False)
    claims = {"email_addresses": [entry], "primary_email_address_id": entry["id"]}
    clerk.put(user(ANN, "shared@example.com"), user(BEN, updated_at=NOW + 500, **claims))
    Backfill(both).everything()
    assert rows(both.settings)[ANN].email == "shared@example.com"
    assert report(both).differing == 0


def test_users_of_another_instance_are_not_deleted_by_absence(clerk: FakeClerk, both: SyncContext) -> None:
    clerk.put(user(ANN))
    deliver(both, user_event(data=user(BEN)), user_event(data=user(CAT), instance_id="ins_other"))
    unknown = user_event(data=user("user_old"), instance_id=ABSENT)
    deliver(both, unknown)
    found = report(both, allow_deletes=10)
    assert (list(found.ghost), found.elsewhere) == ([BEN], 2)
    assert fix(both, allow_deletes=10) == []
    assert rows(both.settings).keys() == {ANN, CAT, "user_old"}
    for clerk_id in (CAT, "user_old", "user_never_seen"):
        assert pull(both, clerk_id, confirmed=True).outcome is PullOutcome.ELSEWHERE
    assert tombstones(both.settings) == {BEN}


def test_a_user_of_an_unknown_instance_is_deleted_while_there_is_one_instance(
    clerk: FakeClerk, both: SyncContext
) -> None:
    clerk.put(user(ANN))
    deliver(both, user_event(data=user(BEN), instance_id=ABSENT))
    assert list(report(both).ghost) == [BEN]
    assert fix(both) == []
    assert instances.seen(both.database) == [clerk.instance_id]


def test_who_was_deleted_here_and_not_in_clerk_is_reported_and_stays_deleted(
    clerk: FakeClerk, both: SyncContext
) -> None:
    clerk.put(user(ANN), user(BEN))
    Backfill(both).everything()
    deliver(both, deleted_event(ANN))
    found = report(both)
    assert (found.tombstone, found.differing) == ([ANN], 1)
    assert fix(both) == [ANN]
    assert rows(both.settings).keys() == {BEN}


def test_a_newer_version_that_clerk_does_not_know_is_drift_that_stays(
    clerk: FakeClerk, both: SyncContext
) -> None:
    clerk.put(user(ANN))
    deliver(both, user_event("user.updated", user(ANN, first_name="Future", updated_at=NOW + 10**9)))
    assert report(both).stale == [Stale(ANN, ("name",))]
    assert fix(both) == [ANN]


Happen = Callable[[FakeClerk, SyncContext], None]


def sign_up(clerk: FakeClerk, both: SyncContext) -> None:
    shown = user(ANN, created_at=now_ms(), updated_at=now_ms())
    clerk.put(shown)
    deliver(both, user_event(data=shown))


def update(clerk: FakeClerk, both: SyncContext) -> None:
    shown = user(numbered_id(5), first_name="New", updated_at=now_ms())
    clerk.put(shown)
    deliver(both, user_event("user.updated", shown))


def delete(clerk: FakeClerk, both: SyncContext) -> None:
    clerk.remove(numbered_id(5))
    deliver(both, deleted_event(numbered_id(5), timestamp=now_ms()))


@pytest.mark.parametrize("happen", [sign_up, update, delete])
@pytest.mark.parametrize("after", [0, 1, 2, 3, 4, 5])
def test_what_happens_while_they_are_compared_is_no_drift(
    clerk: FakeClerk, both: SyncContext, happen: Happen, after: int
) -> None:
    clerk.shortens_pages_to = 100
    filled(clerk, both, 240)
    clerk.before = partial(happen_at, clerk, partial(happen, clerk, both), after)
    assert report(both).differing == 0


@pytest.mark.parametrize("knows_cursor", [True, False])
def test_a_deletion_and_a_sign_up_around_the_end_of_the_listing_do_not_cut_it_short(
    clerk: FakeClerk, both: SyncContext, *, knows_cursor: bool
) -> None:
    """Who was deleted before the walk came there is counted at first, who signs up after it at last."""
    filled(clerk, both, 1200)
    clerk.knows_cursor = knows_cursor

    def move(request: Request) -> None:
        if request.path == "/users" and numbered_id(1150) in clerk.ids():
            clerk.remove(numbered_id(1150))
            deliver(both, deleted_event(numbered_id(1150), timestamp=now_ms()))
        if request.path == "/users/count" and numbered_id(1150) not in clerk.ids():
            sign_up(clerk, both)

    clerk.before = move
    found = report(both)
    assert (found.listed, found.counted, found.refusal, found.differing) == (1200, 1200, None, 0)


@pytest.mark.parametrize("ahead_s", [None, -600, 600])
def test_a_delivery_that_is_on_its_way_is_waited_for(
    clerk: FakeClerk, both: SyncContext, ahead_s: float | None
) -> None:
    filled(clerk, both, 20)
    clerk.ahead_s = ahead_s
    now = now_ms() + int((ahead_s or 0) * 1000)
    shown = user(ANN, created_at=now, updated_at=now)
    clerk.put(shown)

    def deliver_it_with_the_count(request: Request) -> None:
        if len(clerk.requests) > 1 and request.path == "/users/count":
            deliver(both, user_event(data=shown))

    clerk.before = deliver_it_with_the_count
    began = time.monotonic()
    assert Reconcile(both, settle_s=0.5).report().differing == 0
    assert time.monotonic() - began >= 0.5


def show_first_page(clerk: FakeClerk, places: slice, *entries: object) -> None:
    """Let the first page be the users, with these entries in those places, and nothing come after it."""
    shown: list[object] = [clerk.user(clerk_id) for clerk_id in clerk.ids()]
    shown[places] = entries
    clerk.before = partial(show_first, clerk, shown)
    clerk.lists_at_most = 0


UNREADABLE: dict[str, object] = {
    "no object": None,
    "no id": {"object": "user"},
    "an id of another kind": {"id": 7},
}


@pytest.mark.parametrize("entry", UNREADABLE.values(), ids=UNREADABLE)
@pytest.mark.parametrize("number", [0, 7, 19])
def test_an_entry_that_cannot_be_read_is_counted_as_listed(
    clerk: FakeClerk, both: SyncContext, entry: object, number: int
) -> None:
    filled(clerk, both, 20)
    show_first_page(clerk, slice(number, number + 1), entry)
    found = report(both)
    assert (found.listed, found.counted, found.invalid, found.refusal) == (19, 20, 1, None)
    assert found.differing == 0


def test_an_unreadable_entry_makes_up_for_no_user_who_was_cut_off(
    clerk: FakeClerk, both: SyncContext
) -> None:
    filled(clerk, both, 20)
    show_first_page(clerk, slice(17, None), None)
    assert_refused(both, "cut short: 18 of 20")


def test_of_a_user_the_id_is_enough_to_be_no_ghost(clerk: FakeClerk, both: SyncContext) -> None:
    filled(clerk, both, 20)
    odd = {"id": numbered_id(7), "email_addresses": 5, "created_at": "soon", "public_metadata": []}
    show_first_page(clerk, slice(7, 8), odd)
    found = report(both)
    assert (found.listed, found.invalid, found.ghost, found.refusal) == (20, 0, {}, None)


def test_the_rows_that_example_deliveries_leave_are_removed_as_the_manual_says(
    clerk: FakeClerk, both: SyncContext
) -> None:
    clerk.put(user(ANN))
    Backfill(both).everything()
    example = "ins_example"
    deliver(both, user_event(data=user(BEN), instance_id=example), deleted_event(CAT, instance_id=example))
    recipe = re.search(r"(?:    DELETE FROM .*\n)+", OPERATIONS.read_text())
    assert recipe
    execute(both.settings, recipe[0].replace("ins_…", example))
    assert rows(both.settings).keys() == {ANN}
    assert tombstones(both.settings) == set()
    assert instances.seen(both.database) == [clerk.instance_id]


def test_fixing_brings_the_tables_to_what_changed_settings_say(
    clerk: FakeClerk, settings: config.Settings
) -> None:
    before = {
        "user_deletion": "anonymize",
        "profile_fields": ("image_url",),
        "organization_source": "membership",
    }
    metadata = {"organization": "Meta"}
    clerk.put(user(ANN, public_metadata=metadata))
    clerk.put_members(membership(ANN, organization(name="Acme")))
    with open_context(settings.model_copy(update=before)) as both:
        deliver(both, user_event(data=user(BEN)), deleted_event(BEN))
        Backfill(both).everything()
        assert report(both).differing == 0
    assert rows(settings)[ANN].organization == "Acme"
    with open_context(settings) as both:
        found = report(both)
        assert found.leftovers == ((BEN,), 1, 1)
        assert found.stale == [Stale(ANN, ("organization",))]
        assert fix(both) == []
    assert rows(settings).keys() == {ANN}
    assert rows(settings)[ANN].organization == "Meta"
    assert (
        query(settings, "SELECT clerk_id FROM user_profiles UNION SELECT clerk_id FROM membership_sync") == []
    )
    with open_context(settings.model_copy(update={"organization_source": "membership"})) as both:
        clerk.remove_members(*clerk.members_of(ANN))
        deliver(both, user_event(data=user(ANN)))
        fix(both)
    assert rows(settings)[ANN].organization is None


@pytest.mark.parametrize(("value", "shown"), [("id", ACME), ("slug", "acme-slug")])
def test_fixing_writes_the_value_of_organizations_that_the_settings_name(
    clerk: FakeClerk, settings: config.Settings, value: str, shown: str
) -> None:
    clerk.put(user(ANN))
    clerk.put_members(membership(ANN, organization(slug="acme-slug")))
    by_name = settings.model_copy(update={"organization_source": "membership"})
    with open_context(by_name) as both:
        Backfill(both).everything()
    assert rows(settings)[ANN].organization == "Acme"
    with open_context(by_name.model_copy(update={"organization_value": value})) as both:
        assert fix(both) == []
    assert rows(settings)[ANN].organization == shown


def test_changed_settings_are_applied_though_this_machines_clock_is_behind(
    clerk: FakeClerk, settings: config.Settings
) -> None:
    clerk.ahead_s = 3 * 3600
    clerks_now = now_ms() + 3 * 3600 * 1000
    shown = user(ANN, updated_at=clerks_now - 60_000, public_metadata={"company": "Fjord"})
    clerk.put(shown)
    with open_context(settings) as both:
        deliver(both, user_event(data=shown, timestamp=clerks_now - 60_000))
    changed = {"organization_metadata_key": "company", "profile_fields": ("image_url",)}
    with open_context(settings.model_copy(update=changed)) as both:
        assert fix(both) == []
    assert rows(settings)[ANN].organization == "Fjord"


def test_a_role_that_differs_is_found_and_fixed(clerk: FakeClerk, settings: config.Settings) -> None:
    clerk.put(user(ANN))
    clerk.put_members(membership(ANN, role="org:member"))
    with open_context(settings.model_copy(update={"organization_source": "membership"})) as both:
        Backfill(both).everything()
        clerk.put_members(membership(ANN, role="org:admin", updated_at=NOW + 900))
        assert report(both).stale == [Stale(ANN, ("organization",))]
        assert fix(both) == []
    seen = query(settings, "SELECT organization_id, clerk_id, role FROM organization_members")
    assert seen == [(ACME, ANN, "org:admin")]
    assert query(settings, "SELECT id, name FROM organizations") == [(ACME, "Acme")]


def test_fields_of_the_profile_are_read_compared_and_named(
    clerk: FakeClerk, settings: config.Settings
) -> None:
    clerk.put(user(ANN, image_url="https://img.example/1", username=None, banned=False))
    with open_context(settings.model_copy(update={"profile_fields": ("image_url", "username")})) as both:
        Backfill(both).everything()
        assert report(both).differing == 0
    with open_context(settings.model_copy(update={"profile_fields": ("image_url", "banned")})) as both:
        assert report(both).stale == [Stale(ANN, ("banned", "username"))]
        Backfill(both).everything()
        assert report(both).differing == 0
        clerk.put(user(ANN, image_url="https://img.example/2", banned=False, updated_at=NOW + 900))
        assert report(both).stale == [Stale(ANN, ("image_url",))]
        assert fix(both) == []
        kept = query(settings, "SELECT profile FROM user_profiles")
        assert kept == [({"image_url": "https://img.example/2", "banned": False},)]
        clerk.remove(ANN)
        pull(both, ANN, confirmed=True)
    assert query(settings, "SELECT profile FROM user_profiles") == []

"""Every user into the table: the first time, again, interrupted, and beside live deliveries."""

import threading
import time
from collections.abc import Callable
from functools import partial

import psycopg
import pytest
from pydantic import SecretStr

import config
from db.times import now_ms
from tests.support.fake_clerk import FakeClerk, Request, numbered_id, show_first, show_without_id
from tests.support.payloads import (
    ABSENT,
    ANN,
    BEN,
    CAT,
    NOW,
    deleted_event,
    session,
    session_event,
    user,
    user_event,
)
from tests.support.sync import backfill_until, count, deliver, execute, open_context, query, rows, tombstones
from worker.clerk.api import ClerkRefused, ClerkUnavailable
from worker.clerk.changes import user_change
from worker.clerk.payloads import FieldSources, parse_user
from worker.shutdown import Stopped, StopSignal
from worker.sync.backfill import OVERLAP_MS, Backfill, BackfillStats
from worker.sync.context import SyncContext


def adds_up(done: BackfillStats) -> bool:
    """Say whether each entry that was seen is counted once."""
    return done.created + done.updated + done.unchanged + done.invalid + done.refused == done.seen


def test_an_empty_table_gets_every_user(clerk: FakeClerk, both: SyncContext) -> None:
    clerk.put_many(1200)
    done = Backfill(both).everything()
    assert done == BackfillStats(seen=1200, created=1200, expected=1200)
    assert set(rows(both.settings)) == set(clerk.ids())


def test_a_user_read_from_the_api_is_stored_as_one_from_a_webhook(
    clerk: FakeClerk, both: SyncContext
) -> None:
    shown = user(ANN, public_metadata={"role": "admin", "organization": "Fjord"}, last_sign_in_at=NOW + 5)
    deliver(both, user_event(data=shown))
    delivered = rows(both.settings)
    execute(both.settings, "TRUNCATE users, user_sync")
    clerk.put(shown)
    Backfill(both).everything()
    assert rows(both.settings) == delivered


def test_a_second_run_finds_nothing_to_do_but_what_changed(clerk: FakeClerk, both: SyncContext) -> None:
    clerk.put_many(600)
    Backfill(both).everything()
    clerk.put(user(numbered_id(3), first_name="Changed", updated_at=NOW), user(ANN))
    assert Backfill(both).everything() == BackfillStats(
        seen=601, created=1, updated=1, unchanged=599, expected=601
    )
    assert rows(both.settings)[numbered_id(3)].name.startswith("Changed")


def test_a_row_that_was_changed_elsewhere_is_fixed(clerk: FakeClerk, both: SyncContext) -> None:
    clerk.put(user(ANN))
    Backfill(both).everything()
    before = rows(both.settings)
    execute(both.settings, "UPDATE users SET name = 'Meddler', email = 'meddler@example.com'")
    assert Backfill(both).everything().updated == 1
    assert rows(both.settings) == before


def test_what_came_by_webhook_and_is_newer_stays(clerk: FakeClerk, both: SyncContext) -> None:
    clerk.put(user(ANN), user(BEN))
    newer = user(ANN, "new@example.com", first_name="New", updated_at=NOW + 9000)

    def change_meanwhile(request: Request) -> None:
        if request.path == "/users":
            deliver(both, user_event("user.updated", newer), deleted_event(BEN))

    clerk.before = change_meanwhile
    Backfill(both).everything()
    assert rows(both.settings).keys() == {ANN}
    assert rows(both.settings)[ANN].email == "new@example.com"
    assert tombstones(both.settings) == {BEN}


def test_who_is_newer_here_than_in_the_listing_is_unchanged_and_a_later_login_an_update(
    clerk: FakeClerk, both: SyncContext
) -> None:
    clerk.put(user(ANN), user(BEN))
    for clerk_id in (ANN, BEN):
        newer = user(clerk_id, f"{clerk_id}@example.com", first_name="New", updated_at=NOW + 9000)
        deliver(both, user_event("user.updated", newer, timestamp=NOW + 9000))
    done = Backfill(both).everything()
    assert (done.updated, done.unchanged, adds_up(done)) == (0, 2, True)
    clerk.put(user(BEN, last_sign_in_at=NOW + 5000))
    before = rows(both.settings)
    done = Backfill(both).everything()
    assert (done.updated, done.unchanged, adds_up(done)) == (1, 1, True)
    assert rows(both.settings) == before | {BEN: before[BEN]._replace(last_login_at=NOW + 5000)}
    assert Backfill(both).everything().unchanged == 2


def test_a_row_that_the_database_does_not_let_be_changed_is_refused_and_not_updated(
    clerk: FakeClerk, both: SyncContext
) -> None:
    clerk.put_many(40)
    Backfill(both).everything()
    execute(both.settings, "ALTER TABLE users ADD CONSTRAINT no_name CHECK (name NOT LIKE 'New %')")
    clerk.put(user(numbered_id(3), first_name="New", updated_at=NOW))
    done = Backfill(both).everything()
    assert (done.updated, done.unchanged, done.refused, adds_up(done)) == (0, 39, 1, True)


def test_a_later_login_stays_and_an_earlier_one_is_stored(clerk: FakeClerk, both: SyncContext) -> None:
    clerk.put(user(ANN, last_sign_in_at=NOW), user(BEN, last_sign_in_at=NOW))
    deliver(both, session_event(data=session(ANN, created_at=NOW + 5000)))
    Backfill(both).everything()
    assert rows(both.settings)[ANN].last_login_at == NOW + 5000
    assert rows(both.settings)[BEN].last_login_at == NOW


def test_odd_entries_are_left_out_and_reported(clerk: FakeClerk, both: SyncContext) -> None:
    odd: list[object] = [user(ANN), None, user(ABSENT), user(BEN)]
    clerk.put(user(ANN), user(BEN))
    clerk.before = partial(show_first, clerk, odd)
    done = Backfill(both).everything()
    assert (done.created, done.invalid, adds_up(done)) == (2, 2, True)
    assert done.troubles == (
        "entry 2 was left out: it is no JSON object",
        "entry 3 was left out: it has no Clerk id",
    )


def test_a_user_that_the_database_refuses_stops_no_other(clerk: FakeClerk, both: SyncContext) -> None:
    clerk.put_many(40)
    execute(both.settings, "ALTER TABLE users ADD CONSTRAINT no_name CHECK (name NOT LIKE 'Name 17 %')")
    done = Backfill(both).everything()
    assert (done.seen, done.created, done.refused, count(both.settings)) == (40, 39, 1, 39)
    assert numbered_id(17) in done.troubles[0]
    assert "no_name" in done.troubles[0]
    assert "Name" not in done.troubles[0]


def test_who_is_locked_when_the_run_is_stopped_is_not_refused(settings: config.Settings) -> None:
    """A refused user counts as read: the run would go on behind them."""
    stopping = StopSignal()
    url = settings.database_url
    assert isinstance(url, SecretStr)
    with open_context(settings, stopping) as both, psycopg.connect(url.get_secret_value()) as application:
        deliver(both, user_event(data=user(ANN)))
        application.execute("SELECT FROM users FOR UPDATE")
        change = user_change(parse_user(user(ANN, first_name="New"), FieldSources()), now_ms())
        threading.Timer(1, stopping.request).start()
        with pytest.raises(Stopped):
            both.write([change], now_ms())


def is_first(request: Request) -> bool:
    """Say whether the request is for the beginning of the list."""
    return not request.parameter("starting_after") and request.parameter("offset", "0") == "0"


@pytest.mark.parametrize("knows_cursor", [True, False])
def test_an_interrupted_run_goes_on_where_it_was(
    clerk: FakeClerk, settings: config.Settings, knows_cursor: bool
) -> None:
    clerk.put_many(3200)
    clerk.knows_cursor = knows_cursor
    for _ in range(3):
        with pytest.raises(Stopped):
            backfill_until(settings, 1)
    with open_context(settings) as both:
        before = Backfill(both).resumable()
        assert before is not None
        assert 1400 <= before.seen <= 1500
        clerk.requests.clear()
        done = Backfill(both).everything()
        assert done.seen == done.expected == 3200
        assert Backfill(both).resumable() is None
    assert all(not is_first(request) for request in clerk.requests_for("/users"))
    assert set(rows(settings)) == set(clerk.ids())


def test_an_interrupted_run_counts_an_entry_without_an_id_once(
    clerk: FakeClerk, settings: config.Settings
) -> None:
    clerk.put_many(1200)
    clerk.before = partial(show_without_id, clerk, {numbered_id(499)})
    with pytest.raises(Stopped):
        backfill_until(settings, 1)
    with open_context(settings) as both:
        done = Backfill(both).everything()
    assert (done.seen, done.invalid) == (1200, 1)


def test_a_run_goes_on_after_its_last_user_was_deleted(clerk: FakeClerk, settings: config.Settings) -> None:
    clerk.put_many(1700)
    with pytest.raises(Stopped):
        backfill_until(settings, 2)
    clerk.remove(*(numbered_id(i) for i in range(990, 1000)))
    with open_context(settings) as both:
        assert Backfill(both).everything().seen >= 1690
    assert set(rows(settings)) >= set(clerk.ids())


@pytest.mark.parametrize(("status", "failure"), [(403, ClerkRefused), (503, ClerkUnavailable)])
def test_a_failure_of_the_api_is_an_error_and_keeps_what_was_read(
    clerk: FakeClerk, settings: config.Settings, status: int, failure: type[Exception]
) -> None:
    clerk.put_many(1700)
    clerk.before = partial(fail_after, clerk, numbered_id(999), status)
    with open_context(settings) as both:
        both.api._patience_s = 0.5
        with pytest.raises(failure):
            Backfill(both).everything()
        assert count(settings) == 1000
        clerk.before = lambda _: None
        clerk.requests.clear()
        assert Backfill(both).everything().seen == 1700
        assert clerk.requests_for("/users")[0].parameter("starting_after") == numbered_id(999)


def fail_after(clerk: FakeClerk, cursor: str, status: int, request: Request) -> None:
    if request.parameter("starting_after") == cursor:
        clerk.answer_next(status, "{}")


OTHER_SETTINGS: dict[str, object] = {
    "profile_fields": ("image_url",),
    "organization_source": "membership",
    "organization_value": "slug",
    "organization_metadata_key": "company",
    "role_source": "none",
}


@pytest.mark.parametrize(
    "reason",
    ["restart", "another key", "a day ago", "another database", "another version", *OTHER_SETTINGS],
)
def test_a_run_begins_anew_where_going_on_would_leave_something_out(
    clerk: FakeClerk, settings: config.Settings, reason: str
) -> None:
    clerk.put_many(1200)
    with pytest.raises(Stopped):
        backfill_until(settings, 1)
    clerk.requests.clear()
    if reason == "another key":
        clerk.key = "sk_live_another"
        settings = settings.model_copy(update={"clerk_secret_key": SecretStr(clerk.key)})
    if reason in OTHER_SETTINGS:
        settings = settings.model_copy(update={reason: OTHER_SETTINGS[reason]})
    if reason == "a day ago":
        execute(settings, "UPDATE sync_progress SET saved_at = saved_at - interval '25 hours'")
    if reason == "another version":
        execute(settings, "UPDATE sync_progress SET state = jsonb_set(state, '{done,renamed}', '1')")
    if reason == "another database":
        execute(settings, "TRUNCATE users, user_sync, sync_progress")
    with open_context(settings) as both:
        done = Backfill(both).everything(restart=reason == "restart")
    assert done.seen == 1200
    assert is_first(clerk.requests_for("/users")[0])
    assert count(settings) == 1200


def test_a_listing_that_ends_early_is_no_whole_one(clerk: FakeClerk, both: SyncContext) -> None:
    clerk.put_many(1700)
    clerk.lists_at_most = 800
    done = Backfill(both).everything()
    assert done.is_cut_short
    assert (done.seen, done.expected) == (800, 1700)
    clerk.lists_at_most = None
    clerk.requests.clear()
    assert not Backfill(both).everything().is_cut_short
    assert clerk.requests_for("/users")[0].parameter("starting_after") == numbered_id(799)
    assert count(both.settings) == 1700


def test_a_listing_that_never_has_as_many_as_counted_is_read_from_the_beginning_again(
    clerk: FakeClerk, both: SyncContext
) -> None:
    clerk.put_many(1200)
    clerk.counts = 1300
    for number in range(3):
        clerk.put(user(f"user_new{number}", created_at=NOW + number))
        assert Backfill(both).everything().is_cut_short
        if number == 0:
            clerk.put(user(numbered_id(3), first_name="Changed", updated_at=NOW))
    assert rows(both.settings)[numbered_id(3)].name.startswith("Changed")


def test_only_what_was_updated_since_is_read(clerk: FakeClerk, both: SyncContext) -> None:
    clerk.put_many(1700)
    clerk.put(
        user(ANN, updated_at=NOW + 1000), user(BEN, updated_at=NOW + 999), user(CAT, updated_at=NOW + 500)
    )
    done = Backfill(both).since(NOW + 999)
    assert (done.seen, done.created) == (2, 2)
    assert rows(both.settings).keys() == {ANN, BEN}
    assert len(clerk.requests_for("/users")) == 1
    assert not query(both.settings, "SELECT 1 FROM sync_progress")


@pytest.mark.parametrize("shown", [0, 1])
def test_a_listing_since_then_that_comes_to_no_older_user_must_be_of_all_users(
    clerk: FakeClerk, both: SyncContext, shown: int
) -> None:
    clerk.put(user(ANN, updated_at=NOW), user(BEN, updated_at=NOW + 1), user(CAT, updated_at=NOW + 2))
    clerk.lists_at_most = shown
    done = Backfill(both).since(NOW + 1)
    assert done.is_cut_short
    assert (done.seen, done.expected) == (shown, 3)
    clerk.lists_at_most = None
    assert not Backfill(both).since(NOW + 1).is_cut_short
    assert not Backfill(both).since(NOW).is_cut_short


def test_a_run_reaches_no_further_than_its_beginning_over_all_interruptions(
    clerk: FakeClerk, settings: config.Settings
) -> None:
    clerk.put_many(1700)
    clerk.put(user(ANN, created_at=NOW, updated_at=2 * now_ms()))
    before = now_ms()
    with pytest.raises(Stopped):
        backfill_until(settings, 1)
    after = now_ms()
    time.sleep(0.05)
    with open_context(settings) as both:
        task = Backfill(both)
        task.everything()
    assert before <= task.reach.began_at <= after
    assert task.reach.since == task.reach.began_at - OVERLAP_MS


@pytest.mark.parametrize("ahead_s", [None, -1200, 1200])
@pytest.mark.parametrize("read", [Backfill.everything, lambda task: task.since(0)], ids=["all", "since"])
def test_who_changed_after_their_page_is_read_by_the_next_run_whatever_the_clock_here(
    clerk: FakeClerk, both: SyncContext, read: Callable[[Backfill], object], ahead_s: float | None
) -> None:
    clerk.ahead_s = ahead_s
    minute = 60_000
    began_at = now_ms() + int((ahead_s or 0) * 1000)
    clerk.put(user(ANN), user(BEN, created_at=NOW + 1, updated_at=began_at + 15 * minute))
    task = Backfill(both)
    read(task)
    clerk.put(user(ANN, first_name="New", updated_at=began_at + minute))
    Backfill(both).since(task.reach.since)
    assert rows(both.settings)[ANN].name.startswith("New")


def test_everything_since_the_beginning_is_everything(clerk: FakeClerk, both: SyncContext) -> None:
    clerk.put_many(1700)
    assert Backfill(both).since(0).created == 1700

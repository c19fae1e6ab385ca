"""One user, now: by the function, and at the service where many callers ask at once."""

import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial

import pytest
from redis import Redis

import config
from db.times import now_ms
from tests.support.fake_clerk import FakeClerk, Request, numbered_id
from tests.support.payloads import ANN, BEN, CAT, NOW, deleted_event, session, session_event, user, user_event
from tests.support.settings import MakeSettings
from tests.support.sync import api_settings, count, deliver, execute, open_context, rows, tombstones
from tests.support.together import together
from tests.support.waiting import within
from worker.clerk.api import ClerkApiError, ClerkRefused
from worker.sync import pull_service
from worker.sync.backfill import Backfill
from worker.sync.context import SyncContext
from worker.sync.pull import PullOutcome, pull
from worker.sync.pull_service import PullResult, PullService, PullStatus
from worker.sync.reconcile import Reconcile
from worker.sync.shared_rate_limit import NoTurn, SharedLimit

OpenServices = Callable[[config.Settings, int], list[PullService]]


@pytest.fixture
def service(settings: config.Settings) -> Iterator[PullService]:
    with closing(PullService(settings)) as made:
        yield made


@pytest.fixture
def open_services() -> Iterator[OpenServices]:
    """Make so many services, as in so many processes; they are closed after the test."""
    with ExitStack() as stack:
        yield lambda settings, count: [
            stack.enter_context(closing(PullService(settings))) for _ in range(count)
        ]


def test_a_user_is_synced_and_the_row_returned(clerk: FakeClerk, both: SyncContext) -> None:
    clerk.put(user(ANN, last_sign_in_at=NOW))
    pulled = pull(both, ANN, confirmed=True)
    assert pulled.outcome is PullOutcome.FOUND
    assert pulled.user is not None
    row = rows(both.settings)[ANN]
    assert (pulled.user["clerk_id"], pulled.user["email"], pulled.user["name"]) == (ANN, row.email, row.name)
    assert (pulled.user["created_at"].timestamp() * 1000, pulled.user["role"]) == (NOW, "user")


def test_a_pull_is_no_older_than_a_webhook_that_came_before_it(clerk: FakeClerk, both: SyncContext) -> None:
    clerk.put(user(ANN))
    deliver(both, user_event("user.updated", user(ANN, first_name="Newer", updated_at=NOW + 9000)))
    pulled = pull(both, ANN, confirmed=True)
    assert pulled.user is not None
    assert pulled.user["name"].startswith("Newer")


@pytest.mark.parametrize("confirmed", [True, False])
def test_who_is_gone_in_clerk_is_deleted_here_for_good(
    clerk: FakeClerk, both: SyncContext, confirmed: bool
) -> None:
    clerk.put(user(ANN), user(BEN))
    Backfill(both).everything()
    clerk.remove(ANN)
    assert pull(both, ANN, confirmed=confirmed).outcome is PullOutcome.DELETED
    assert rows(both.settings).keys() == {BEN}
    assert tombstones(both.settings) == {ANN}
    deliver(both, user_event("user.updated", user(ANN, updated_at=NOW + 9000)))
    assert rows(both.settings).keys() == {BEN}


def test_who_was_never_seen_gets_a_tombstone_only_from_a_caller_who_is_sure(
    clerk: FakeClerk, both: SyncContext
) -> None:
    assert pull(both, ANN, confirmed=False).outcome is PullOutcome.ABSENT
    assert tombstones(both.settings) == set()
    clerk.put(user(ANN))
    assert pull(both, ANN, confirmed=False).outcome is PullOutcome.FOUND
    assert pull(both, BEN, confirmed=True).outcome is PullOutcome.DELETED
    assert tombstones(both.settings) == {BEN}


@pytest.mark.parametrize("ahead_s", [None, -600, 600])
def test_who_has_only_just_signed_up_is_not_deleted_unasked(
    clerk: FakeClerk, both: SyncContext, ahead_s: float | None
) -> None:
    clerk.ahead_s = ahead_s
    now = now_ms() + int((ahead_s or 0) * 1000)
    deliver(
        both, session_event(data=session(BEN)), user_event(data=user(ANN, created_at=now, updated_at=now))
    )
    for clerk_id in (ANN, BEN):
        assert pull(both, clerk_id, confirmed=False).outcome is PullOutcome.ABSENT
    assert rows(both.settings).keys() == {ANN}
    assert tombstones(both.settings) == set()
    clerk.put(user(CAT))
    pull(both, CAT, confirmed=True)
    assert pull(both, ANN, confirmed=False).outcome is PullOutcome.ABSENT
    assert pull(both, ANN, confirmed=True).outcome is PullOutcome.DELETED


def test_who_was_deleted_here_stays_deleted(clerk: FakeClerk, both: SyncContext) -> None:
    clerk.put(user(ANN))
    deliver(both, deleted_event(ANN))
    assert pull(both, ANN, confirmed=True) == (PullOutcome.FOUND, None)
    assert count(both.settings) == 0


def test_one_not_found_alone_deletes_no_user(clerk: FakeClerk, both: SyncContext) -> None:
    clerk.put(user(ANN))
    Backfill(both).everything()
    clerk.answer_next(404, '{"errors":[{"code":"resource_not_found"}]}', path=f"/users/{ANN}")
    assert pull(both, ANN, confirmed=True).outcome is PullOutcome.FOUND


def test_a_not_found_that_is_not_clerks_deletes_no_user(clerk: FakeClerk, both: SyncContext) -> None:
    clerk.put(user(ANN))
    Backfill(both).everything()
    clerk.answer_next(404, "<html>no such page</html>", path=f"/users/{ANN}")
    with pytest.raises(ClerkRefused):
        pull(both, ANN, confirmed=True)
    assert rows(both.settings).keys() == {ANN}


@pytest.mark.parametrize("here", [2, 5])
def test_a_key_that_knows_no_user_here_deletes_no_user(
    clerk: FakeClerk, both: SyncContext, here: int
) -> None:
    clerk.put_many(here)
    Backfill(both).everything()
    clerk.remove(*clerk.ids())
    clerk.put(user(ANN), user(BEN))
    assert pull(both, numbered_id(0), confirmed=False) == (PullOutcome.UNPROVEN, None)
    assert count(both.settings) == here
    assert tombstones(both.settings) == set()
    assert pull(both, numbered_id(0), confirmed=True).outcome is PullOutcome.DELETED


def test_the_last_of_all_can_be_deleted(both: SyncContext) -> None:
    deliver(both, user_event(data=user(ANN)), deleted_event(BEN))
    assert pull(both, ANN, confirmed=False).outcome is PullOutcome.DELETED
    assert tombstones(both.settings) == {ANN, BEN}


@pytest.mark.parametrize("confirmed", [True, False])
def test_one_other_that_clerk_knows_is_enough_to_delete(
    clerk: FakeClerk, both: SyncContext, confirmed: bool
) -> None:
    clerk.put_many(40)
    Backfill(both).everything()
    clerk.remove(*clerk.ids()[:-1])
    before = len(clerk.asked)
    assert pull(both, numbered_id(0), confirmed=confirmed).outcome is PullOutcome.DELETED
    assert tombstones(both.settings) == {numbered_id(0)}
    assert [request.path for request in clerk.asked[before:]] == [f"/users/{numbered_id(0)}", "/users"]


@pytest.mark.parametrize(
    "synchronize",
    [
        lambda both: Backfill(both).everything(),
        lambda both: Backfill(both).since(0),
        lambda both: Reconcile(both).report(),
        lambda both: pull(both, ANN, confirmed=True),
        lambda both: pull(both, BEN, confirmed=True),
    ],
    ids=["backfill", "backfill since", "reconcile", "pull of one deleted", "pull of one missing"],
)
def test_a_key_of_another_instance_changes_no_user(
    clerk: FakeClerk, settings: config.Settings, synchronize: Callable[[SyncContext], object]
) -> None:
    clerk.put(user(BEN))
    with open_context(settings) as both:
        deliver(both, user_event(data=user(ANN)))
    wrong = settings.model_copy(update={"clerk_instance_id": "ins_other"})
    with open_context(wrong) as both, pytest.raises(ClerkRefused, match="CLERK_INSTANCE_ID"):
        synchronize(both)
    assert rows(settings).keys() == {ANN}
    assert clerk.asked == []


def test_an_answer_about_another_user_is_refused(clerk: FakeClerk, both: SyncContext) -> None:
    for entry in (user(BEN), {}, {"id": 5}):
        clerk.answer_next(200, json.dumps(entry))
        with pytest.raises(ClerkApiError):
            pull(both, ANN, confirmed=True)
    assert count(both.settings) == 0


def test_closing_waits_for_the_call_under_way(clerk: FakeClerk, settings: config.Settings) -> None:
    clerk.put(user(ANN))
    asked = threading.Event()

    def answer_late(_: Request) -> None:
        asked.set()
        time.sleep(0.5)

    clerk.before = answer_late
    answers: list[PullResult] = []
    with closing(PullService(settings)) as service:
        call = threading.Thread(target=lambda: answers.append(service.pull(ANN)))
        call.start()
        assert asked.wait(30)
    call.join(30)
    assert [answer.status for answer in answers] == [PullStatus.FOUND]
    assert service.pull(ANN).status is PullStatus.BUSY


def test_calls_together_leave_half_of_clerks_limit_to_the_application(
    clerk: FakeClerk,
    make_settings: MakeSettings,
    open_services: OpenServices,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Calls that Clerk answers at once, a second look after a 404, and what is tried again after a 503."""
    monkeypatch.setattr(pull_service, "WAIT_S", 60)  # no call ends because the machine is busy
    monkeypatch.setattr(pull_service, "API_PATIENCE_S", 60)
    clerk.key = "sk_test_9fK2mQ7xVbN4tR8wZc3L"
    settings = api_settings(make_settings, clerk)
    clerk.put_many(60)
    with open_context(settings) as both:
        Backfill(both).everything()
    clerk.remove(*clerk.ids()[::2])
    clerk.answer_next(503, times=10)
    clerk.requests.clear()
    services = open_services(settings, 6)
    statuses: list[PullStatus] = []
    calls = (partial(call_on, clerk, service, i, statuses) for i, service in enumerate(services))
    together(calls, 60)
    assert set(statuses) == {PullStatus.FOUND, PullStatus.ABSENT, PullStatus.BUSY}
    assert clerk.most_within(10) <= 50
    assert "/users" in {request.path for request in clerk.requests}


def call_on(clerk: FakeClerk, service: PullService, first: int, statuses: list[PullStatus]) -> None:
    """Call until there have been no turns, and then turns again."""
    for number in itertools.count(first, 6):
        if PullStatus.BUSY in statuses and len(clerk.requests) > 75:
            return
        statuses.append(service.pull(numbered_id(number % 60)).status)
        statuses.append(service.pull(numbered_id(0)).status)  # all of them this one as well
        if statuses[-1] is PullStatus.BUSY:
            time.sleep(0.05)


def test_who_gets_no_turn_is_answered_at_once_and_clerk_is_not_asked(
    clerk: FakeClerk,
    make_settings: MakeSettings,
    open_services: OpenServices,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pull_service, "PERIOD_S", 600)
    clerk.key = "sk_test_9fK2mQ7xVbN4tR8wZc3L"
    services = open_services(api_settings(make_settings, clerk), 6)
    for number, service in enumerate(services * 9):
        service.pull(numbered_id(number))
    with within(30 * pull_service.API_PATIENCE_S / 2):
        answers = [services[0].pull(f"user_{number}") for number in range(30)]
    assert set(answers) == {PullResult(PullStatus.BUSY, reason="too many users are being pulled")}
    assert len(clerk.requests) == 50


def test_a_turn_counts_until_a_period_after_the_answer(redis: Redis) -> None:
    limit = SharedLimit(redis, "turns", 2, 20.0)
    other = SharedLimit(redis, "turns", 2, 20.0)
    with limit.turn():
        let_pass(redis, 30)
        with other.turn(), pytest.raises(NoTurn):
            limit.turn().__enter__()
    let_pass(redis, 10)
    with pytest.raises(NoTurn):
        other.turn().__enter__()
    let_pass(redis, 15)
    with limit.turn(), other.turn():
        pass


def let_pass(redis: Redis, seconds: float) -> None:
    """Let every turn have been taken, or have been answered, that much earlier."""
    for turn, counts_until in redis.zscan_iter("turns"):
        redis.zadd("turns", {turn: counts_until - seconds * 1000})


def test_turns_taken_by_a_clock_that_was_set_back_do_not_count_for_ever(redis: Redis) -> None:
    redis.zadd("turns", {"earlier": now_ms() + 3_600_000})
    with SharedLimit(redis, "turns", 1, 10.0).turn():
        assert redis.zcard("turns") == 1
        assert 0 < redis.pttl("turns") <= 70_000


def test_after_a_429_the_next_user_is_answered_at_once_with_how_long_it_lasts(
    clerk: FakeClerk, service: PullService, redis: Redis
) -> None:
    clerk.put(user(ANN), user(BEN))
    clerk.answer_next(429, headers={"Retry-After": "6"})
    first = service.pull(ANN)
    assert (first.status, first.retry_after_s) == (PullStatus.UNAVAILABLE, 6)
    second = service.pull(BEN)
    assert second.status is PullStatus.UNAVAILABLE
    assert second.retry_after_s is not None
    assert 6 - pull_service.API_PATIENCE_S < second.retry_after_s <= 6, "it was not waited for"
    seconds = math.ceil(second.retry_after_s)
    assert second.reason == f"Clerk's rate limit is exhausted: try again in {seconds} s"
    assert len(clerk.asked) == 1
    assert redis.zcard("clerk-sync:pull:turns") == 1, "no turn is spent on what is not asked"


def test_a_turn_that_is_not_far_away_is_waited_for(clerk: FakeClerk, service: PullService) -> None:
    clerk.put(user(BEN))
    clerk.answer_next(429, headers={"Retry-After": "2"})
    service.pull(ANN)
    assert service.pull(BEN).status is PullStatus.FOUND


def test_a_user_that_the_database_refuses_is_reported_without_the_row(
    clerk: FakeClerk, service: PullService, settings: config.Settings
) -> None:
    execute(settings, "ALTER TABLE users ADD CONSTRAINT no_name CHECK (name = '')")
    clerk.put(user(ANN, first_name="Secretname"))
    answer = service.pull(ANN)
    assert answer.status is PullStatus.UNAVAILABLE
    assert "no_name" in str(answer.reason)
    assert "Secretname" not in str(answer)

"""The client of Clerk's API against a server that behaves, and one that does not."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
import structlog.testing

from config import SettingsError
from db.times import now_ms
from tests.support.fake_clerk import TRACE_ID, FakeClerk, numbered_id
from tests.support.payloads import ABSENT, ANN, BEN, CAT, NOW, body, user
from tests.support.sync import api_alone, client
from tests.support.together import together
from tests.support.waiting import wait_until, within
from worker.clerk import rate_limit
from worker.clerk.api import (
    LAST_UPDATED_FIRST,
    OLDEST_FIRST,
    ClerkApi,
    ClerkApiError,
    ClerkRefused,
    ClerkUnavailable,
    InvalidEntry,
)
from worker.clerk.changes import user_change
from worker.clerk.payloads import FieldSources, UserUpserted, parse
from worker.clerk.rate_limit import RateLimit
from worker.shutdown import Stopped, StopSignal


@pytest.fixture
def api(clerk: FakeClerk) -> Iterator[ClerkApi]:
    with client(api_alone(clerk), patience_s=5) as made:
        yield made


def test_a_profile_reads_as_the_same_profile_in_a_webhook_does(clerk: FakeClerk, api: ClerkApi) -> None:
    shown = user(ANN, public_metadata={"role": "admin", "organization": "Fjord"}, last_sign_in_at=NOW)
    clerk.put(shown)
    event = {"type": "user.updated", "data": shown, "timestamp": NOW}
    parsed = parse(body(event).decode(), FieldSources()).fact
    assert isinstance(parsed, UserUpserted)
    assert api.user(ANN).users == [parsed.user]
    assert api.page(OLDEST_FIRST).users == [parsed.user]


def test_what_is_read_was_observed_when_the_request_was_sent(clerk: FakeClerk, api: ClerkApi) -> None:
    clerk.put(user(ANN))
    reached: list[int] = []
    clerk.before = lambda _: reached.append(now_ms())
    asked = now_ms()
    for page in (api.page(OLDEST_FIRST), api.user(ANN), api.users([ANN])):
        assert asked <= page.observed_at <= reached.pop(0)
        profile = user_change(page.users[0], page.observed_at).profile
        assert profile is not None
        assert profile.version == (NOW + 20, page.observed_at)


@pytest.mark.parametrize("ahead_s", [-10_800, -30, 0, 30, 10_800])
def test_where_the_clocks_are_far_apart_clerks_counts(
    clerk: FakeClerk, api: ClerkApi, ahead_s: float
) -> None:
    clerk.put(user(ANN))
    clerk.ahead_s = ahead_s
    asked = now_ms()
    observed_at = api.user(ANN).observed_at
    if abs(ahead_s) < 60:
        assert asked <= observed_at <= now_ms()
    else:  # the header says whole seconds
        assert asked - 1000 <= observed_at - ahead_s * 1000 <= now_ms()


@pytest.mark.parametrize(
    "date", ["", "soon", "Sat, 32 Jan 2026 00:00:00 GMT", "1 Jan 2026 0:0 +99999999999999"]
)
def test_a_date_that_cannot_be_read_is_no_clock(clerk: FakeClerk, api: ClerkApi, date: str) -> None:
    asked = now_ms()
    clerk.answer_next(200, body(user(ANN)), headers={"Date": date})
    assert asked <= api.user(ANN).observed_at <= now_ms()


def test_a_request_waits_as_long_as_a_429_says_and_was_observed_when_it_was_sent_again(
    clerk: FakeClerk, api: ClerkApi
) -> None:
    clerk.put(user(ANN))
    clerk.answer_next(429, headers={"Retry-After": "1"})
    asked = now_ms()
    assert asked + 1000 <= api.user(ANN).observed_at <= now_ms() < asked + 8000


def test_pages_go_by_cursor_and_by_offset(clerk: FakeClerk, api: ClerkApi) -> None:
    clerk.put_many(1100)
    first = api.page(OLDEST_FIRST)
    assert first.ids == [numbered_id(i) for i in range(500)]
    assert api.page(OLDEST_FIRST, starting_after=first.ids[-1]).ids[0] == numbered_id(500)
    assert api.page(OLDEST_FIRST, offset=1000).ids == [numbered_id(i) for i in range(1000, 1100)]
    assert api.page(LAST_UPDATED_FIRST).ids[0] == numbered_id(1099)


def test_a_hundred_users_are_asked_for_at_a_time(clerk: FakeClerk, api: ClerkApi) -> None:
    clerk.put_many(98)
    asked = [numbered_id(i) for i in range(100)]
    assert api.users(asked).ids == asked[:98]


def test_no_user_is_no_error(clerk: FakeClerk, api: ClerkApi) -> None:
    assert api.user(ANN).entries == []
    assert api.users([ANN]).entries == []
    assert api.page(OLDEST_FIRST).entries == []
    assert api.count() == 0
    clerk.put(user(ANN), user(BEN))
    assert api.count() == 2


NOT_CLERKS: dict[str, tuple[str, Any]] = {
    "HTML": ("text/html", "<html>Welcome to nginx</html>"),
    "nothing": ("application/json", ""),
    "JSON that is cut off": ("application/json", body([user(ANN), user(BEN)])[:-200]),
    "JSON that is cut off at a bracket": ("application/json", body([user(ANN, a=[1])]).partition(b"[1]")[0]),
    "bytes": ("application/octet-stream", b"\xff\xfe\x00"),
}


@pytest.mark.parametrize(("kind", "text"), NOT_CLERKS.values(), ids=NOT_CLERKS)
def test_an_answer_that_cannot_be_read_is_asked_for_again(clerk: FakeClerk, kind: str, text: Any) -> None:
    clerk.put(user(ANN))
    clerk.answer_next(200, text, headers={"Content-Type": kind}, times=2)
    with client(api_alone(clerk)) as api:
        assert api.page(OLDEST_FIRST).ids == [ANN]
    clerk.answer_next(200, text, headers={"Content-Type": kind}, times=9)
    with client(api_alone(clerk), patience_s=0) as api, pytest.raises(ClerkUnavailable) as raised:
        api.page(OLDEST_FIRST)
    assert_one_line(raised.value, clerk)


Ask = Callable[[ClerkApi], object]
ASKS: dict[str, Ask] = {
    "users": lambda api: api.page(OLDEST_FIRST),
    "count": ClerkApi.count,
    "user": lambda api: api.user(ANN),
}


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
@pytest.mark.parametrize("shape", [{"data": [], "total_count": "2"}, "users", None, 5])
def test_an_answer_of_another_shape_is_refused_at_once(
    clerk: FakeClerk, api: ClerkApi, ask: Ask, shape: Any
) -> None:
    clerk.answer_next(200, json.dumps(shape))
    if ask is ASKS["user"] and isinstance(shape, dict):
        assert api.user(ANN).entries == [InvalidEntry("it has no Clerk id")]
        return
    with pytest.raises(ClerkRefused) as raised:
        ask(api)
    assert_one_line(raised.value, clerk)
    assert len(clerk.requests) == 1


ODD_ENTRIES: dict[str, Any] = {
    "null": None,
    "a text": "user_x",
    "a list": [],
    "no id": user(ABSENT),
    "an id that is none": user("user x"),
    "an id that is a number": user(5),
}


@pytest.mark.parametrize("odd", ODD_ENTRIES.values(), ids=ODD_ENTRIES)
def test_one_odd_entry_stops_no_page(clerk: FakeClerk, api: ClerkApi, odd: Any) -> None:
    clerk.answer_next(200, json.dumps([user(ANN), odd, user(BEN)]))
    page = api.page(OLDEST_FIRST)
    assert page.ids == [ANN, BEN]
    assert isinstance(page.entries[1], InvalidEntry)


def test_what_nests_too_deeply_for_python_hides_no_user(clerk: FakeClerk, api: ClerkApi) -> None:
    deep = "DEEP"
    users = [user(ANN), user(BEN, unsafe_metadata=deep, public_metadata={"role": "admin"}), user(CAT)]
    text = body(users).replace(b'"DEEP"', b'{"a":' * 4000 + b'["]}",{}]' + b"}" * 4000)
    clerk.answer_next(200, text)
    page = api.page(OLDEST_FIRST)
    assert page.ids == [ANN, BEN, CAT]
    assert page.users[1].role == "admin"
    clerk.answer_next(200, body(users[1]).replace(b'"DEEP"', b"[" * 5000 + b"]" * 5000))
    assert api.user(BEN).ids == [BEN]


@pytest.mark.parametrize("status", [500, 502, 503, 408])
def test_trouble_at_clerk_is_waited_out(clerk: FakeClerk, api: ClerkApi, status: int) -> None:
    clerk.put(user(ANN))
    clerk.answer_next(status, "<html>oops</html>", times=2)
    assert api.user(ANN).ids == [ANN]
    assert len(clerk.requests) == 3


def test_a_connection_cut_in_the_middle_is_tried_again(clerk: FakeClerk, api: ClerkApi) -> None:
    clerk.put(user(ANN))
    clerk.answer_next(200, body([user(BEN)]), cut=100)
    assert api.page(OLDEST_FIRST).ids == [ANN]


def vanish(clerk: FakeClerk) -> None:
    clerk.__exit__()


def hang(clerk: FakeClerk) -> None:
    clerk.before = lambda _: time.sleep(2)


def answer_slowly(clerk: FakeClerk) -> None:
    clerk.answer_next(200, '{"total_count":0}' + " " * 1000, pause_s=0.1)


def ask_to_wait_for_an_hour(clerk: FakeClerk) -> None:
    clerk.answer_next(429, headers={"Retry-After": "3600"})


@pytest.mark.parametrize(
    ("trouble", "words", "retry_after_s"),
    [
        (vanish, "ConnectError", None),
        (hang, "ReadTimeout", None),
        (answer_slowly, "ReadTimeout", None),
        (ask_to_wait_for_an_hour, "rate limit", 3600),
    ],
)
def test_a_server_that_gives_no_answer_in_time_is_one_line(
    clerk: FakeClerk, trouble: Callable[[FakeClerk], None], words: str, retry_after_s: float | None
) -> None:
    trouble(clerk)
    limits = {"patience_s": 0, "limited_patience_s": 5, "read_timeout_s": 0.5}
    gives_up = pytest.raises(ClerkUnavailable, match=words)
    with within(20), client(api_alone(clerk), **limits) as api, gives_up as raised:
        api.count()
    assert raised.value.retry_after_s == retry_after_s
    assert_one_line(raised.value, clerk)


@pytest.mark.parametrize("said", ["0", "0.2"])
def test_a_429_that_asks_for_no_wait_does_not_flood_clerk(clerk: FakeClerk, said: str) -> None:
    clerk.answer_next(429, headers={"Retry-After": said}, times=1000)
    with client(api_alone(clerk), limited_patience_s=1.5) as api, pytest.raises(ClerkUnavailable):
        api.count()
    assert len(clerk.requests) <= 2


@pytest.mark.parametrize(
    "said", ["soon", "", "-1", "nan", "inf", "3601", str(NOW // 1000), "Wed, 21 Oct 2026 07:28:00 GMT"]
)
def test_a_429_that_does_not_say_how_long_is_waited_for_a_whole_period(clerk: FakeClerk, said: str) -> None:
    clerk.answer_next(429, headers={"Retry-After": said})
    with client(api_alone(clerk), limited_patience_s=0) as api, pytest.raises(ClerkUnavailable) as raised:
        api.count()
    assert raised.value.retry_after_s == 10


def test_a_429_holds_back_every_thread(clerk: FakeClerk) -> None:
    clerk.answer_next(429, headers={"Retry-After": "2"})
    with client(api_alone(clerk), patience_s=5, limited_patience_s=0) as api:
        with pytest.raises(ClerkUnavailable):
            api.count()
        together([api.count] * 4)
    times = sorted(request.at for request in clerk.requests)
    assert len(times) == 5
    assert times[1] - times[0] >= 1.95


def test_waiting_for_a_429_uses_up_no_patience_for_trouble(clerk: FakeClerk) -> None:
    clerk.answer_next(429, headers={"Retry-After": "3"})
    clerk.answer_next(503)
    with client(api_alone(clerk), patience_s=2.5) as api:
        assert api.count() == 0
    assert len(clerk.requests) == 3


def test_nor_does_waiting_for_the_429_of_another_thread(clerk: FakeClerk) -> None:
    clerk.answer_next(429, headers={"Retry-After": "3"})
    clerk.answer_next(503, path="/users")
    with client(api_alone(clerk), patience_s=2) as api:
        counting = threading.Thread(target=api.count)
        counting.start()
        wait_until(lambda: clerk.requests, 30)
        time.sleep(0.3)
        assert api.page(OLDEST_FIRST).entries == []
        counting.join(20)


def test_trouble_does_not_go_on_for_ever_also_after_a_429_and_is_one_line(clerk: FakeClerk) -> None:
    clerk.answer_next(429, headers={"Retry-After": "1"})
    clerk.answer_next(503, "<html>oops</html>", times=50)
    gives_up = pytest.raises(ClerkUnavailable, match="fails")
    with within(12), client(api_alone(clerk), patience_s=1) as api, gives_up as raised:
        api.count()
    assert 2 < len(clerk.requests) < 50
    assert_one_line(raised.value, clerk)


@pytest.mark.parametrize("key", ["sk_live_another", "sk_test_another"])
def test_a_key_that_is_refused_is_one_line(clerk: FakeClerk, key: str) -> None:
    with client(api_alone(clerk, clerk_secret_key=key)) as api, pytest.raises(ClerkRefused) as raised:
        api.count()
    assert len(clerk.requests) == 1
    assert "CLERK_SECRET_KEY" in str(raised.value)
    assert TRACE_ID in str(raised.value)
    assert key not in str(raised.value)


def test_a_redirect_is_refused(clerk: FakeClerk, api: ClerkApi) -> None:
    clerk.answer_next(302, headers={"Location": "https://clerk.example/"})
    with pytest.raises(ClerkRefused, match="302"):
        api.count()


def test_only_clerks_own_not_found_says_that_there_is_no_user(clerk: FakeClerk, api: ClerkApi) -> None:
    assert api.user(ANN).entries == []
    for text in ("<html>Not Found</html>", '{"errors":[]}', '{"errors":[{"code":"host_not_found"}]}'):
        clerk.answer_next(404, text)
        with pytest.raises(ClerkRefused):
            api.user(ANN)


def test_the_key_is_in_no_error_and_no_log(clerk: FakeClerk, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with (
        client(api_alone(clerk), patience_s=0, limited_patience_s=0) as api,
        structlog.testing.capture_logs() as logs,
    ):
        for status in (401, 404, 422, 500, 429):
            clerk.answer_next(status, clerk.key)
            with pytest.raises(ClerkApiError) as raised:
                api.count()
            assert_one_line(raised.value, clerk)
            assert raised.value.__cause__ is None
    assert clerk.key not in caplog.text + repr(logs)


@pytest.mark.parametrize("key", ["sk_live_a b", "sk_live_a\nb", "sk_live_é"])
def test_a_key_that_fits_into_no_header_is_refused_at_the_start(clerk: FakeClerk, key: str) -> None:
    with pytest.raises(SettingsError, match=r"^CLERK_SECRET_KEY must be printable ASCII") as raised:
        api_alone(clerk, clerk_secret_key=key)
    assert key not in str(raised.value)


def test_without_a_key_there_is_no_client(clerk: FakeClerk) -> None:
    with pytest.raises(SettingsError, match=r"^CLERK_SECRET_KEY is not set"):
        ClerkApi(api_alone(clerk, clerk_secret_key=None))


def test_the_url_is_taken_with_and_without_its_version(clerk: FakeClerk) -> None:
    for suffix in ("", "/", "/v1", "/v1/"):
        with client(api_alone(clerk, clerk_api_url=clerk.url + suffix)) as api:
            assert api.count() == 0


@pytest.mark.parametrize("url", ["api.clerk.com", "ftp://api.clerk.com", "https://", "http://a:b:c"])
def test_a_url_that_is_none_is_refused_at_the_start(clerk: FakeClerk, url: str) -> None:
    with pytest.raises(SettingsError, match=r"^CLERK_API_URL (is|must) "):
        api_alone(clerk, clerk_api_url=url)


def test_a_key_of_another_instance_is_refused(clerk: FakeClerk) -> None:
    with client(api_alone(clerk, clerk_instance_id=clerk.instance_id)) as api:
        api.check_instance()
        api.check_instance()
        assert len(clerk.requests) == 1
    other = api_alone(clerk, clerk_instance_id="ins_other")
    with client(other) as api, pytest.raises(ClerkRefused, match="CLERK_INSTANCE_ID"):
        api.check_instance()


def test_a_key_whose_instance_is_not_shown_is_taken(clerk: FakeClerk) -> None:
    clerk.answer_next(404, path="/instance")
    with client(api_alone(clerk, clerk_instance_id="ins_other")) as api:
        api.check_instance()


@pytest.mark.parametrize(
    "answer",
    [
        {"status": 429, "headers": {"Retry-After": "60"}},
        {"status": 200, "text": '{"total_count":0}' + " " * 1000, "pause_s": 0.1},
    ],
    ids=["for a turn", "for an answer that comes slowly"],
)
def test_a_stop_ends_every_wait(clerk: FakeClerk, answer: dict[str, Any]) -> None:
    stopping = StopSignal()
    clerk.answer_next(**answer)
    with client(api_alone(clerk), stopping=stopping) as api:
        threading.Timer(0.3, stopping.request).start()
        with within(20), pytest.raises(Stopped):
            api.count()


def test_a_development_key_keeps_its_smaller_limit(clerk: FakeClerk) -> None:
    clerk.key = "sk_test_9fK2mQ7xVbN4tR8wZc3L"
    clerk.rate_limit, clerk.rate_period_s = 25, 1.0  # what threads were late with comes together
    with client(api_alone(clerk)) as api:
        together([lambda: [api.count() for _ in range(9)]] * 4)
    assert len(clerk.requests) == 36
    assert clerk.most_within(1.0) <= 25


def test_no_period_sees_more_turns_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = count(1_000, 0.001)
    monkeypatch.setattr(rate_limit, "time", SimpleNamespace(monotonic=lambda: next(now)))
    rate = RateLimit(50, 1.0)
    turns = [i * 0.001 + rate.delay() for i in range(200)]
    assert turns[0] == 0
    assert turns[-1] < 200 / 50 * 1.2
    for start in turns:
        assert sum(start <= turn < start + 1 for turn in turns) <= 50


def assert_one_line(error: Exception, clerk: FakeClerk) -> None:
    assert "\n" not in str(error)
    assert clerk.key not in str(error)
    assert clerk.key not in repr(error.__context__ and error.__context__.__dict__.get("request"))

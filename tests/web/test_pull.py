"""`POST /users/<clerk_id>/pull`: who may call it, and what it answers."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import httpx
import pytest
from flask.testing import FlaskClient

import config
from cli.dev.servers import PostgresServer, free_port
from tests.support import http
from tests.support.fake_clerk import FakeClerk
from tests.support.migrations import migrate
from tests.support.payloads import ANN, BEN, NOW, user, user_event
from tests.support.processes import frozen_family
from tests.support.settings import MakeSettings
from tests.support.stack import Stack
from tests.support.sync import api_settings, deliver, open_context, rows, tombstones
from tests.support.together import together
from tests.support.waiting import wait_until, within
from web.app import create_app
from worker.sync import pull_service

TOKEN = "b7Kq-2fR_9wZ.tY4"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def settings(make_settings: MakeSettings, clerk: FakeClerk) -> config.Settings:
    return api_settings(make_settings, clerk, pull_token=TOKEN)


@pytest.fixture
def client(settings: config.Settings) -> Iterator[FlaskClient]:
    with calling(settings) as made:
        yield made


@contextmanager
def calling(settings: config.Settings) -> Iterator[FlaskClient]:
    app = create_app(settings)
    with closing(app.extensions["pull_service"]):
        yield app.test_client()


def test_one_call_returns_the_row(clerk: FakeClerk, client: FlaskClient, settings: config.Settings) -> None:
    clerk.put(user(ANN, public_metadata={"organization": "Fjord"}))
    answer = client.post(f"/users/{ANN}/pull", headers=BEARER)
    assert answer.status_code == 200
    found = answer.get_json()
    assert len(found.pop("id")) == 36
    row = rows(settings)[ANN]
    assert found == {
        "clerk_id": ANN,
        "email": row.email,
        "name": row.name,
        "organization": "Fjord",
        "role": "user",
        "created_at": "2026-01-01T10:00:00+00:00",
        "last_login_at": None,
    }
    clerk.put(user(ANN, first_name="New", updated_at=NOW + 100))
    assert client.post(f"/users/{ANN}/pull", headers=BEARER).get_json()["name"].startswith("New ")


def test_a_user_unknown_to_clerk_is_not_found(client: FlaskClient, settings: config.Settings) -> None:
    answer = client.post(f"/users/{ANN}/pull", headers=BEARER)
    assert (answer.status_code, answer.json) == (404, {"error": "there is no such user"})
    assert not tombstones(settings)


def test_a_gone_user_is_deleted(clerk: FakeClerk, client: FlaskClient, settings: config.Settings) -> None:
    clerk.put(user(BEN))
    with open_context(settings) as both:
        deliver(both, user_event(data=user(ANN)), user_event(data=user(BEN)))
    answer = client.post(f"/users/{ANN}/pull", headers=BEARER)
    assert (answer.status_code, answer.json) == (404, {"error": "there is no such user"})
    assert tombstones(settings) == {ANN}


def test_no_user_is_deleted_if_clerk_knows_none(client: FlaskClient, settings: config.Settings) -> None:
    with open_context(settings) as both:
        deliver(both, user_event(data=user(ANN)), user_event(data=user(BEN)))
    answer = client.post(f"/users/{ANN}/pull", headers=BEARER)
    assert answer.status_code == 404
    assert "nothing was changed: check CLERK_SECRET_KEY" in answer.text
    assert set(rows(settings)) == {ANN, BEN}
    assert not tombstones(settings)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Basic {TOKEN}",
        TOKEN,
        f"Bearer {TOKEN}x",
        "Bearer é\x80",
    ],
)
def test_without_the_token_nothing_is_asked(
    clerk: FakeClerk, client: FlaskClient, header: str | None
) -> None:
    headers = {} if header is None else {"Authorization": header}
    answer = client.post(f"/users/{ANN}/pull", headers=headers)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert clerk.requests == []


@pytest.mark.parametrize("clerk_id", ["a b", "user%0a", "user.1", "x" * 201, "%2e%2e", f"{ANN}%3Flimit=1"])
def test_what_is_no_clerk_id_is_not_asked_for(clerk: FakeClerk, client: FlaskClient, clerk_id: str) -> None:
    assert client.post(f"/users/{clerk_id}/pull", headers=BEARER).status_code == 400
    assert clerk.requests == []


def test_other_methods_are_refused(client: FlaskClient) -> None:
    assert client.get(f"/users/{ANN}/pull", headers=BEARER).status_code == 405


def test_without_a_token_set_the_route_is_not_there(make_settings: MakeSettings, clerk: FakeClerk) -> None:
    app = create_app(api_settings(make_settings, clerk))
    assert app.test_client().post(f"/users/{ANN}/pull", headers=BEARER).status_code == 404
    assert clerk.requests == []


def test_a_token_needs_a_key_for_clerk(make_settings: MakeSettings) -> None:
    with pytest.raises(config.SettingsError, match=r"^PULL_TOKEN .*CLERK_SECRET_KEY"):
        make_settings(pull_token=TOKEN)


def test_retry_after_is_what_clerk_asks_for(clerk: FakeClerk, client: FlaskClient) -> None:
    clerk.answer_next(429, headers={"Retry-After": "20"})
    for clerk_id in (ANN, BEN):
        answer = client.post(f"/users/{clerk_id}/pull", headers=BEARER)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "20")
    assert len(clerk.asked) == 1


@pytest.mark.parametrize("status", [500, 401, 429, 302, 200])
def test_trouble_at_clerk_is_503(clerk: FakeClerk, client: FlaskClient, status: int) -> None:
    clerk.answer_next(status, "<html>", headers={"Retry-After": "60"}, times=50)
    answer = client.post(f"/users/{ANN}/pull", headers=BEARER)
    assert answer.status_code == 503
    assert answer.headers["Retry-After"]
    assert clerk.key not in answer.text


@pytest.mark.parametrize(
    ("broken", "scheme"), [("clerk_api_url", "http"), ("database_url", "postgres"), ("redis_url", "redis")]
)
def test_what_does_not_answer_is_503_within_seconds(
    make_settings: MakeSettings, clerk: FakeClerk, broken: str, scheme: str
) -> None:
    clerk.put(user(ANN))
    nowhere = {broken: f"{scheme}://127.0.0.1:{free_port()}/0"}
    settings = api_settings(make_settings, clerk, pull_token=TOKEN, **nowhere)
    with calling(settings) as client, within(pull_service.WAIT_S + 2):
        answer = client.post(f"/users/{ANN}/pull", headers=BEARER)
    assert answer.status_code == 503
    assert "127.0.0.1" not in answer.text


def test_a_database_that_hangs_is_answered_in_time_and_is_not_asked_by_ever_more(
    clerk: FakeClerk, make_settings: MakeSettings, own_postgres: PostgresServer, tmp_path: Path
) -> None:
    clerk.put(*(user(f"user_{i}") for i in range(13)))
    settings = api_settings(
        make_settings,
        clerk,
        pull_token=TOKEN,
        port=free_port(),
        web_workers=1,
        db_pool_size=2,
        db_max_overflow=2,
        database_url=own_postgres.url,
        database_url_unpooled=own_postgres.url,
    )
    migrate(settings)
    answers: list[httpx.Response] = []

    def call(number: int) -> httpx.Response:
        url = f"http://127.0.0.1:{settings.port}/users/user_{number}/pull"
        answers.append(answer := http.post(url, headers=BEARER, timeout=30))
        return answer

    with Stack(settings, tmp_path, workers=0):
        assert call(12).status_code == 200
        answers.clear()
        assert own_postgres.pid
        with frozen_family(own_postgres.pid):
            together(partial(call, i % 12) for i in range(24))
        assert len(answers) == 24
        assert {answer.status_code for answer in answers} == {503, 429}
        assert sum(answer.status_code == 429 for answer in answers) >= 8
        for answer in answers:
            assert answer.headers["Retry-After"]
            assert answer.elapsed.total_seconds() < 15
        wait_until(lambda: call(12).status_code == 200, 40)


def test_too_many_users_at_once_are_429(
    clerk: FakeClerk, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull_service, "PERIOD_S", 600)
    clerk.key = "sk_test_9fK2mQ7xVbN4tR8wZc3L"
    with calling(api_settings(make_settings, clerk, pull_token=TOKEN)) as client:
        answers = [client.post(f"/users/user_{i}/pull", headers=BEARER) for i in range(101)]
    busy = [answer for answer in answers if answer.status_code == 429]
    assert busy
    assert busy[0].headers["Retry-After"]
    assert {answer.status_code for answer in answers} == {404, 429}


def test_every_web_process_answers(clerk: FakeClerk, make_settings: MakeSettings, tmp_path: Path) -> None:
    clerk.put(user(ANN), user(BEN))
    settings = api_settings(
        make_settings,
        clerk,
        pull_token=TOKEN,
        port=free_port(),
        web_workers=2,
        db_pool_size=20,  # all calls may come to one of the processes
    )
    answers: list[httpx.Response] = []

    def call() -> None:
        url = f"http://127.0.0.1:{settings.port}/users/{ANN}/pull"
        answers.append(http.post(url, headers=BEARER, timeout=30))

    with Stack(settings, tmp_path) as stack:
        together([call] * 20)
        logs = stack.logs()
    assert [answer.status_code for answer in answers] == [200] * 20
    assert len({answer.text for answer in answers}) == 1
    assert len(clerk.asked) == 20, "the worker, without RECONCILE_EVERY, asks nothing"
    assert ANN in logs
    for secret in (TOKEN, clerk.key, "@example.com", "Marisol"):
        assert secret not in logs

import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from urllib.parse import quote, urljoin

import psycopg
import pytest
from flask.testing import FlaskClient
from redis import Redis
from werkzeug.test import TestResponse

from cli.dev.servers import RedisServer
from tests.support.deliveries import MakeClient
from tests.support.failed_jobs import fail
from tests.support.payloads import ANN, BEN, svix_id, user, user_event
from tests.support.queue import RqView
from tests.support.settings import MakeSettings
from tests.support.together import together
from web.app import create_app
from worker.monitoring import probes
from worker.monitoring.login_throttle import LIMIT
from worker.monitoring.probes import LIMIT_S
from worker.sync.last_run import KINDS, keep

PASSWORD = "correct horse bättery"
AUTH = ("anyone", PASSWORD)
MARK = "ann.marked@example.com"
HIDDEN = re.compile(r'name="(token|until)" value="([^"]+)"')

Submit = Callable[..., TestResponse]


@pytest.fixture
def make_console(make_settings: MakeSettings) -> MakeClient:
    """Make a client of an application with a console; keywords replace its settings."""
    return lambda **overrides: create_app(
        make_settings(**{"console_password": PASSWORD, **overrides})
    ).test_client()


@pytest.fixture
def console(make_console: MakeClient) -> FlaskClient:
    return make_console()


def shown(client: FlaskClient, **query: str) -> str:
    """Return the page as an operator sees it."""
    page = client.get("/console", query_string=query, auth=AUTH)
    assert page.status_code == 200
    return page.text


def form(page: str, do: str, **fields: object) -> dict[str, object]:
    """Return what the page sends when a button is pressed."""
    return {**dict(HIDDEN.findall(page)), "do": do, **fields}


@pytest.fixture
def submit(console: FlaskClient) -> Submit:
    """Press a button on the page, with what is ticked."""

    def press(do: str, *ids: str, page: str = "", **fields: str) -> TestResponse:
        chosen = [quote(id_, safe="") for id_ in ids]
        data = form(page or shown(console), do, id=chosen, **fields)
        return console.post("/console/jobs", auth=AUTH, data=data)

    return press


def target(answer: TestResponse) -> str:
    """Return where an answer to the form sends the browser."""
    return urljoin("/console/jobs", answer.headers["Location"])


def record(
    connection: psycopg.Connection, clerk_id: str = ANN, *, minutes_ago: float = 0, **fields: str
) -> str:
    id_ = svix_id()
    connection.execute(
        """
        INSERT INTO webhook_events (svix_id, type, clerk_id, received_at, applied_at, outcome)
        VALUES (%(id)s, %(type)s, %(clerk_id)s, now() - %(ago)s * interval '1 minute' - interval '2 seconds',
                now() - %(ago)s * interval '1 minute', %(outcome)s)
        """,
        {
            "id": id_,
            "clerk_id": clerk_id,
            "ago": minutes_ago,
            "type": "user.updated",
            "outcome": "applied",
            **fields,
        },
    )
    return id_


def test_without_a_password_there_is_no_console(make_settings: MakeSettings) -> None:
    client = create_app(make_settings()).test_client()
    for path in ("/console", "/console/jobs", "/console/static/console.css"):
        assert client.get(path, auth=AUTH).status_code == 404


@pytest.mark.parametrize("path", ["/console", "/console/static/console.css", "/console/static/console.js"])
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Basic"},
        {"Authorization": "Basic %%%"},
        {"Authorization": "Basic YQ=="},
        {"Authorization": "Bearer " + PASSWORD.encode().hex()},
        {"Authorization": "Basic YTpiOmM="},
    ],
    ids=["none", "empty", "no base64", "no colon", "bearer", "wrong"],
)
def test_nothing_is_shown_without_the_password(
    console: FlaskClient, path: str, headers: dict[str, str]
) -> None:
    answer = console.get(path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith("Basic ")
    assert "CONSOLE_PASSWORD" not in answer.text
    assert console.get(path, auth=AUTH, buffered=True).status_code == 200


def test_a_form_without_the_password_does_nothing(console: FlaskClient, redis: Redis) -> None:
    fail(redis)
    data = form(shown(console), "replay all", confirmed="1")
    assert console.post("/console/jobs", data=data).status_code == 401
    assert redis.zcard("rq:failed:clerk") == 1


@pytest.mark.parametrize("path", ["/console", "/console/static/console.js", "/console/nowhere"])
@pytest.mark.parametrize("auth", [AUTH, ("x", "wrong"), None])
def test_every_answer_carries_the_headers_that_keep_it_safe(
    console: FlaskClient, path: str, auth: tuple[str, str] | None
) -> None:
    answer = console.get(path, auth=auth, buffered=True)
    if path == "/console/nowhere":
        assert answer.status_code == 404
        return
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers.getlist("Cache-Control") == ["no-store"]
    assert answer.headers["X-Frame-Options"] == "DENY"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"


def test_the_page_has_no_inline_script_or_style_and_loads_nothing_from_elsewhere(
    console: FlaskClient, connection: psycopg.Connection, redis: Redis
) -> None:
    record(connection)
    fail(redis)
    page = shown(console)
    assert not re.search(r"<script(?![^>]*\bsrc=)|\son\w+=|\sstyle=|<style", page)
    assert not re.search(r'(?:src|href|action)="(?:https?:)?//', page)


def test_after_too_many_attempts_an_address_has_to_wait_in_every_process(make_console: MakeClient) -> None:
    clients = [make_console() for _ in range(3)]
    for i in range(LIMIT):
        assert clients[i % 2].get("/console", auth=("x", f"guess {i}")).status_code == 401
    refused = clients[2].get("/console", auth=AUTH)
    assert refused.status_code == 429
    assert int(refused.headers["Retry-After"]) > 0
    other = {"REMOTE_ADDR": "192.0.2.7"}
    assert clients[2].get("/console", auth=AUTH, environ_base=other).status_code == 200


def test_attempts_are_limited_without_redis_too(make_console: MakeClient) -> None:
    client = make_console(redis_url="redis://127.0.0.1:1/0")
    for i in range(LIMIT):
        assert client.get("/console", auth=("x", f"guess {i}")).status_code == 401
    assert client.get("/console", auth=AUTH).status_code == 429


def test_the_page_shows_what_came_and_what_failed(
    console: FlaskClient, connection: psycopg.Connection, redis: Redis
) -> None:
    applied = record(connection, BEN, minutes_ago=3, outcome="stale")
    failed = fail(redis, user_event("user.updated", user(ANN, email=MARK)))
    page = shown(console)
    assert all(text in page for text in (applied, BEN, "stale", failed, ANN, "data.id is not a Clerk id"))
    assert page.count('class="bar"') == 1
    assert "1 events, lag 2 s" in page
    assert MARK not in page


def test_the_history_of_one_user_is_shown(console: FlaskClient, connection: psycopg.Connection) -> None:
    mine = [record(connection, ANN, minutes_ago=ago) for ago in (0, 100, 10_000)]
    other = record(connection, BEN, minutes_ago=10_000)
    page = shown(console, user=ANN)
    history = page[page.index('id="user"') : page.index('id="newest"')]
    assert all(id_ in history for id_ in mine)
    assert other not in history
    assert "No delivery about this user" in shown(console, user="user_x")


def test_the_page_of_one_user_shows_what_is_known_without_personal_data(
    console: FlaskClient, connection: psycopg.Connection, redis: Redis
) -> None:
    connection.execute(
        "INSERT INTO users (clerk_id, email, name, role) VALUES (%s, %s, %s, 'admin')", [ANN, MARK, MARK]
    )
    connection.execute(
        "INSERT INTO user_sync (clerk_id, claimed_email, claim_updated_at, claim_observed_at, deleted_at)"
        " VALUES (%s, %s, 2, 2, NULL), (%s, %s, 1, 1, NULL), ('user_gone', NULL, NULL, NULL, now())",
        [ANN, MARK, BEN, MARK],
    )
    failed = fail(redis, user_event("user.updated", user(ANN, email=MARK)))
    page = shown(console, user=ANN)
    facts = page[page.index('id="user"') : page.index('id="newest"')]
    expected = (
        "role admin",
        "the address that the user claims",
        "Also claimed by",
        BEN,
        failed,
        "Unreadable",
    )
    assert [words for words in expected if words not in facts] == []
    assert MARK not in page
    gone = shown(console, user="user_gone")
    assert re.search(r'Deleted</th><td><time datetime="\d{4}-', gone)


@pytest.mark.parametrize("asked", ["<script>alert(1)</script>", "a b", "ann@example.com", "é", "x" * 300])
def test_what_is_no_clerk_id_is_not_looked_for(console: FlaskClient, asked: str) -> None:
    page = shown(console, user=asked)
    assert "This is not a Clerk id" in page
    assert "<script>alert" not in page


def test_some_jobs_are_replayed_and_the_page_says_what_became_of_them(
    console: FlaskClient, submit: Submit, redis: Redis, rq: RqView
) -> None:
    ids = [fail(redis) for _ in range(3)]
    page = shown(console)
    redis.delete(f"rq:job:{ids[1]}")
    answer = submit("replay", *ids[:2], page=page)
    assert [rq.places(id_) for id_ in ids] == [["queue"], [], ["failed"]]
    assert "1 replayed, 1 gone" in console.get(target(answer), auth=AUTH).text


@pytest.mark.parametrize("do", ["replay all", "discard all", "discard", "discard one"])
def test_all_and_what_deletes_is_confirmed_first(submit: Submit, redis: Redis, rq: RqView, do: str) -> None:
    ids = [fail(redis) for _ in range(25)]
    do = do.replace("one", ids[0])
    chosen = ids[:2] if do == "discard" else []
    asked = submit(do, *chosen)
    assert asked.status_code == 200
    assert "Cancel" in asked.text
    assert len(rq.ids("failed")) == 25, "nothing has happened yet"
    button = re.search(r'<button name="do" value="([^"]+)"', asked.text)
    assert button
    form_ids = re.findall(r'name="id" value="([^"]+)"', asked.text)
    done = submit(button[1], *form_ids, page=asked.text, confirmed="1")
    assert done.status_code == 303
    left = {"replay all": 0, "discard all": 0, "discard": 23}.get(do, 24)
    assert len(rq.ids("failed")) == left
    assert len(rq.queue.get_job_ids()) == (25 if do == "replay all" else 0)


def test_what_failed_after_the_page_was_shown_is_not_among_all(
    console: FlaskClient, submit: Submit, redis: Redis, rq: RqView
) -> None:
    fail(redis)
    page = shown(console)
    later = fail(redis)
    submit("discard all", page=page, confirmed="1")
    assert rq.ids("failed") == [later]


@pytest.mark.parametrize(
    "fields",
    [
        {"token": ""},
        {"token": "ImZvcm0i.aSGzVg.forged"},
        {"do": "delete all"},
        {"do": ""},
        {"until": "now"},
        {"until": "2026-01-01"},
    ],
    ids=str,
)
def test_a_form_that_is_not_ours_does_nothing(submit: Submit, redis: Redis, fields: dict[str, str]) -> None:
    fail(redis)
    do = fields.pop("do", "replay all")
    assert submit(do, confirmed="1", **fields).status_code == 400
    assert redis.zcard("rq:failed:clerk") == 1


def test_a_form_that_is_too_large_is_refused(submit: Submit, redis: Redis) -> None:
    fail(redis)
    assert submit("replay", filler="x" * 300_000).status_code == 413


def test_another_passwords_token_is_refused(make_console: MakeClient, submit: Submit, redis: Redis) -> None:
    fail(redis)
    page = make_console(console_password="another one").get("/console", auth=("x", "another one")).text
    assert submit("replay all", page=page, confirmed="1").status_code == 400


def test_an_id_that_another_program_chose_is_shown_and_treated_like_any(
    console: FlaskClient, submit: Submit, redis: Redis
) -> None:
    fail(redis, id_='"><b>\x1b \udcff%41&')
    page = shown(console)
    assert "<b>" not in page
    value = re.search(r'name="id" value="([^"]+)"', page)
    assert value
    submit(f"replay {value[1]}", page=page)
    assert redis.zcard("rq:failed:clerk") == 0
    assert redis.llen("rq:queue:clerk") == 1


def test_the_last_reconciliation_is_shown_if_they_run(make_console: MakeClient, redis: Redis) -> None:
    drift = {**dict.fromkeys(KINDS, 0), "stale": 1200, "refusal": None}
    moments = dict.fromkeys(("started_at", "finished_at"), datetime.now(UTC).isoformat())
    keep(redis, {**moments, "error": None, "backfill": None, "drift": drift})
    page = shown(make_console(clerk_secret_key="sk_live_key", reconcile_every="6h"))
    assert "last reconciliation" in page
    assert "1,200 differ" in page
    assert "1,200 users differ from Clerk" in page
    assert "last reconciliation" not in shown(make_console())


def test_without_a_database_the_rest_is_shown(make_console: MakeClient, redis: Redis) -> None:
    nowhere = "postgresql://u:secret@127.0.0.1:1/none"
    id_ = fail(redis)
    page = shown(make_console(database_url=nowhere, database_url_unpooled=nowhere), user="user_1")
    assert id_ in page
    assert page.count("Not known now") == 3
    assert "secret" not in page


def test_without_redis_the_rest_is_shown(make_console: MakeClient, connection: psycopg.Connection) -> None:
    applied = record(connection)
    page = shown(make_console(redis_url="redis://:secret@127.0.0.1:1/0"))
    assert applied in page
    assert "Redis does not answer" in page
    assert "secret" not in page


def test_a_form_while_redis_is_away_says_so(make_console: MakeClient, own_redis: RedisServer) -> None:
    client = make_console(redis_url=own_redis.url)
    with Redis.from_url(own_redis.url) as redis:
        id_ = fail(redis)
    page = shown(client)
    own_redis.stop()
    answer = client.post("/console/jobs", auth=AUTH, data=form(page, f"replay {id_}"))
    assert answer.status_code == 303
    assert "Redis does not answer. Some jobs" in client.get(target(answer), auth=AUTH).text


def test_two_operators_see_different_users(console: FlaskClient, connection: psycopg.Connection) -> None:
    ids = {clerk_id: record(connection, clerk_id, minutes_ago=90) for clerk_id in (ANN, BEN)}
    for i in range(40):
        record(connection, f"user_{i}")
    wrong: list[str] = []

    def look(clerk_id: str, other: str) -> None:
        client = console.application.test_client()
        for _ in range(10):
            page = shown(client, user=clerk_id)
            if ids[clerk_id] not in page or ids[other] in page:
                wrong.append(page)

    together((partial(look, *pair) for pair in ((ANN, BEN), (BEN, ANN)) * 2), 60)
    assert wrong == []


def test_a_database_that_hangs_costs_the_page_no_more_than_its_limit(
    make_console: MakeClient,
    redis: Redis,
    connection: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probes, "LIMIT_S", 1)
    client = make_console()
    id_ = fail(redis)
    with connection.transaction():
        connection.execute("LOCK TABLE webhook_events IN ACCESS EXCLUSIVE MODE")
        for _ in range(2):
            began = time.monotonic()
            page = shown(client, user="user_1")
            assert time.monotonic() - began < 2 * LIMIT_S
            assert id_ in page
            assert "no answer within" in page


def test_browsers_that_do_not_know_light_dark_show_the_colours_too(console: FlaskClient) -> None:
    """Browsers know that function of CSS since May 2024; a variable with an unknown function has no value."""
    with console.get("/console/static/console.css", auth=AUTH) as answer:
        css = answer.get_data(as_text=True)
    assert "light-dark(" not in css
    light, _, dark = css.partition("@media (prefers-color-scheme: dark)")
    names = re.findall(r"^ +(--[a-z-]+): #[0-9a-f]{6};", css, re.MULTILINE)
    assert len(names) > 20
    assert all(names.count(name) == 2 and f"{name}:" in light and f"{name}:" in dark for name in names)


def test_the_console_works_under_a_path_prefix(console: FlaskClient, submit: Submit, redis: Redis) -> None:
    id_ = fail(redis)
    page = shown(console)
    confirm = submit("discard", id_)
    done = submit("discard", id_, confirmed="1")
    for url, text in (("/tools/console", page), ("/tools/console/jobs", confirm.text)):
        links = re.findall(r'(?:href|src|action)="([^"#]+)', text)
        paths = {urljoin(url, link).split("?")[0] for link in links if link != "data:,"}
        assert {"/tools/console/static/console.css", "/tools/console/jobs"} <= paths
        assert all(path.startswith("/tools/console") for path in paths)
    assert done.status_code == 303
    assert (
        urljoin("/tools/console/jobs", done.headers["Location"])
        == "/tools/console?notice=discard&discarded=1"
    )


def test_buttons_in_rows_name_their_job_and_tables_have_captions(console: FlaskClient, redis: Redis) -> None:
    id_ = fail(redis)
    page = shown(console)
    assert f'aria-label="Replay {id_}"' in page
    assert f'aria-label="Discard {id_}"' in page
    assert page.count("<table") == page.count("<caption") > 0

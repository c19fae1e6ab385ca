"""Marked personal data goes down every path there is; none of it may come out where people read."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from psycopg import sql
from redis import Redis
from rq import Queue

import config
from cli.servers import RedisServer, free_port
from tests.clerk import body, email_entry, session, session_event, user, user_event
from tests.conftest import SECRET, MakeSettings
from tests.jobs import RqView, rq_command
from tests.jobs_failed import fail_in_another_worker, raise_personal
from tests.stack import Stack, environment, wait_until
from tests.web.deliveries import signed

MARK = "zqmark"
EMAIL = f"{MARK}@example.com"
PASSWORD = "correct horse"
REFUSED = "Refuse"
PATIENCE_S = 40

pytestmark = pytest.mark.timeout(240)


def marked_user(clerk_id: object, **fields: Any) -> dict[str, Any]:
    defaults = {
        "first_name": f"{MARK} first",
        "last_name": f"{MARK} last",
        "username": MARK,
        "public_metadata": {"role": MARK, "organization": f"{MARK} org", "x": MARK},
        "unsafe_metadata": {MARK: MARK},
        "external_id": MARK,
        "image_url": f"https://example.com/{MARK}",
    }
    return user(clerk_id, email=f"{clerk_id}-{EMAIL}", **{**defaults, **fields})


def marked_event(data: object, type_: str = "user.updated", **envelope: Any) -> bytes:
    attributes = {"http_request": {"client_ip": "203.0.113.77", "user_agent": MARK}}
    return body(user_event(type_, data, event_attributes=attributes, **envelope))


@pytest.fixture
def redis_of_its_own(server_directory: Path) -> Iterator[RedisServer]:
    server = RedisServer(server_directory, free_port(), durable=False)
    server.start()
    yield server
    server.stop()


@pytest.mark.parametrize(("log_format", "log_level"), [("json", "DEBUG"), ("console", "INFO")])
def test_nothing_personal_comes_out_anywhere(
    make_settings: MakeSettings,
    redis_of_its_own: RedisServer,
    tmp_path: Path,
    log_format: str,
    log_level: str,
) -> None:
    settings = make_settings(
        redis_url=redis_of_its_own.url,
        port=free_port(),
        web_workers=1,
        console_password=PASSWORD,
        max_body_bytes=100_000,
        log_format=log_format,
        log_level=log_level,
    )
    with Stack(settings, tmp_path) as stack, Redis.from_url(redis_of_its_own.url) as redis:
        _good(stack)
        _forged_and_broken(stack)
        _unreadable(stack)
        _refused_by_the_database(stack, settings, redis)
        _put_there_by_others(redis)
        _without_database(stack, settings, redis)
        _without_redis(stack, redis_of_its_own)
        _killed(stack)
        said = _everything_that_is_shown(stack, settings, redis)
        stack.stop()
        said["log"] = stack.logs()
    assert "job failed" in said["log"]
    assert "waiting" in said["log"]
    for what, text in said.items():
        for line in text.splitlines():
            assert MARK not in line.lower(), f"{what}: {line}"
            assert "203.0.113.77" not in line, f"{what}: {line}"
            assert SECRET not in line, f"{what}: {line}"
            assert PASSWORD not in line, f"{what}: {line}"
            assert "postgres@" not in line, f"{what}: {line}"
    if log_format == "json":
        _assert_one_form(said["log"])


def _post(stack: Stack, content: bytes, headers: dict[str, str] | None = None, query: str = "") -> int:
    headers = signed(content) if headers is None else headers
    url = stack.url + query
    return httpx.post(url, content=content, headers=headers, trust_env=False, timeout=15).status_code


def _good(stack: Stack) -> None:
    created = marked_event(marked_user("user_good"), "user.created")
    headers = signed(created)
    assert _post(stack, created, headers) == 202
    assert _post(stack, created, headers) == 200, "a duplicate"
    with_user = session("user_good", user=marked_user("user_good"))
    assert _post(stack, body(session_event(data=with_user))) == 202
    code = body(
        {"type": "email.created", "data": {"to_email_address": EMAIL, "body": MARK}, "object": "event"}
    )
    assert _post(stack, code) == 200
    odd_type = body({"type": f"{MARK}@x", "data": {}, "object": "event"})
    assert _post(stack, odd_type) == 200


def _forged_and_broken(stack: Stack) -> None:
    content = marked_event(marked_user("user_forged"))
    assert _post(stack, content + b" ", signed(content)) == 400
    assert _post(stack, content, {}) == 400
    assert _post(stack, content, {**signed(content), "svix-id": EMAIL}) == 400
    assert _post(stack, content, {**signed(content), "svix-signature": f"v1,{MARK}"}) == 400
    for broken in (f"{MARK} {{".encode(), b"\xff" + MARK.encode(), b"[" * 50_000 + MARK.encode()):
        assert _post(stack, broken) == 400
    assert _post(stack, MARK.encode() * 20_000) == 413
    assert _post(stack, content, {}, f"?email={EMAIL}") == 400
    assert httpx.get(f"{stack.base_url}/{EMAIL}", trust_env=False).status_code == 404


def _unreadable(stack: Stack) -> None:
    unreadable = [
        body({"type": {"name": MARK}, "data": MARK, "object": "event"}),
        body([MARK, EMAIL]),
        marked_event(MARK),
        marked_event(marked_user([MARK])),
        marked_event(marked_user(EMAIL)),
        body(session_event(data=session(EMAIL, created_at=MARK))),
        body(session_event(data=session("user_1", created_at=MARK))),
    ]
    assert [_post(stack, content) for content in unreadable] == [202] * len(unreadable)


def _refused_by_the_database(stack: Stack, settings: config.Settings, redis: Redis) -> None:
    """Break a constraint: PostgreSQL answers with the whole row. Raise an error with a text of its own."""
    with _connection(settings) as connection:
        connection.execute(
            f"ALTER TABLE users ADD CONSTRAINT mine CHECK (name NOT LIKE '%{REFUSED}%') NOT VALID"
        )
        connection.execute(
            """
            CREATE FUNCTION shout() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
                IF NEW.name LIKE '%Shout%' THEN
                    RAISE EXCEPTION 'no %', NEW.email USING ERRCODE = '22000', DETAIL = NEW.name;
                END IF;
                RETURN NEW;
            END $$;
            CREATE TRIGGER shout BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION shout();
            """
        )
    failed = RqView(redis).ids("failed")
    assert _post(stack, marked_event(marked_user("user_refused", first_name=f"{MARK} {REFUSED}"))) == 202
    assert _post(stack, marked_event(marked_user("user_shout", first_name=f"{MARK} Shout"))) == 202
    odd = marked_user("user_odd")
    odd["email_addresses"] = [email_entry(EMAIL), {"id": MARK, "email_address": [MARK]}]
    assert _post(stack, marked_event(odd)) == 202
    wait_until(lambda: len(RqView(redis).ids("failed")) >= len(failed) + 2, PATIENCE_S, stack.logs)


def _put_there_by_others(redis: Redis) -> None:
    """Jobs as others enqueue them: RQ's default description is the whole call."""
    for function in ("worker.job.apply_delivery", "builtins.print", f"{MARK}.{MARK}"):
        Queue("clerk", connection=redis, serializer="json").enqueue(function, EMAIL, name=MARK)
    Queue("clerk", connection=redis).enqueue("builtins.print", EMAIL)  # pickled
    redis.hset("rq:job:odd", mapping={"data": MARK, "description": EMAIL, "meta": MARK, "created_at": MARK})
    redis.rpush("rq:queue:clerk", "odd")
    fail_in_another_worker(redis, raise_personal, EMAIL)


def _without_database(stack: Stack, settings: config.Settings, redis: Redis) -> None:
    """Take the table away, then the whole database, and cut every connection."""
    with _connection(settings) as connection:
        connection.execute("ALTER TABLE users RENAME TO gone")
        assert _post(stack, marked_event(marked_user("user_waits"))) == 202
        wait_until(lambda: "waiting" in stack.logs(), PATIENCE_S, stack.logs)
        connection.execute("ALTER TABLE gone RENAME TO users")
    with _database_away(settings):
        assert _post(stack, marked_event(marked_user("user_waits_too"))) == 202
        wait_until(lambda: stack.logs().count("no connection to the database") > 0, PATIENCE_S, stack.logs)
        httpx.get(f"{stack.base_url}/health", trust_env=False, timeout=10)
    wait_until(lambda: RqView(redis).queue.count == 0, PATIENCE_S, stack.logs)


@contextlib.contextmanager
def _database_away(settings: config.Settings) -> Iterator[None]:
    assert settings.database_url_unpooled
    url = settings.database_url_unpooled.get_secret_value()
    server, _, name = url.rpartition("/")
    allow = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
    with psycopg.connect(f"{server}/postgres", autocommit=True) as admin:
        admin.execute(allow.format(sql.Identifier(name), sql.SQL("false")))
        admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
        try:
            yield
        finally:
            admin.execute(allow.format(sql.Identifier(name), sql.SQL("true")))


def _connection(settings: config.Settings) -> psycopg.Connection:
    assert settings.database_url_unpooled
    return psycopg.connect(settings.database_url_unpooled.get_secret_value(), autocommit=True)


def _without_redis(stack: Stack, server: RedisServer) -> None:
    server.kill()
    assert _post(stack, marked_event(marked_user("user_lost"))) == 503
    httpx.get(f"{stack.base_url}/health", trust_env=False, timeout=10)
    server.start()
    wait_until(lambda: _post(stack, marked_event(marked_user("user_back"))) == 202, PATIENCE_S, stack.logs)


def _killed(stack: Stack) -> None:
    """Kill a process of the server, which then says so in its own words."""
    parent = stack.web.pid
    [child, *_] = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    wait_until(lambda: _is_alive(stack), PATIENCE_S, stack.logs)
    assert _post(stack, marked_event(marked_user("user_after"))) == 202


def _is_alive(stack: Stack) -> bool:
    try:
        return httpx.get(f"{stack.base_url}/health/ready", trust_env=False, timeout=5).is_success
    except httpx.TransportError:
        return False


def _everything_that_is_shown(stack: Stack, settings: config.Settings, redis: Redis) -> dict[str, str]:
    """Return what people and machines get to read of all this. Redis was emptied: what fails comes again."""
    _unreadable(stack)
    _put_there_by_others(redis)
    wait_until(lambda: RqView(redis).queue.count == 0, PATIENCE_S, stack.logs)
    ids = RqView(redis).ids("failed")
    assert len(ids) >= 10
    shown = {}
    for path in ("/health", "/health/ready", "/metrics", "/console", "/console?user=user_good"):
        answer = httpx.get(stack.base_url + path, auth=("x", PASSWORD), trust_env=False, timeout=10)
        assert answer.status_code == 200, path
        shown[path] = answer.text
    command = _command_line(settings)
    for arguments in (
        ["failed", "list"],
        ["failed", "list", "--json"],
        ["failed", "replay", "--all", "--dry-run"],
        ["events"],
        ["events", "--json"],
        ["status"],
        ["status", "--json"],
        ["--debug", "failed", "show", "nowhere"],
        *(["failed", "show", id_] for id_ in ids),
    ):
        shown[" ".join(arguments)] = command(*arguments)
    assert "user_good" in shown["events"]
    assert settings.redis_url
    shown["rq info"] = rq_command(settings.redis_url.get_secret_value(), "info")
    ours = [f"rq:job:{id_}" for id_ in ids if id_.startswith("msg_")]
    described = [redis.hmget(key, "description", "meta") for key in ours]
    assert described
    shown["what RQ's dashboards show of our jobs"] = "\n".join(map(repr, described))
    return shown


def _command_line(settings: config.Settings) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        ran = subprocess.run(
            [sys.executable, "-P", "-m", "cli.main", *arguments],
            env=environment(settings),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return ran.stdout + ran.stderr

    return run


def _assert_one_form(log: str) -> None:
    """Every line, of ours, of RQ's and of the server's, is a JSON object with the same three keys."""
    lines = [json.loads(line) for line in log.splitlines() if line]
    assert all({"event", "level", "timestamp"} <= set(line) for line in lines)
    loggers = {line["logger"] for line in lines}
    assert {"web.webhook", "worker", "_granian"} <= loggers
    assert any(logger.startswith("rq.") for logger in loggers)
    deliveries = {line.get("svix_id") for line in lines if line["event"] == "delivery"}
    applied = {event["svix_id"] for line in lines if line["event"] == "batch" for event in line["events"]}
    failed = {line["svix_id"] for line in lines if line["event"] == "job failed"}
    assert applied <= deliveries, "what was applied can be found by what came"
    assert deliveries & failed

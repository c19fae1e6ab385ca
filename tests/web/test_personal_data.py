"""Marked personal data and secrets go down every path there is; none of it may come out where people read."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psycopg
from psycopg import sql
from redis import Redis
from rq import Queue

import config
from cli.dev.servers import RedisServer, free_port
from tests.support import http
from tests.support.databases import with_database
from tests.support.deliveries import signed
from tests.support.failed_jobs import fail_in_another_worker, raise_personal
from tests.support.fake_clerk import KEY, FakeClerk
from tests.support.payloads import (
    NOW,
    body,
    dissolved,
    email_entry,
    membership,
    membership_event,
    organization,
    organization_event,
    session,
    session_event,
    user,
    user_event,
)
from tests.support.processes import command_lines
from tests.support.queue import RqView, rq_command
from tests.support.settings import SECRET, MakeSettings
from tests.support.stack import Stack, environment
from tests.support.sync import api_settings
from tests.support.waiting import wait_until

MARK = "zqmark"
EMAIL = f"{MARK}@example.com"
PASSWORD = "correct horse"
TOKEN = "b7Kq-2fR_9wZ.tY4"
REFUSED = "Refuse"
PATIENCE_S = 40
HIDDEN = re.compile(r'name="(token|until)" value="([^"]+)"')
ONE_BY_ONE = """
import contextlib, json, sys
from cli.main import main
for arguments in json.loads(sys.argv[1]):
    print("$", ascii(arguments))
    with contextlib.suppress(SystemExit):
        main(arguments)
"""


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


def test_nothing_personal_comes_out_anywhere(
    make_settings: MakeSettings, own_redis: RedisServer, clerk: FakeClerk, tmp_path: Path
) -> None:
    settings = api_settings(
        make_settings,
        clerk,
        redis_url=own_redis.url,
        port=free_port(),
        web_workers=1,
        console_password=PASSWORD,
        pull_token=TOKEN,
        max_body_bytes=100_000,
        log_format="json",
        log_level="DEBUG",
        organization_source="membership",
    )
    with Stack(settings, tmp_path) as stack, Redis.from_url(own_redis.url) as redis:
        _let_all_happen(stack, own_redis, redis, clerk)
        said = _everything_that_is_shown(stack, redis, clerk)
        held = {process.name: command_lines(process.living_pid) for process in (stack.web, *stack.workers)}
        held["Redis"] = _everything_in(redis)
        stack.stop()
        said["log"] = stack.logs()
    secrets = _secrets(settings)
    _assert_nothing_personal(said, secrets)
    assert [(what, it) for what, text in held.items() for it in secrets if it in text] == []
    _assert_one_form(said["log"])


def _let_all_happen(stack: Stack, server: RedisServer, redis: Redis, clerk: FakeClerk) -> None:
    _good(stack)
    _organizations(stack)
    _forged_and_broken(stack)
    _unreadable(stack)
    _refused_by_the_database(stack, redis)
    _pulled(stack, clerk)
    _put_there_by_others(stack, redis)
    _without_database(stack, redis)
    _without_redis(stack, server)
    _killed(stack)


def _assert_nothing_personal(said: dict[str, str], secrets: list[str]) -> None:
    assert "job failed" in said["log"]
    assert "waiting" in said["log"]
    for what, text in said.items():
        for line in text.splitlines():
            assert MARK not in line.lower(), f"{what}: {line}"
            for secret in ("203.0.113.77", "postgres@", *secrets):
                assert secret not in line, f"{what}: {line}"


def _secrets(settings: config.Settings) -> list[str]:
    """Return every secret; passwords of given servers may be words that stand anywhere."""
    urls = (settings.database_url, settings.redis_url)
    passwords = [urlsplit(url.get_secret_value()).password or "" for url in urls if url]
    keys = (SECRET, SECRET.removeprefix("whsec_"), PASSWORD, TOKEN, KEY)
    return [*keys, *(password for password in passwords if len(password) > 20)]


def _everything_in(redis: Redis) -> str:
    """Return all keys and values, with what is compressed in them: bodies, which are personal."""
    readers: dict[bytes, Callable[[bytes], Any]] = {
        b"string": redis.get,
        b"list": lambda key: redis.lrange(key, 0, -1),
        b"set": redis.smembers,
        b"zset": lambda key: redis.zrange(key, 0, -1, withscores=True),
        b"hash": redis.hgetall,
        b"stream": redis.xrange,
    }
    found = []
    for key in redis.scan_iter():
        kind: Any = redis.type(key)
        value = readers[kind](key)
        found.append(repr((key, value)))
        if isinstance(value, dict):
            found += [repr(_inflated(part)) for part in value.values()]
    return "\n".join(found)


def _inflated(part: bytes) -> bytes:
    try:
        return zlib.decompress(part)
    except zlib.error:
        return b""


def _post(stack: Stack, content: bytes, headers: dict[str, str] | None = None, query: str = "") -> int:
    headers = signed(content) if headers is None else headers
    url = stack.url + query
    return http.post(url, content=content, headers=headers, timeout=15).status_code


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


def _organizations(stack: Stack) -> None:
    """Events that are taken where memberships decide on `organization`."""
    acme = organization(name=f"{MARK} org", slug=MARK, public_metadata={MARK: MARK})
    member = membership("user_good", acme, public_metadata={MARK: MARK})
    member["public_user_data"] |= {"first_name": MARK, "identifier": EMAIL}
    odd = {**member, "public_user_data": {**member["public_user_data"], "user_id": EMAIL}}
    events = [
        membership_event(data=member),
        membership_event(data=odd),
        membership_event(data={**member, "organization": {**acme, "id": EMAIL}}),
        organization_event(data=acme),
        organization_event(data={**acme, "id": EMAIL}),
        membership_event("organizationMembership.deleted", member),
        organization_event("organization.deleted", {**dissolved(), "slug": MARK}),
    ]
    assert [_post(stack, body(event)) for event in events] == [202] * len(events)


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
    assert http.get(f"{stack.base_url}/{EMAIL}").status_code == 404


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


def _refused_by_the_database(stack: Stack, redis: Redis) -> None:
    """Break a constraint: PostgreSQL answers with the whole row. Raise an error with a text of its own."""
    with _connection(stack.settings) as connection:
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


def _pulled(stack: Stack, clerk: FakeClerk) -> None:
    """Pull users over HTTP, good and failing: an answer with the row is for the application alone."""
    clerk.put(marked_user("user_good"), marked_user("user_refused", first_name=f"{MARK} {REFUSED}"))
    clerk.put_members(membership("user_good", organization("org_new", f"{MARK} org")))
    assert EMAIL in _pull(stack, "user_good", 200)
    denied = body({"errors": [{"message": MARK, "long_message": EMAIL, "code": "forbidden"}]})
    clerk.answer_next(403, denied, path="/users/user_denied")
    clerk.answer_next(200, f"<p>{EMAIL}", path="/users/user_broken")
    clerk.show_next([marked_user("user_x")], path="/users/user_odd")
    for clerk_id, status in (
        ("user_refused", 503),
        ("user_denied", 503),
        ("user_broken", 404),  # it is asked for once more
        ("user_odd", 503),
        ("user_nobody", 404),
        (EMAIL, 400),
    ):
        assert MARK not in _pull(stack, clerk_id, status), clerk_id


def _pull(stack: Stack, clerk_id: str, status: int) -> str:
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    url = f"{stack.base_url}/users/{clerk_id}/pull"
    answer = http.post(url, headers=bearer, timeout=20)
    assert answer.status_code == status, answer.text
    return answer.text


def _put_there_by_others(stack: Stack, redis: Redis) -> None:
    """Jobs as others enqueue them: RQ's default description is the whole call. One fails in their worker."""
    _drained(stack, redis)
    [worker] = stack.workers
    worker.end(patience=15)
    fail_in_another_worker(redis, raise_personal, EMAIL)
    worker.start()
    for function in ("worker.job.apply_delivery", "builtins.print", f"{MARK}.{MARK}"):
        Queue("clerk", connection=redis, serializer="json").enqueue(function, EMAIL, name=MARK)
    Queue("clerk", connection=redis).enqueue("builtins.print", EMAIL)  # pickled
    redis.hset("rq:job:odd", mapping={"data": MARK, "description": EMAIL, "meta": MARK, "created_at": MARK})
    redis.rpush("rq:queue:clerk", "odd")


def _without_database(stack: Stack, redis: Redis) -> None:
    """Take the table away, then the whole database, and cut every connection."""
    with _connection(stack.settings) as connection:
        connection.execute("ALTER TABLE users RENAME TO gone")
        assert _post(stack, marked_event(marked_user("user_waits"))) == 202
        wait_until(lambda: "waiting" in stack.logs(), PATIENCE_S, stack.logs)
        connection.execute("ALTER TABLE gone RENAME TO users")
    with _database_away(stack.settings):
        assert _post(stack, marked_event(marked_user("user_waits_too"))) == 202
        wait_until(lambda: stack.logs().count("no connection to the database") > 0, PATIENCE_S, stack.logs)
        http.get(f"{stack.base_url}/health", timeout=10)
    wait_until(lambda: RqView(redis).queue.count == 0, PATIENCE_S, stack.logs)


@contextlib.contextmanager
def _database_away(settings: config.Settings) -> Iterator[None]:
    assert settings.database_url_unpooled
    url = settings.database_url_unpooled.get_secret_value()
    name = url.rpartition("/")[2]
    allow = sql.SQL("ALTER DATABASE {} ALLOW_CONNECTIONS {}")
    with psycopg.connect(with_database(url, "postgres"), autocommit=True) as admin:
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
    http.get(f"{stack.base_url}/health", timeout=10)
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
        return http.get(f"{stack.base_url}/health/ready", timeout=5).is_success
    except httpx.TransportError:
        return False


def _everything_that_is_shown(stack: Stack, redis: Redis, clerk: FakeClerk) -> dict[str, str]:
    """Return what people and machines get to read of all this. Redis was emptied: what fails comes again."""
    _unreadable(stack)
    _put_there_by_others(stack, redis)
    _drained(stack, redis)
    ids = RqView(redis).ids("failed")
    assert len(ids) >= 10
    shown = _pages(stack)
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(_commands_that_read_clerk, stack, clerk)  # which waits more than it works
        shown["looking"] = _commands_that_look(stack.settings, ids)
        shown["reading Clerk"] = reading.result()
    assert stack.settings.redis_url
    shown["rq info"] = rq_command(stack.settings.redis_url.get_secret_value(), "info")
    ours = [f"rq:job:{id_}" for id_ in ids if id_.startswith("msg_")]
    described = [redis.hmget(key, "description", "meta") for key in ours]
    assert described
    shown["what RQ's dashboards show of our jobs"] = "\n".join(map(repr, described))
    shown |= _pressed(stack, ids)
    _drained(stack, redis)
    shown["replaying"] = _commands(
        stack.settings, ["failed", "replay", ids[0]], ["failed", "replay", "--all", "--json"]
    )
    assert '"replayed"' in shown["replaying"]
    _drained(stack, redis)
    shown["discarding"] = _commands(
        stack.settings, ["failed", "discard", ids[-1]], ["failed", "discard", "--all", "--yes"]
    )
    assert RqView(redis).ids("failed") == []
    return shown


def _drained(stack: Stack, redis: Redis) -> None:
    wait_until(lambda: RqView(redis).queue.count == 0, PATIENCE_S, stack.logs)


def _pages(stack: Stack) -> dict[str, str]:
    shown = {}
    for path in ("/health", "/health/ready", "/metrics", "/console", "/console?user=user_good"):
        answer = http.get(stack.base_url + path, auth=("x", PASSWORD), timeout=10)
        assert answer.status_code == 200, path
        shown[path] = answer.text
    return shown


def _pressed(stack: Stack, ids: list[str]) -> dict[str, str]:
    """Press the console's buttons, and return the pages that ask whether to, and that say what was done."""
    shown = {}
    with httpx.Client(
        base_url=stack.base_url, auth=("x", PASSWORD), trust_env=False, timeout=10, follow_redirects=True
    ) as operator:
        form = dict(HIDDEN.findall(operator.get("/console").text))
        for do, confirmed, says in (
            ("replay all", "0", "Replay all"),
            ("discard all", "0", "Discard all"),
            (f"discard {ids[0]}", "0", "Discard 1 failed job?"),
            (f"replay {ids[1]}", "0", "1 replayed"),
            (f"discard {ids[2]}", "1", "1 discarded"),
            ("replay", "0", "No failed job was selected"),
            (EMAIL, "0", "Nothing was changed"),
        ):
            answer = operator.post("/console/jobs", data={**form, "do": do, "confirmed": confirmed})
            assert says in answer.text, do
            shown[f"console: {do}"] = answer.text
    return shown


def _commands_that_look(settings: config.Settings, ids: list[str]) -> str:
    said = _commands(
        settings,
        ["failed", "list"],
        ["failed", "list", "--json"],
        ["failed", "replay", "--all", "--dry-run"],
        ["events"],
        ["events", "--json"],
        ["status"],
        ["status", "--json"],
        ["db", "current"],
        ["send", "user.created"],
        ["--debug", "failed", "show", "nowhere"],
        *(["failed", "show", id_, *options] for id_ in ids for options in ([], ["--json"])),
    )
    assert "user_good" in said
    assert "LookupError: failed by another RQ worker" in said
    return said


def _commands_that_read_clerk(stack: Stack, clerk: FakeClerk) -> str:
    """Let users be refused, unreadable, missing and stale, and let Clerk itself refuse."""
    denied = body({"errors": [{"message": MARK, "long_message": EMAIL, "code": "forbidden"}]})
    clerk.put(marked_user(EMAIL), marked_user("user_missing"))
    clerk.put(marked_user("user_good", first_name=f"{MARK} changed", updated_at=NOW + 99_000))
    clerk.answer_next(403, denied, path="/users/user_denied")
    clerk.answer_next(403, denied, path="/users")
    said = _commands(
        stack.settings,
        ["--debug", "backfill"],
        ["--debug", "pull", "user_refused"],
        ["--debug", "pull", "user_denied"],
        ["pull", "user_good"],
        ["reconcile"],
        ["backfill"],
        ["reconcile", "--fix", "--json"],
    )
    assert said.count("Traceback") >= 3
    for words in ("user_missing", "user_refused", "user_good is now the same here as in Clerk", "left out"):
        assert words in said, said
    return said


def _commands(settings: config.Settings, *commands: list[str]) -> str:
    """Run commands one after the other in one process, as most of the time goes into its start."""
    ran = subprocess.run(
        [sys.executable, "-P", "-c", ONE_BY_ONE, json.dumps(commands)],
        env=environment(settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
        timeout=100,
    )
    assert ran.stdout.count("$ [") == len(commands), ran.stdout
    return ran.stdout


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

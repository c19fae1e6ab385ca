import json
import re
import time
from contextlib import closing

import pytest
from redis import Redis

from config import load
from tests.support.commands import RunCommand, runner
from tests.support.failed_jobs import REASON, fail, fail_in_another_worker, forget, raise_personal
from tests.support.payloads import ANN, BEN, svix_id, user, user_event
from tests.support.queue import RqView, delivery, put
from tests.support.terminal import on_a_terminal
from worker.queue.failed_jobs import PAGE
from worker.queue.producer import DeliveryQueue

MARK = "ann.marked@example.com"
COLUMNS = {"id", "type", "clerk_id", "reason", "attempts", "first_failed_at", "failed_at"}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, redis_url: str) -> RunCommand:
    """Run `clerk-sync failed` and return its exit status, its output and its errors."""
    monkeypatch.setenv("REDIS_URL", redis_url)
    return runner("failed")


def listed(run: RunCommand, *arguments: str) -> list[str]:
    status, out, _ = run("list", "--json", *arguments)
    assert status == 0
    return [job["id"] for job in json.loads(out)]


def test_the_list_in_json_has_the_documented_fields(run: RunCommand, redis: Redis) -> None:
    id_ = fail(redis, user_event("user.updated", user(BEN, email=MARK)))
    status, out, err = run("list", "--json")
    [job] = json.loads(out)
    assert (status, err) == (0, "")
    assert set(job) == COLUMNS
    assert (job["id"], job["type"], job["clerk_id"], job["attempts"]) == (id_, "user.updated", BEN, 1)
    assert job["reason"] == REASON
    assert job["first_failed_at"] == job["failed_at"]


def test_an_empty_list_is_an_empty_array(run: RunCommand) -> None:
    assert run("list", "--json") == (0, "[]\n", "")
    assert run("list") == (0, "no failed jobs\n", "")
    assert run("list", "--type", "user.deleted") == (0, "no failed jobs match the options\n", "")


def test_the_table_has_the_same_and_says_when_there_is_more(run: RunCommand, redis: Redis) -> None:
    ids = [fail(redis, user_event(data=user(ANN, email=MARK))) for _ in range(3)]
    status, out, _ = run("list")
    assert status == 0
    assert all(id_ in out for id_ in ids)
    assert ANN in out
    assert REASON in out
    assert "in all" not in out
    assert "3 failed jobs in all; use --limit to show more." in run("list", "--limit", "2")[1]
    assert MARK not in out


def test_the_list_is_filtered(run: RunCommand, redis: Redis) -> None:
    ann = fail(redis, user_event("user.created", user(ANN)))
    ben = fail(redis, user_event("user.updated", user(BEN)))
    assert listed(run, "--type", "user.updated") == [ben]
    assert listed(run, "--user", ANN) == [ann]
    assert set(listed(run, "--since", "2h")) == {ann, ben}
    assert listed(run, "--since", "2999-01-01") == []
    assert len(listed(run, "--limit", "1")) == 1


def test_jobs_of_an_unknown_type_can_be_chosen(run: RunCommand, redis: Redis, rq: RqView) -> None:
    good = fail(redis)
    foreign = fail_in_another_worker(redis, raise_personal, MARK)
    unreadable = fail(redis, user_event("unreadable"))
    assert set(listed(run, "--type", "unknown")) == {foreign, unreadable}
    assert run("discard", "--all", "--type", "unknown", "--yes")[0] == 0
    assert rq.ids("failed") == [good]


@pytest.mark.parametrize(
    "arguments",
    [
        ("list", "--since", "yesterday"),
        ("list", "--since", "2 h"),
        ("list", "--since", "999999d"),
        ("list", "--type", "user.banned"),
        ("list", "--limit", "0"),
        ("show",),
        ("replay",),
        ("replay", "msg_1", "--all"),
        ("replay", "msg_1", "--since", "2h"),
        ("replay", "--type", "user.created"),
        ("discard",),
        ("discard", "--all"),
    ],
    ids=" ".join,
)
def test_wrong_usage_has_exit_status_2(run: RunCommand, redis: Redis, arguments: tuple[str, ...]) -> None:
    id_ = fail(redis)
    status, _, err = run(*arguments)
    assert status == 2
    assert err.startswith("Usage: ")
    assert listed(run) == [id_]


def test_show_prints_the_body_only_with_payload(run: RunCommand, redis: Redis) -> None:
    id_ = fail(redis, user_event(data=user(ANN, email=MARK)))
    status, out, _ = run("show", id_)
    assert status == 0
    assert f"reason: {REASON}" in out
    assert "Traceback (most recent call last)" in out
    assert MARK not in out
    assert MARK not in run("show", id_, "--json")[1]
    assert MARK in run("show", id_, "--payload")[1]
    shown = json.loads(run("show", id_, "--payload", "--json")[1])
    assert set(shown) == COLUMNS | {"traceback", "payload"}
    assert json.loads(shown["payload"])["data"]["id"] == ANN


@pytest.mark.parametrize("command", ["show", "replay", "discard"])
def test_an_unknown_id_is_one_line_and_exit_status_1(run: RunCommand, command: str) -> None:
    assert run(command, "msg_never") == (1, "", "clerk-sync: no failed job msg_never\n")


def test_replay_says_what_became_of_each(run: RunCommand, redis: Redis, rq: RqView) -> None:
    one, two, expired = fail(redis), fail(redis), fail(redis)
    forget(redis, expired)
    status, out, err = run("replay", one, expired, two)
    assert (status, err) == (1, f"clerk-sync: no failed job {expired}\n")
    assert out.splitlines() == [f"{one}: replayed", f"{two}: replayed"]
    assert rq.queue.get_job_ids() == [one, two]
    assert run("replay", one) == (0, f"{one}: not failed any more\n", "")


def test_replaying_all_survives_what_has_expired(run: RunCommand, redis: Redis, rq: RqView) -> None:
    one, expired, two = fail(redis), fail(redis), fail(redis)
    forget(redis, expired)
    status, out, _ = run("replay", "--all", "--json")
    assert status == 0
    fates = {job["id"]: job["outcome"] for job in json.loads(out)}
    assert fates == {one: "replayed", expired: "gone", two: "replayed"}
    assert sorted(rq.queue.get_job_ids()) == sorted([one, two])
    assert run("replay", "--all") == (0, "no failed jobs\n", "")


def test_only_what_the_filters_leave_is_replayed(run: RunCommand, redis: Redis, rq: RqView) -> None:
    fail(redis, user_event("user.created", user(ANN)))
    ben = fail(redis, user_event("user.updated", user(BEN)))
    assert run("replay", "--all", "--type", "user.updated", "--since", "1h", "--user", BEN)[0] == 0
    assert rq.queue.get_job_ids() == [ben]


@pytest.mark.parametrize("command", ["replay", "discard"])
def test_a_dry_run_names_the_jobs_and_touches_none(run: RunCommand, redis: Redis, command: str) -> None:
    id_ = fail(redis)
    status, out, err = run(command, "--all", "--dry-run")
    assert (status, out) == (0, f"{id_}\n")
    assert err.startswith("1 failed job would be ")
    assert json.loads(run(command, id_, "--dry-run", "--json")[1])[0]["id"] == id_
    assert listed(run) == [id_]


@pytest.mark.parametrize("command", ["replay", "discard"])
def test_a_dry_run_does_not_name_a_job_that_is_not_a_failed_one(
    run: RunCommand, redis: Redis, command: str
) -> None:
    id_, waiting = fail(redis), delivery()
    put(redis, waiting)
    status, out, err = run(command, "nope", id_, waiting.svix_id, "--dry-run")
    assert (status, out) == (1, f"{id_}\n")
    assert err.endswith(f"clerk-sync: no failed job nope, {waiting.svix_id}\n")
    status, out, err = run(command, "nope", "--dry-run", "--json")
    assert (status, json.loads(out), err) == (1, [], "clerk-sync: no failed job nope\n")


def test_discard_deletes(run: RunCommand, redis: Redis, rq: RqView) -> None:
    one, two, three = fail(redis), fail(redis), fail(redis)
    assert run("discard", one) == (0, f"{one}: discarded\n", "")
    assert sorted(listed(run)) == sorted([two, three])
    status, out, _ = run("discard", "--all", "--yes")
    assert status == 0
    assert out.splitlines()[-1] == "2 discarded"
    assert [rq.places(id_) for id_ in (one, two, three)] == [[], [], []]


def test_an_id_from_elsewhere_cannot_steer_the_terminal(run: RunCommand, redis: Redis) -> None:
    fail(redis, id_="[red]\x1b[2J\udcff")
    status, out, _ = run("list")
    assert status == 0
    assert "[red]\\x1b[2J\\udcff" in out
    assert run("show", "[red]\x1b[2J\udcff")[0] == 0
    assert "\x1b" not in run("replay", "--all")[1]


def test_without_redis_the_line_says_so(run: RunCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", "redis://:secret@127.0.0.1:1/0")
    began = time.monotonic()
    assert run("list") == (
        1,
        "",
        "clerk-sync: nothing listens where REDIS_URL leads: start Redis, or correct REDIS_URL\n",
    )
    assert time.monotonic() - began < 30
    monkeypatch.delenv("REDIS_URL")
    assert run("list") == (1, "", "clerk-sync: REDIS_URL is not set\n")


@pytest.mark.parametrize("answer", [b"\n", b"\x04"])
def test_replay_of_all_on_a_terminal_needs_a_yes(redis: Redis, redis_url: str, answer: bytes) -> None:
    fail(redis)
    status, said = on_terminal(redis_url, "replay", "--all", answer=answer)
    assert "Replay 1 failed job?" in said
    assert (status, redis.zcard("rq:failed:clerk")) == (1, 1)


def test_a_narrow_terminal_does_not_break_the_ids(redis: Redis, redis_url: str) -> None:
    id_ = fail(redis, user_event(data=user(ANN)))
    status, said = on_terminal(redis_url, "list")
    assert status == 0
    assert said.splitlines()[:3] == [f"{id_}  user.created", f"  {ANN}", f"  {REASON}"]


def test_on_a_terminal_many_show_how_far_it_is(redis: Redis, redis_url: str) -> None:
    fail_many(redis, [svix_id() for _ in range(600)])
    status, said = on_terminal(redis_url, "replay", "--all", "--yes")
    assert status == 0
    assert "100%" in said
    assert "600 replayed" in said
    assert redis.llen("rq:queue:clerk") == 600


@pytest.mark.parametrize("as_json", [False, True])
def test_what_is_done_is_reported_also_when_redis_refuses_the_rest(
    run: RunCommand, redis: Redis, redis_url: str, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    done = [f"a{i:03}" for i in range(PAGE)]
    fail_many(redis, [*done, "b"])
    # A Redis user who may not read the job of the second page.
    keys = ["rq:job:a*", *(f"{prefix}*" for prefix in ("rq:failed:", "rq:queue", "rq:wip:", "rq:scheduled:"))]
    keys += ["clerk-sync:*"]
    redis.acl_setuser("narrow", enabled=True, passwords=["+pw"], keys=keys, categories=["+@all"])
    monkeypatch.setenv("REDIS_URL", re.sub("//(.*@)?", "//narrow:pw@", redis_url))
    try:
        status, out, err = run("replay", "--all", *(["--json"] if as_json else []))
    finally:
        redis.acl_deluser("narrow")
    assert status == 1
    assert (
        err.strip()
        == "clerk-sync: REDIS_URL's user may not use a key: allow ~rq:* and ~clerk-sync:* (ACL SETUSER)"
    )
    if as_json:
        assert json.loads(out) == [{"id": id_, "outcome": "replayed"} for id_ in done]
    else:
        assert out.endswith(f"{PAGE} replayed\n")
    assert redis.zrange("rq:failed:clerk", 0, -1) == [b"b"]


def fail_many(redis: Redis, ids: list[str]) -> None:
    """Let there be failed jobs of these ids, in the order of their ids."""
    with closing(DeliveryQueue(redis)) as queue:
        for id_ in ids:
            queue.enqueue(delivery(id_=id_))
            redis.hset(f"rq:job:{id_}", "status", "failed")
    redis.delete("rq:queue:clerk")
    redis.zadd("rq:failed:clerk", dict.fromkeys(ids, 4e9))


def on_terminal(redis_url: str, *arguments: str, answer: bytes = b"") -> tuple[int, str]:
    """Run `clerk-sync failed` on a terminal and type `answer` once it asks; return its status and output."""
    settings = load(_env_file=None, redis_url=redis_url)
    with on_a_terminal(settings, "failed", *arguments, columns=120) as terminal:
        if answer:
            terminal.wait_for("?")
            terminal.press(answer)
        return terminal.wait(), terminal.shown

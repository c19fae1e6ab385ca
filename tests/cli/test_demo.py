import re
from pathlib import Path

import psycopg
import pytest
import redis

from cli.dev import demo, demo_events
from cli.dev.servers import free_port
from tests.support.settings import SECRET, MakeSettings
from tests.support.stack import Stack, wait_until
from worker.queue.rq_format import FAILED_KEY

ALIVE = {"ann", "ben", "cat", "dan", "eva", "fay", "ivy", "jon", "kim"}
LOGIN_MINUTES = {"ann": 5, "ben": 6, "cat": 7, "fay": 12, "ivy": 50, "jon": 9, "kim": 11}


def users(database_url: str, column: str) -> list[dict[str, object]]:
    """Return that column of every run's users by name, the earlier run first."""
    with psycopg.connect(database_url) as connection:
        query = f"SELECT clerk_id, {column} FROM users ORDER BY created_at, clerk_id"
        rows = connection.execute(query.encode()).fetchall()
    runs: dict[str, dict[str, object]] = {}
    for clerk_id, value in rows:
        found = re.fullmatch("user_([a-z]{3})(.{4})", clerk_id)
        assert found
        runs.setdefault(found[2], {})[found[1]] = value
    return list(runs.values())


def answers(output: str) -> dict[str, str]:
    """Return what stands behind each line of the story, the last time that it is told."""
    lines = {line[:40].strip(): line[40:] for line in output.splitlines()}
    return {told: " ".join(rest.split()) for told, rest in lines.items()}


def test_the_demo_tells_every_answer_and_the_rows_and_can_be_run_again(
    make_settings: MakeSettings,
    database_url: str,
    redis_url: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Stack(make_settings(port=free_port(), web_workers=1), tmp_path) as stack:
        demo.play(stack.url, SECRET, database_url)
        first = capsys.readouterr().out
        demo.play(stack.url, SECRET, database_url)
        second = capsys.readouterr().out
        with redis.Redis.from_url(redis_url) as client:
            wait_until(lambda: client.zcard(FAILED_KEY) == 2, 10, stack.logs)

    for output in (first, second):
        told = answers(output)
        assert told["Ann signs up"] == "202 queued applied"
        assert told["the same delivery again"] == "200 duplicate"
        assert told["a change of Gus from before: too late"] == "202 queued stale"
        assert told["Hal signs up: comes second"] == "202 queued stale"
        assert told["support signs out"] == "202 queued ignored"
        assert told["a stranger makes Ben an admin"].startswith("400 the signature")
        assert told["Ann signs up: signed an hour ago"].startswith("400 the signature")
        assert told["somebody joins a waiting list: no matter"] == "200 ignored"
        assert told["a user without an id: will fail as a job"] == "202 queued"
        assert re.search(r"^First row after \d+ ms\.$", output, re.MULTILINE)
        assert f"curl {stack.base_url}/health\n" in output
    for run in users(database_url, "email"):
        assert set(run) == ALIVE
        assert str(run["ben"]).endswith("@placeholder.invalid")
        assert str(run["eva"]).startswith("team")
        assert str(run["dan"]).startswith("dan")
        assert str(run["dan"]) in first + second
    for run in users(database_url, "role"):
        assert [name for name, role in run.items() if role == "admin"] == ["cat"]
    for run in users(database_url, "organization"):
        assert {name: value for name, value in run.items() if value} == {"cat": "Acme", "fay": "Acme"}
    for run in users(database_url, "extract(minute FROM last_login_at - created_at)::int"):
        assert {name: minute for name, minute in run.items() if minute is not None} == LOGIN_MINUTES
    assert len(users(database_url, "name")) == 2


def test_a_demo_that_no_worker_applies_says_so(
    make_settings: MakeSettings,
    database_url: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo, "TIMEOUT_S", 0.2)
    with Stack(make_settings(port=free_port(), web_workers=1), tmp_path, workers=0) as stack:
        demo.play(stack.url, SECRET, database_url)
    output = capsys.readouterr().out
    assert "No row after 0.2 s: does a worker run" in output
    assert "34 deliveries were not applied" in output
    assert users(database_url, "name") == []


def test_every_line_of_the_story_fits_its_column() -> None:
    steps = demo_events.Story("1abc", 1_767_261_600_000, "ins_1").steps()
    assert 38 <= len(steps) <= 44
    assert max(len(step.line) for step in steps) <= demo.ANSWER_COLUMNS["delivered"]

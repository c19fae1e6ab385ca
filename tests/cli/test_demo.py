import re
from pathlib import Path

import psycopg
import pytest

from cli.dev import demo, demo_events
from cli.dev.servers import free_port
from tests.support.settings import MakeSettings
from tests.support.stack import Stack

ALIVE = {"ann", "ben", "cat", "dan", "eva", "fay", "ivy", "jon", "kim"}
LOGIN_MINUTES = {"ann": 5, "ben": 6, "cat": 7, "fay": 12, "ivy": 50, "jon": 9, "kim": 11}


FORGED = "400 the signature is missing or not valid"
FAILED = "202 queued → failed: Unreadable: the event's data.id is not a Clerk id"


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
    """Return what stands behind each line of the story, the last time, however it is wrapped."""
    found: dict[str, str] = {}
    last = ""
    for line in output.splitlines():
        shown = line[: demo.LINE_WIDTH].strip()
        if shown:
            found[shown] = line[demo.LINE_WIDTH :].strip()
        elif line.strip():
            found[last] += f" {line.strip()}"
        last = shown or last
    return found


def test_the_demo_shows_every_answer_in_80_columns_and_the_rows_and_can_be_run_again(
    make_settings: MakeSettings,
    database_url: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once more, without a worker, it says that no row came."""
    with Stack(make_settings(port=free_port(), web_workers=1), tmp_path) as stack:
        demo.play(stack.settings, stack.url)
        first = capsys.readouterr().out
        demo.play(stack.settings, stack.url)
        second = capsys.readouterr().out
        stack.workers[0].end()
        monkeypatch.setattr(demo, "TIMEOUT_S", 0.2)
        demo.play(stack.settings, stack.url)
        third = capsys.readouterr().out

    for output in (first, second):
        assert max(map(len, output.splitlines())) <= 80
        assert "…" not in output, "nothing is cut"
        shown = answers(output)
        assert shown["Ann signs up"] == "202 queued → applied"
        assert shown["The same delivery again"] == "200 duplicate"
        assert shown["A change of Gus from before: too late"] == "202 queued → stale"
        assert shown["Hal signs up: comes second"] == "202 queued → stale"
        assert shown["Support signs out"] == "202 queued → ignored"
        assert shown["A stranger makes Ben an admin"] == FORGED
        assert shown["Ann signs up: signed an hour ago"] == FORGED
        assert shown["A visitor joins a waiting list"] == "200 ignored"
        assert shown["A user without an id"] == FAILED
        assert re.search(r"^First row after \d+ ms\.$", output, re.MULTILINE)
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
    assert "No row after 0.2 s: check that a worker runs" in third
    assert "35 deliveries were not applied" in third
    assert len(users(database_url, "name")) == 2


def test_every_line_of_the_story_fits_its_column() -> None:
    steps = demo_events.Story("1abc", 1_767_261_600_000, "ins_1").steps()
    assert 38 <= len(steps) <= 44
    assert max(len(step.line) for step in steps) <= demo.LINE_WIDTH

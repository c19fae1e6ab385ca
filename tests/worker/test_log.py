"""What a process writes. Each is a process of its own: logging is set up once in each."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.support.payloads import user, user_event
from tests.support.processes import clerk_sync
from tests.support.queue import RqView, delivery
from tests.support.service_process import ServiceProcess
from tests.support.settings import MakeSettings
from tests.support.stack import environment
from tests.support.waiting import wait_until
from worker.queue.producer import DeliveryQueue

MARK = "marked.person"
SPEAK = f"""
import logging
import structlog
import config
from worker import log

log.configure(config.load())
structlog.get_logger("worker").info("batch", jobs=3, svix_id="msg_1")
structlog.get_logger("worker").debug("a detail")
logging.getLogger("rq.queue").info("Pushed job %s into %s", "msg_2", "clerk")
logging.getLogger("rq.worker").info("Worker %s: *** Listening", "w")
logging.getLogger("rq.worker").warning("Worker %s: trouble", "w")
logging.getLogger("another_library").debug("a detail of theirs")
logging.getLogger("httpx").info("HTTP Request: GET https://api.example.com/v1/users")
logging.getLogger("httpcore.connection").debug("connect_tcp.started host='api.example.com'")
for speaker in (structlog.get_logger("worker"), logging.getLogger("rq.worker")):
    try:
        raise ValueError("{MARK}@example.com")
    except ValueError:
        speaker.exception("it failed")
"""


def speak(directory: Path, script: str = SPEAK, **variables: str) -> list[str]:
    ran = subprocess.run(
        [sys.executable, "-P", "-c", script],
        cwd=directory,
        env=variables,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert ran.stderr == ""
    return ran.stdout.splitlines()


CONNECT = """
import config
from db.connection.engine import Database
from worker import log

settings = config.load()
log.configure(settings)
database = Database(settings)
database.ping()
database.dispose()
"""


def test_no_line_tells_where_the_database_is(database_url: str, tmp_path: Path) -> None:
    assert speak(tmp_path, CONNECT, DATABASE_URL=database_url, LOG_LEVEL="DEBUG") == []


WARN = """
import logging
import config
from worker import log

log.configure(config.load())
for name in log.REVEALING:
    logging.getLogger(name).warning("a warning of a library")
"""


def test_a_library_says_no_more_than_the_level_allows(tmp_path: Path) -> None:
    assert speak(tmp_path, WARN, LOG_LEVEL="ERROR") == []


def test_in_json_every_line_is_an_object_ours_and_rqs_alike(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [json.loads(line) for line in speak(tmp_path, LOG_FORMAT="json")]
    assert [(line["logger"], line["level"], line["event"]) for line in lines] == [
        ("worker", "info", "batch"),
        ("rq.queue", "info", "Pushed job msg_2 into clerk"),
        ("rq.worker", "warning", "Worker w: trouble"),
        ("worker", "error", "it failed"),
        ("rq.worker", "error", "it failed"),
    ]
    assert {"jobs": 3, "svix_id": "msg_1"}.items() <= lines[0].items()
    assert all(line["timestamp"].endswith("Z") for line in lines)
    assert [line.get("error") for line in lines] == [None, None, None, "ValueError", "ValueError"]
    assert_nothing_is_quoted(str(lines))


def test_on_a_console_every_event_is_a_line(tmp_path: Path) -> None:
    lines = speak(tmp_path, LOG_FORMAT="console")
    assert len(lines) == 5
    assert "batch" in lines[0]
    assert "jobs=3" in lines[0]
    assert "\x1b" not in "".join(lines), "no colours without a terminal"
    assert sum("ValueError" in line for line in lines) == 2
    assert_nothing_is_quoted("".join(lines))


STEER = """
import logging
import structlog
import config
from worker import log

log.configure(config.load())
structlog.get_logger("worker").error("job failed", svix_id="\\x1b[2J\\x9b2J\\u202e")
logging.getLogger("rq.worker").warning("Job %s", "\\x1b[2J\\nforged line")
"""


def test_on_a_console_no_text_from_elsewhere_steers_the_terminal(tmp_path: Path) -> None:
    foreign, of_rq = speak(tmp_path, STEER, LOG_FORMAT="console")
    assert r"svix_id=\x1b[2J\x9b2J\u202e" in foreign
    assert r"Job \x1b[2J\nforged line" in of_rq


def assert_nothing_is_quoted(said: str) -> None:
    assert MARK not in said
    assert "Traceback" not in said


@pytest.mark.parametrize(("level", "count"), [("DEBUG", 8), ("ERROR", 2)])
def test_the_level_decides_for_everybody(level: str, count: int, tmp_path: Path) -> None:
    assert len(speak(tmp_path, LOG_LEVEL=level, LOG_FORMAT="json")) == count


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_failing_jobs_leave_nothing_personal_in_the_log_at_any_level(
    log_format: str, queue: DeliveryQueue, rq: RqView, tmp_path: Path, make_settings: MakeSettings
) -> None:
    settings = make_settings(log_format=log_format, log_level="DEBUG")
    assert settings.database_url
    with psycopg.connect(settings.database_url.get_secret_value(), prepare_threshold=None) as connection:
        connection.execute(f"ALTER TABLE users ADD CONSTRAINT no_name CHECK (name <> '{MARK}')")
        connection.execute("ALTER TABLE users ALTER name TYPE varchar(20)")
    fields = {"first_name": MARK, "last_name": None}
    failing = [
        delivery(user_event(data=user("user_1", f"{MARK}@example.com", **fields))),
        delivery(user_event(data=user(f"{MARK}@example.com"))),
        delivery(user_event(data=user("user_2", f"{MARK}@example.com", first_name=MARK * 2))),
    ]
    for one in failing:
        queue.enqueue(one)
    rq.queue.enqueue("send.mail", f"{MARK}@example.com", job_id="foreign", description="foreign")
    with ServiceProcess("worker", clerk_sync("worker"), environment(settings), tmp_path) as worker:
        wait_until(lambda: len(rq.ids("failed")) == 4, 40, worker.text)
    assert worker.exit_status == 0
    said = worker.text()
    assert said.count("job failed") == 4
    assert MARK not in said
    for line in said.splitlines() if log_format == "json" else []:
        json.loads(line)

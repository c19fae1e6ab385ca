"""What the operator sees on a terminal: questions, and a backfill with Ctrl-C and a line that breaks."""

import json
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import config
from cli.dev.servers import HOST
from tests.support.failed_jobs import fail
from tests.support.fake_clerk import FakeClerk, Request
from tests.support.faulty_proxy import FaultyProxy
from tests.support.settings import MakeSettings
from tests.support.sync import api_settings, count
from tests.support.terminal import SOON_S, Terminal, on_a_terminal
from worker.redis_client import worker_redis

USERS, PAGE = 3000, 250
CTRL_C = b"\x03"
CUT_AT = (4, 8, 12)
HALF_ANSWERED_AT = 10
BAR = re.compile(r"Users +\[\S+\] +(\d+)/3000 +\d\d:\d\d:\d\d")
DONE = "\n3,000 users: 3,000 created, 0 updated, 0 unchanged\n"


@pytest.fixture
def settings(make_settings: MakeSettings, clerk: FakeClerk) -> config.Settings:
    clerk.put_many(USERS)
    clerk.shortens_pages_to = PAGE
    clerk.before = slowly
    return api_settings(make_settings, clerk)


def slowly(_: Request) -> None:
    time.sleep(0.15)


def bars(terminal: Terminal) -> Iterator[re.Match[str]]:
    """Give each state of the bar that shows the time left, as soon as it is there."""
    seen = 0
    while terminal.read():
        for bar in BAR.finditer(terminal.shown, seen):
            seen = bar.end()
            yield bar


def test_a_bar_shows_number_and_time_left_in_one_line(settings: config.Settings) -> None:
    with on_a_terminal(settings, "backfill") as terminal:
        states = list(bars(terminal))
        assert terminal.wait() == 0, terminal.shown
    numbers = [int(bar[1]) for bar in states]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) > 3
    assert any(0 < number < USERS for number in numbers)
    assert re.fullmatch(rf"Users +\[#+\] +3000/3000 *{DONE}", terminal.left)


def test_ctrl_c_ends_it_within_seconds_and_it_resumes(clerk: FakeClerk, settings: config.Settings) -> None:
    clerk.before = lambda _: time.sleep(0.15 if len(clerk.requests) < 6 else 1)
    with on_a_terminal(settings, "backfill") as terminal:
        next(bar for bar in bars(terminal) if int(bar[1]) >= 500)
        terminal.press(CTRL_C)
        began = time.monotonic()
        assert terminal.wait() == 1
        assert time.monotonic() - began < SOON_S
    stopped = re.search(
        r"^clerk-sync: stopped after ([\d,]+) users: the next backfill resumes there\n\Z",
        terminal.left,
        re.MULTILINE,
    )
    assert stopped, terminal.left
    clerk.before = lambda _: None
    with on_a_terminal(settings, "backfill") as terminal:
        assert terminal.wait() == 0
    assert f"Resuming after {stopped[1]} users (--restart starts over)" in terminal.shown
    assert count(settings) == USERS


def test_connections_that_are_cut_do_not_fail_the_run(clerk: FakeClerk, settings: config.Settings) -> None:
    port = urlsplit(clerk.url).port
    assert port
    proxy = FaultyProxy(port)

    def cut_now_and_then(request: Request) -> None:
        if len(clerk.requests) in CUT_AT:
            proxy.cut()
        if len(clerk.requests) == HALF_ANSWERED_AT:
            clerk.answer_next(200, "[" + " " * 1000, cut=500)
        slowly(request)

    clerk.before = cut_now_and_then
    proxy.start()
    try:
        through_proxy = settings.model_copy(update={"clerk_api_url": f"http://{HOST}:{proxy.port}"})
        with on_a_terminal(through_proxy, "backfill") as terminal:
            assert terminal.wait() == 0, terminal.shown
    finally:
        proxy.stop()
    assert re.fullmatch(rf"Users +\[#+\] +3000/3000 *{DONE}", terminal.left)
    assert count(settings) == USERS
    asked = Counter((request.path, str(request.parameters)) for request in clerk.requests)
    assert asked.total() - len(asked) > len(CUT_AT), "what was cut off was asked for again"


@pytest.mark.parametrize(
    ("command", "begins"),
    [("failed replay --all --json", "["), ("failed discard --all --json", "["), ("db reset", "schema at ")],
)
def test_a_question_is_seen_also_when_the_output_goes_to_a_file(
    make_settings: MakeSettings, tmp_path: Path, command: str, begins: str
) -> None:
    settings, output = make_settings(), tmp_path / "output"
    with worker_redis(settings) as redis:
        fail(redis)
        with on_a_terminal(settings, *command.split(), output=output) as terminal:
            terminal.wait_for("? [y/N]: ")
            terminal.press(b"y\n")
            assert terminal.wait() == 0, terminal.shown
        assert redis.zcard("rq:failed:clerk") == (begins != "[")
    assert output.read_text().startswith(begins)
    assert begins != "[" or len(json.loads(output.read_text())) == 1

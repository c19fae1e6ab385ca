"""A hundred thousand users: synced beside live deliveries, compared, fast and in little memory.

HYPOTHESIS_PROFILE=thorough pytest -s tests/cli/test_hundred_thousand.py      # shows how long it took
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count as count_from
from pathlib import Path
from typing import NamedTuple

import pytest

import config
from cli.dev.servers import free_port
from db.times import now_ms
from tests.support.commands import start
from tests.support.fake_clerk import numbered_id
from tests.support.payloads import NOW, body, session, session_event, svix_id
from tests.support.processes import rss_mb
from tests.support.settings import MakeSettings
from tests.support.stack import Stack
from tests.support.sync import query, rows
from tests.support.waiting import wait_until
from worker.queue.producer import Delivery, delivery_queue

ROOT = Path(__file__).parents[2]
USERS = 100_000
DELIVERIES_PER_S = 200
MOST_MB = 150
MOST_GROWTH = 1.15  # from the middle third of a run to its last
LEAST_USERS_PER_S = 1000  # of a backfill; a third of what a quiet machine with two cores does
MOST_REPORT_S = 60.0
DRAINED_S = 60
PATIENCE_S = 300  # on a busy machine; on a quiet one it takes a tenth of that

pytestmark = [
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        os.environ.get("HYPOTHESIS_PROFILE") != "thorough", reason="HYPOTHESIS_PROFILE=thorough runs it"
    ),
]


class Run(NamedTuple):
    """What a command said, how many s it took, and its memory all the while."""

    status: int
    out: str
    seconds: float
    mb: list[float]

    @property
    def growth(self) -> float:
        """The most memory in the last third of the run, divided by that in the middle third."""
        third = len(self.mb) // 3
        return max(self.mb[-third:]) / max(self.mb[third:-third])


@contextmanager
def fake_clerk(*arguments: str) -> Iterator[dict[str, str]]:
    """Give the settings that lead to a fake in a process of its own."""
    command = [sys.executable, "-m", "tests.support.fake_clerk", "--users", str(USERS), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout
        usage = dict(part.split("=", 1) for part in process.stdout.readline().split())
        try:
            yield {name.lower(): value for name, value in usage.items()}
        finally:
            process.kill()


def measured(settings: config.Settings, *arguments: str) -> Run:
    """Run a command of clerk-sync and look at its memory while it runs."""
    began = time.monotonic()
    running = start(settings, *arguments)
    out: list[tuple[str, str]] = []
    reader = threading.Thread(target=lambda: out.append(running.communicate(timeout=PATIENCE_S)))
    reader.start()
    mb: list[float] = []
    while reader.is_alive():
        with suppress(FileNotFoundError, ProcessLookupError):
            mb.append(rss_mb(running.pid))
        reader.join(0.1)
    return Run(running.returncode, "".join(out[0]), time.monotonic() - began, mb)


@contextmanager
def deliveries(settings: config.Settings) -> Iterator[dict[str, int]]:
    """Let users of these sign in, so many a second; give who did, and when (ms)."""
    sent: dict[str, int] = {}
    stopped = threading.Event()
    queue = delivery_queue(settings)

    def send() -> None:
        began = time.monotonic()
        for i in count_from():
            if stopped.wait(max(0.0, began + i / DELIVERIES_PER_S - time.monotonic())):
                return
            clerk_id, at = numbered_id(i * 7919 % USERS), NOW + 3600_000 + i
            event = session_event(data=session(clerk_id, id=f"sess_{i}", created_at=at, updated_at=at))
            now = now_ms()
            queue.enqueue(Delivery(svix_id(), body(event).decode(), f"session.created {clerk_id}", now))
            sent[clerk_id] = at

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield sent
    finally:
        stopped.set()
        thread.join(30)
        queue.close()


def applied(settings: config.Settings) -> int:
    """Return how many deliveries are in the ledger."""
    return int(query(settings, "SELECT count(*) FROM webhook_events")[0][0])


@pytest.mark.parametrize(
    ("source", "members"),
    [pytest.param("metadata", 0, id="users"), pytest.param("membership", USERS, id="users and memberships")],
)
def test_they_are_synced_beside_live_deliveries_and_compared(
    make_settings: MakeSettings, tmp_path: Path, source: str, members: int
) -> None:
    with fake_clerk("--members", str(members)) as api:
        settings = make_settings(**api, organization_source=source, port=free_port(), web_workers=1)
        with Stack(settings, tmp_path):
            with deliveries(settings) as sent:
                backfill = measured(settings, "backfill")
            wait_until(
                lambda: applied(settings) == len(sent), DRAINED_S, lambda: f"{applied(settings)} applied"
            )
        assert backfill.status == 0, backfill.out
        stored = rows(settings)
        assert len(stored) == USERS
        assert [clerk_id for clerk_id, at in sent.items() if stored[clerk_id].last_login_at != at] == []
        report = measured(settings, "reconcile", "--json")
    assert report.status == 0, report.out[:500]
    assert json.loads(report.out)["listed"] == USERS
    _show(("backfill", "report"), (backfill, report), len(sent))
    assert max(*backfill.mb, *report.mb) < MOST_MB
    assert max(backfill.growth, report.growth) <= MOST_GROWTH
    assert USERS / backfill.seconds >= LEAST_USERS_PER_S
    assert report.seconds < MOST_REPORT_S


def _show(names: Sequence[str], runs: Sequence[Run], sent: int) -> None:
    for name, run in zip(names, runs, strict=True):
        rate, most = USERS / run.seconds, max(run.mb)
        print(f"{name}: {run.seconds:.1f} s, {rate:,.0f} users/s, {most:.0f} MB, growth {run.growth:.2f}")  # noqa: T201
    print(f"{sent} deliveries beside the backfill")  # noqa: T201

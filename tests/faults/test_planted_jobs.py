"""Whoever can write to Redis can plant jobs; no worker imports, calls or fetches what they name."""

import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq import Callback, Queue
from rq.job import Job
from rq.webhook import Webhook

from cli.servers import HOST
from tests.clerk import body, user_event
from tests.faults.house import has_begun, running, worker_member
from tests.faults.servers import Servers
from tests.jobs import RqView
from tests.stack import environment, wait_until
from worker.rq_layout import JOB_FUNCTION, JOB_PREFIX, SCHEDULED_KEY, STARTED_KEY

TRAP = "import pathlib, sys\npathlib.Path({!r}).touch()\ndef spring(*args, **kwargs):\n    pass\n"
SOON_S = 30
A_WHILE_S = 6  # in which a worker has done each of its duties


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """Somebody who would be told."""
    with socket.create_server((HOST, 0)) as listener:
        listener.setblocking(False)
        yield listener


def test_nothing_that_a_job_names_is_imported_called_or_fetched(
    servers: Servers, directory: Path, listener: socket.socket
) -> None:
    sprung = directory / "sprung"
    (directory / "trap.py").write_text(TRAP.format(str(sprung)))
    settings = servers.fresh()
    assert settings.redis_url
    worker = worker_member("worker", {**environment(settings), "PYTHONPATH": str(directory)}, directory)
    with closing(Redis.from_url(settings.redis_url.get_secret_value())) as redis:
        names = plant(redis, f"http://{HOST}:{listener.getsockname()[1]}/told")
        with running(worker):
            wait_until(lambda: has_begun(worker), SOON_S, worker.read_log)
            wait_until(lambda: len(failed(redis, names)) >= 3, SOON_S, lambda: str(failed(redis, names)))
            time.sleep(A_WHILE_S)
            assert worker.process.running
        rq = RqView(redis)
        assert rq.places("own") == ["finished"]
        assert failed(redis, names) == ["abandoned", "queued", "scheduled"]
        reasons = {rq.job(id_).meta["reason"] for id_ in failed(redis, names)}
        assert reasons == {"ForeignJobError: the job does not call this queue's function"}
    assert not sprung.exists()
    with pytest.raises(BlockingIOError):
        listener.accept()


def plant(redis: Redis, url: str) -> list[str]:
    """Plant a job in each place, and return their ids."""
    queue = Queue("clerk", connection=redis, serializer="json")
    trap = Callback("trap.spring")
    named: dict[str, Any] = {
        "on_success": trap,
        "on_failure": trap,
        "on_stopped": trap,
        "webhooks": [Webhook(url, "failed", method="POST"), Webhook(url, "finished")],
    }
    queue.enqueue("trap.spring", job_id="queued", **named)
    queue.enqueue(JOB_FUNCTION, body(user_event()).decode(), job_id="own", **named)
    jobs = {
        id_: Job.create("trap.spring", id=id_, connection=redis, serializer="json", origin="clerk", **named)
        for id_ in ("scheduled", "abandoned")
    }
    for job in jobs.values():
        job.save()
    redis.zadd(SCHEDULED_KEY, {"scheduled": 1})
    redis.hset(JOB_PREFIX + "scheduled", "status", "scheduled")
    redis.hset(JOB_PREFIX + "abandoned", "status", "started")
    redis.zadd(STARTED_KEY, {"abandoned:an-execution": 1})
    return ["queued", "own", *jobs]


def failed(redis: Redis, names: list[str]) -> list[str]:
    """Return which of them have failed."""
    rq = RqView(redis)
    return sorted(id_ for id_ in names if rq.status(id_) == "failed")

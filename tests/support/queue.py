"""Deliveries on a queue, and what RQ's own classes and commands see of it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any, cast

from click.testing import CliRunner
from redis import Redis
from rq import Queue, Worker
from rq.cli.cli import main as rq_cli
from rq.job import Job
from rq.registry import (
    BaseRegistry,
    CanceledJobRegistry,
    FailedJobRegistry,
    FinishedJobRegistry,
    ScheduledJobRegistry,
    StartedJobRegistry,
)
from rq.worker import BaseWorker

from cli.dev.servers import Server
from tests.support.payloads import NOW, Json, body, svix_id, user_event
from worker.queue.consumer import RESERVED_PREFIX
from worker.queue.heartbeat import Beat, Heartbeat
from worker.queue.producer import Delivery, DeliveryQueue, EnqueueResult
from worker.queue.rq_format import JOB_PREFIX, QUEUE, QUEUE_KEY

REGISTRIES: dict[str, type[BaseRegistry]] = {
    "started": StartedJobRegistry,
    "finished": FinishedJobRegistry,
    "failed": FailedJobRegistry,
    "scheduled": ScheduledJobRegistry,
    "canceled": CanceledJobRegistry,
}


def delivery(event: Json | None = None, *, id_: str | None = None, received_at: int = NOW) -> Delivery:
    """Return a delivery of `event` (default: user.created) as the receiver would enqueue it."""
    event = user_event() if event is None else event
    description = f"{event['type']} {event['data'].get('id')}"
    return Delivery(id_ or svix_id(), body(event).decode(), description, received_at)


def put(redis: Redis, given: Delivery) -> EnqueueResult:
    """Enqueue a delivery as the receiver does, over a connection that is closed then."""
    with closing(DeliveryQueue(redis)) as queue:
        return queue.enqueue(given)


def enqueue(redis: Redis, event: Json | None = None) -> str:
    """Enqueue a new delivery of `event` (default: user.created) as the receiver does, and return its id."""
    given = delivery(event)
    assert put(redis, given) is EnqueueResult.QUEUED
    return given.svix_id


def write_job(redis: Redis, id_: str | bytes, data: bytes, **fields: Any) -> None:
    """Write the hash of a job, as an attacker could who may write to Redis."""
    job: dict[Any, Any] = {"data": data, "status": "queued", "origin": QUEUE, **fields}
    redis.hset(JOB_PREFIX.encode() + (id_ if isinstance(id_, bytes) else id_.encode()), mapping=job)


def put_job(redis: Redis, id_: str | bytes, data: bytes, **fields: Any) -> None:
    """Write the hash of a job, and put it on the queue."""
    write_job(redis, id_, data, **fields)
    redis.rpush(QUEUE_KEY, id_)


def beat(redis: Redis, worker: str = "beating") -> Beat:
    """Do what a worker of that name does at intervals."""
    return Heartbeat(redis, worker, [worker]).beat({})


class RqView:
    """The queue as RQ's own classes see it."""

    def __init__(self, redis: Redis) -> None:
        self.redis = redis
        self.queue = Queue("clerk", connection=redis, serializer="json")
        self.registries = {name: kind(queue=self.queue) for name, kind in REGISTRIES.items()}

    def job(self, id_: str) -> Job:
        """Return the job. Raises rq.exceptions.NoSuchJobError."""
        return Job.fetch(id_, connection=self.redis, serializer="json")

    def fields(self, id_: str) -> dict[bytes, bytes]:
        return cast("dict[bytes, bytes]", self.redis.hgetall(Job.key_for(id_)))

    def status(self, id_: str) -> str:
        return str(self.job(id_).get_status().value)

    def ids(self, registry: str) -> list[str]:
        return list(self.registries[registry].get_job_ids())

    def places(self, id_: str) -> list[str]:
        """Return where the job is: in the queue, in registries, or "reserved" by a worker; once each time."""
        found = ["queue"] * self.queue.get_job_ids().count(id_)
        for name in self.registries:
            found += [name] * self.ids(name).count(id_)
        for key in self.redis.scan_iter(f"{RESERVED_PREFIX}*"):
            found += ["reserved"] * self.redis.lrange(key, 0, -1).count(id_.encode())
        return found

    def workers(self) -> list[BaseWorker]:
        return Worker.all(queue=self.queue)


def rq_command(redis_url: str, *arguments: str, environment: dict[str, str] | None = None) -> str:
    """Run RQ's own command, `rq <arguments>`, and return what it prints.

    In this process; with an `environment` in one of its own, which has only that.
    """
    command, *rest = arguments
    if environment is None:
        result = CliRunner().invoke(rq_cli, [command, "--url", redis_url, *rest])
        assert result.exit_code == 0, result.output
        return result.output
    ran = subprocess.run(
        [sys.executable, "-m", "rq.cli", command, "--url", redis_url, *rest],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=environment,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def commands(redis: Redis) -> dict[str, int]:
    """Return how often each command ran since the last CONFIG RESETSTAT, also within scripts.

    Those that ask for this, or reset it, are left out.
    """
    stats: Any = redis.info("commandstats")
    calls = {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in stats.items()}
    return {name: count for name, count in calls.items() if name.partition("|")[0] not in {"info", "config"}}


@contextmanager
def frozen(server: Server) -> Iterator[None]:
    """Let a server hang for the length of the block: it neither answers nor closes its connections."""
    assert server.pid
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)

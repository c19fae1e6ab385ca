"""RQ's registries kept in order, beside plain RQ workers that died, without loading a job."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from rq import Queue
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job, JobStatus

from tests.support.queue import RqView, enqueue
from tests.support.waiting import wait_until
from worker.queue import rq_format
from worker.queue.consumer import ReservedJobs
from worker.queue.maintenance import SEARCH_KEY, SEEN_KEY, STUCK_AFTER_S, QueueMaintenance

LONG_AGO = 1
START_S = 30.0
ROOT = Path(__file__).parents[2]


@pytest.fixture
def maintenance(rq: RqView, redis: Redis) -> QueueMaintenance:
    redis.set(SEARCH_KEY, "another worker searches for lost jobs")
    return QueueMaintenance(rq.queue)


def start_in_a_plain_worker(redis: Redis, *, score: float = LONG_AGO) -> str:
    """Put a job where a plain worker's death leaves it, and return its id."""
    id_ = enqueue(redis)
    redis.lrem(rq_format.QUEUE_KEY, 0, id_)
    redis.hset(rq_format.JOB_PREFIX + id_, "status", "started")
    redis.zadd(rq_format.STARTED_KEY, {f"{id_}:an-execution": score})
    return id_


def leave_in_the_intermediate_queue(redis: Redis) -> str:
    """Put a job where a plain worker has it that dies between taking and starting it."""
    id_ = enqueue(redis)
    redis.lmove(rq_format.QUEUE_KEY, rq_format.INTERMEDIATE_KEY)
    return id_


def test_the_intermediate_queue_is_where_rq_has_it(rq: RqView) -> None:
    assert IntermediateQueue(rq.queue.key, rq.redis).key == rq_format.INTERMEDIATE_KEY


def test_what_has_expired_is_forgotten_and_the_rest_stays(
    maintenance: QueueMaintenance, redis: Redis
) -> None:
    for key in (rq_format.FINISHED_KEY, rq_format.FAILED_KEY):
        redis.zadd(key, {"old": LONG_AGO, "new": time.time() + 60})
    redis.sadd(rq_format.WORKERS_KEY, "rq:worker:gone", "rq:worker:there")
    redis.hset("rq:worker:there", "birth", "now")
    maintenance.run()
    assert redis.zrange(rq_format.FINISHED_KEY, 0, -1) == [b"new"]
    assert redis.zrange(rq_format.FAILED_KEY, 0, -1) == [b"new"]
    assert redis.smembers(rq_format.WORKERS_KEY) == {b"rq:worker:there"}


def test_an_abandoned_job_is_put_back_once_however_many_workers_maintain_at_once(
    redis: Redis, rq: RqView
) -> None:
    ids = [start_in_a_plain_worker(redis) for _ in range(50)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: QueueMaintenance(rq.queue).run(), range(16)))
    assert sorted(rq.queue.get_job_ids()) == sorted(ids)


def test_an_abandoned_job_is_put_back_once_though_it_was_abandoned_twice(
    maintenance: QueueMaintenance, redis: Redis, rq: RqView
) -> None:
    id_ = start_in_a_plain_worker(redis)
    redis.zadd(rq_format.STARTED_KEY, {f"{id_}:another-execution": LONG_AGO})
    maintenance.run()
    maintenance.run()
    assert (rq.places(id_), rq.status(id_)) == (["queue"], "queued")


def test_what_a_plain_worker_is_at_is_left_to_it(
    maintenance: QueueMaintenance, redis: Redis, rq: RqView
) -> None:
    id_ = start_in_a_plain_worker(redis, score=time.time() + 60)
    maintenance.run()
    assert rq.places(id_) == ["started"]


def test_what_our_own_workers_hold_is_left_to_them(
    maintenance: QueueMaintenance, redis: Redis, rq: RqView
) -> None:
    """Though a plain worker had abandoned it before."""
    id_ = start_in_a_plain_worker(redis)
    redis.rpush(rq_format.QUEUE_KEY, id_)
    ReservedJobs(redis, "ours").settle_and_take([], 10)
    maintenance.run()
    assert rq.places(id_) == ["started", "reserved"]
    assert redis.zrange(rq_format.STARTED_KEY, 0, -1) == [f"{id_}:ours".encode()]


@pytest.mark.parametrize("status", ["finished", "failed", "queued", "scheduled", "canceled", "stopped"])
def test_an_entry_that_a_job_left_behind_only_goes(
    status: str, maintenance: QueueMaintenance, redis: Redis, rq: RqView
) -> None:
    id_ = start_in_a_plain_worker(redis)
    redis.hset(rq_format.JOB_PREFIX + id_, "status", status)
    maintenance.run()
    assert rq.places(id_) == []
    assert rq.status(id_) == status


@pytest.mark.parametrize("entry", [b"gone:an-execution", b"gone", b"", b":", b"a:b:c:d", b"\xff\x00:\xfe"])
def test_an_entry_without_a_job_only_goes(entry: bytes, maintenance: QueueMaintenance, redis: Redis) -> None:
    redis.zadd(rq_format.STARTED_KEY, {entry: LONG_AGO})
    maintenance.run()
    assert redis.zcard(rq_format.STARTED_KEY) == 0
    assert redis.llen(rq_format.QUEUE_KEY) == 0


def test_an_entry_whose_job_is_no_hash_stops_nothing(
    maintenance: QueueMaintenance, redis: Redis, rq: RqView
) -> None:
    redis.set(f"{rq_format.JOB_PREFIX}text", "no hash")
    redis.zadd(rq_format.STARTED_KEY, {"text:an-execution": 0})
    redis.rpush(rq_format.INTERMEDIATE_KEY, "text")
    id_ = start_in_a_plain_worker(redis)
    maintenance.run()
    assert rq.queue.get_job_ids() == [id_]
    assert redis.llen(rq_format.INTERMEDIATE_KEY) == 0


def test_what_is_stuck_between_queue_and_start_is_put_back_after_a_while(
    maintenance: QueueMaintenance, redis: Redis, rq: RqView
) -> None:
    id_ = leave_in_the_intermediate_queue(redis)
    maintenance.run()
    maintenance.run()
    assert rq.places(id_) == []
    redis.zincrby(SEEN_KEY, -STUCK_AFTER_S, id_)
    maintenance.run()
    maintenance.run()
    assert rq.places(id_) == ["queue"]
    assert redis.exists(rq_format.INTERMEDIATE_KEY, SEEN_KEY) == 0


def test_a_job_that_was_only_passing_is_forgotten(maintenance: QueueMaintenance, redis: Redis) -> None:
    """Seen once on its way, and hours later on its way again: it is not stuck."""
    leave_in_the_intermediate_queue(redis)
    maintenance.run()
    redis.delete(rq_format.INTERMEDIATE_KEY)
    maintenance.run()
    assert redis.exists(SEEN_KEY) == 0


def test_what_a_plain_worker_has_started_is_not_stuck(redis: Redis, rq: RqView) -> None:
    id_ = start_in_a_plain_worker(redis, score=time.time() + 60)
    redis.rpush(rq_format.INTERMEDIATE_KEY, id_)
    for _ in range(2):
        QueueMaintenance(rq.queue, stuck_after_s=0).run()
    assert rq.places(id_) == ["started"]
    assert redis.llen(rq_format.INTERMEDIATE_KEY) == 1


def test_what_is_stuck_without_a_job_behind_it_goes(maintenance: QueueMaintenance, redis: Redis) -> None:
    redis.rpush(rq_format.INTERMEDIATE_KEY, "gone", b"\xff\x00")
    maintenance.run()
    assert redis.exists(rq_format.INTERMEDIATE_KEY, rq_format.QUEUE_KEY) == 0


def test_a_script_is_loaded_anew_into_a_redis_that_has_forgotten_it(
    maintenance: QueueMaintenance, redis: Redis, rq: RqView
) -> None:
    maintenance.run()
    redis.script_flush()
    id_ = start_in_a_plain_worker(redis)
    maintenance.run()
    assert rq.places(id_) == ["queue"]


@contextmanager
def plain_worker(redis_url: str, name: str) -> Iterator["subprocess.Popen[bytes]"]:
    """Run RQ's own worker in a process group of its own, which is gone after the block."""
    command = ["rq.cli", "worker", "clerk", "--url", redis_url, "--name", name, "--serializer", "json"]
    worker = subprocess.Popen(
        [sys.executable, "-m", *command, "--worker-class", "rq.worker.SimpleWorker"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        cwd=ROOT,
    )
    try:
        yield worker
    finally:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()


def test_what_a_killed_rq_worker_had_started_is_put_back(
    maintenance: QueueMaintenance, redis: Redis, redis_url: str, rq: RqView
) -> None:
    """With RQ itself writing what is read here; its time-out is then made to be over."""
    job = Queue("clerk", connection=redis, serializer="json").enqueue("time.sleep", 60, job_id="asleep")

    def has_begun() -> bool:
        return bool(job.get_status() == JobStatus.STARTED and redis.zcard(rq_format.STARTED_KEY) == 1)

    with plain_worker(redis_url, "killed"):
        wait_until(has_begun, START_S)
        maintenance.run()
        assert rq.places("asleep") == ["started"]
    entries: Any = redis.zrange(rq_format.STARTED_KEY, 0, -1, withscores=True)
    [(entry, score)] = entries
    assert entry.startswith(b"asleep:")
    assert time.time() < score < time.time() + 600
    redis.zadd(rq_format.STARTED_KEY, {entry: LONG_AGO})
    maintenance.run()
    assert rq.places("asleep") == ["queue"]
    assert Job.fetch("asleep", connection=redis, serializer="json").get_status() == JobStatus.QUEUED

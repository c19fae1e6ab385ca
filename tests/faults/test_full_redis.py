"""A full Redis: it accepts no deliveries, and workers still apply those it holds, which frees memory."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from redis import Redis

from tests.faults.chaos import PROPER_ANSWERS, await_settled, compare
from tests.faults.conftest import are_known
from tests.faults.random_histories import some_deliveries
from tests.faults.servers import Servers
from tests.faults.service import Service
from tests.faults.svix import Svix
from tests.support.queue import RqView, beat, delivery
from tests.support.reserved_jobs import fill, settle, take
from tests.support.stack import environment
from tests.support.supervised_process import has_begun, running, supervised_worker
from tests.support.waiting import wait_until
from worker.queue.consumer import CONSUMERS_KEY, Failed, Finished, ReservedJobs
from worker.queue.producer import DeliveryQueue
from worker.queue.rq_format import FINISHED_KEY, JOB_PREFIX, SUSPENDED_KEY
from worker.redis_client import QueueUnavailable
from worker.runner.batch_worker import IDLE_BEAT_EVERY_S
from worker.shutdown import StopSignal

ROOM_BYTES = 700_000  # for some two hundred deliveries
SOON_S = 40
SETTLED_WITHIN_S = 120


@pytest.fixture
def apart(servers: Servers) -> Iterator[Redis]:
    """A logical database without workers, for a worker's steps one by one."""
    with servers.client(15) as client:
        client.flushdb()
        yield client


@contextmanager
def full(client: Redis, room: int = 0) -> Iterator[None]:
    """Leave Redis no more room than that many bytes, for the length of the block."""
    used: Any = client.info("memory")["used_memory"]
    client.config_set("maxmemory", used + room if room else 1)
    try:
        yield
    finally:
        client.config_set("maxmemory", 0)


def test_more_goes_through_a_full_redis_than_it_can_hold_also_by_a_worker_that_starts_then(
    service: Service, directory: Path
) -> None:
    deliveries = some_deliveries(101, 500)
    late = supervised_worker("late", environment(service.settings), directory)
    with Svix(service.ports, Random(1)) as svix, full(service.redis, ROOM_BYTES):
        service.redis.set(SUSPENDED_KEY, 1)
        svix.send(deliveries)
        wait_until(lambda: svix.answers["503"] > 20, SOON_S)
        with running(late):
            wait_until(lambda: has_begun(late), SOON_S, late.text)
            service.redis.delete(SUSPENDED_KEY)
            await_settled(service, svix, SETTLED_WITHIN_S)
            wait_until(lambda: late.pid in {known.pid for known in RqView(service.redis).workers()}, SOON_S)
    # 200: Redis had the delivery, but its answer was late
    assert {"202", "503"} <= set(svix.answers) <= PROPER_ANSWERS
    compare(service.settings, deliveries)


def test_workers_stay_known_in_a_full_redis(service: Service) -> None:
    with full(service.redis):
        time.sleep(2 * IDLE_BEAT_EVERY_S)
        latest: Any = service.redis.zrange(CONSUMERS_KEY, 0, -1, withscores=True)
        now: Any = service.redis.time()
        assert all(score > now[0] - 2 * IDLE_BEAT_EVERY_S for _, score in latest)
        # a consumer is a worker, or one of its threads
        assert {name.partition(b".")[0].decode() for name, _ in latest} == {
            worker.name for worker in RqView(service.redis).workers()
        }
        assert are_known(service)


@pytest.fixture
def queue(apart: Redis) -> Iterator[DeliveryQueue]:
    with closing(DeliveryQueue(apart)) as receiver:
        yield receiver


@pytest.fixture
def held(apart: Redis) -> ReservedJobs:
    return ReservedJobs(apart, "another")


def test_every_step_of_a_worker_works_in_a_full_redis(
    apart: Redis, queue: DeliveryQueue, held: ReservedJobs
) -> None:
    ids, rq = fill(apart, 6), RqView(apart)
    with full(apart):
        with pytest.raises(QueueUnavailable):
            queue.enqueue(delivery())
        jobs = take(held, 4)
        assert [job.id for job in jobs] == ids[:4]
        failed = [Failed(jobs[i], "reason", "trace", retryable=i == 2) for i in (1, 2)]
        settle(held, Finished(jobs[0], "applied"), *failed)
        beat(apart, "another")
        assert held.wait(1, StopSignal()) is True
        assert held.release() == 1
        assert len(take(held, 2)) == 2
        held.leave()
    assert [rq.places(id_) for id_ in ids] == [[], ["failed"], ["scheduled"], *[["queue"]] * 3]


def test_what_was_finished_longest_ago_is_forgotten_first_and_nothing_else(
    apart: Redis, held: ReservedJobs
) -> None:
    ids, rq = fill(apart, 30), RqView(apart)
    settle(held, *(Finished(job, "applied") for job in take(held, 20)))
    for number, id_ in enumerate(ids[:20]):
        apart.zadd(FINISHED_KEY, {id_: 2_000_000_000 + number})
    # A finished job's hash has expired, and it was queued again before RQ cleans the registry
    apart.delete(JOB_PREFIX + ids[0])
    apart.hset(JOB_PREFIX + ids[0], mapping={"data": "a body", "status": "queued"})
    with full(apart):
        assert [job.id for job in take(held, 5)] == ids[20:25]
    assert rq.ids("finished") == ids[11:20]
    assert rq.fields(ids[0]) == {b"data": b"a body", b"status": b"queued"}
    assert [apart.exists(JOB_PREFIX + id_) for id_ in ids[1:20]] == [0] * 10 + [1] * 9
    assert take(held, 5)
    assert rq.ids("finished") == ids[11:20], "there is room again"


def test_what_a_worker_held_before_redis_set_its_clock_back_is_taken_back(
    apart: Redis, held: ReservedJobs
) -> None:
    fill(apart, 3)
    take(held, 3)
    apart.zadd(CONSUMERS_KEY, {"another": time.time() + 3600})
    assert beat(apart, "other").released == 3
    assert len(take(ReservedJobs(apart, "other"), 5)) == 3

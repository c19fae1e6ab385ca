"""A list or registry that Redis lost: its jobs are put back, and nothing else moves."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from redis import Redis

from cli.dev.servers import RedisServer
from tests.support.queue import RqView, beat, delivery, enqueue, put
from tests.support.reserved_jobs import failure, settle, take
from worker.queue import rq_format
from worker.queue.consumer import CONSUMERS_KEY, RESERVED_PREFIX, Finished, ReservedJobs
from worker.queue.failed_jobs import FailedJobs, ReplayResult
from worker.queue.maintenance import SEARCH_KEY, QueueMaintenance
from worker.queue.producer import DeliveryQueue, EnqueueResult
from worker.runner.batch_worker import MAX_CONSUMERS

LONG_AGO = "2026-01-01T00:00:00.000000Z"
LAST_THREAD = f".{MAX_CONSUMERS}"


@pytest.fixture
def maintenance(rq: RqView) -> QueueMaintenance:
    return QueueMaintenance(rq.queue)


def started(redis: Redis, part: str = "") -> str:
    id_ = enqueue(redis)
    assert len(take(ReservedJobs(redis, "w", part))) == 1
    redis.hset(rq_format.JOB_PREFIX + id_, "started_at", LONG_AGO)
    return id_


def started_by_the_last_thread(redis: Redis) -> str:
    return started(redis, LAST_THREAD)


def failed(redis: Redis, *, retryable: bool = False) -> str:
    id_, reserved = enqueue(redis), ReservedJobs(redis, "w")
    settle(reserved, *(failure(job, retryable=retryable) for job in take(reserved)))
    return id_


def scheduled(redis: Redis) -> str:
    return failed(redis, retryable=True)


def finish(reserved: ReservedJobs) -> None:
    """Take what is queued, and finish it."""
    settle(reserved, *(Finished(job, "applied") for job in take(reserved)))


LOST: dict[str, tuple[Callable[[Redis], str], str]] = {
    "the queue": (enqueue, rq_format.QUEUE_KEY),
    "a reserved list": (started, f"{RESERVED_PREFIX}w"),
    "that of a worker's last thread": (started_by_the_last_thread, f"{RESERVED_PREFIX}w{LAST_THREAD}"),
    "the scheduled registry": (scheduled, rq_format.SCHEDULED_KEY),
    "the consumers, of which one is dead": (started, CONSUMERS_KEY),
}


@pytest.mark.parametrize(("make", "key"), LOST.values(), ids=LOST.keys())
def test_a_job_whose_list_is_lost_is_queued_again_once(
    make: Callable[[Redis], str], key: str, redis: Redis, rq: RqView, maintenance: QueueMaintenance
) -> None:
    id_ = make(redis)
    redis.delete(key)
    assert maintenance.recover_lost() == 1
    assert maintenance.recover_lost() == 0
    assert "queue" in rq.places(id_)
    assert rq.status(id_) == "queued"
    finish(ReservedJobs(redis, "other"))
    assert rq.status(id_) == "finished"
    assert rq.ids("started") == []


@pytest.mark.parametrize(("make", "key"), LOST.values(), ids=LOST.keys())
def test_replaying_a_job_whose_list_is_lost_puts_it_back_at_once(
    make: Callable[[Redis], str], key: str, redis: Redis, rq: RqView
) -> None:
    id_ = make(redis)
    redis.delete(key)
    jobs = FailedJobs(redis)
    assert list(jobs.replay([id_, id_])) == [(id_, ReplayResult.REPLAYED), (id_, ReplayResult.NOT_FAILED)]
    assert rq.queue.get_job_ids() == [id_]
    assert rq.status(id_) == "queued"


def test_a_failed_job_whose_registry_is_lost_is_in_the_registry_again(
    redis: Redis, rq: RqView, maintenance: QueueMaintenance
) -> None:
    id_ = failed(redis)
    redis.delete(rq_format.FAILED_KEY)
    assert maintenance.recover_lost() == 1
    assert rq.places(id_) == ["failed"]
    expires: Any = redis.zscore(rq_format.FAILED_KEY, id_)
    assert expires == pytest.approx(time.time() + rq_format.FAILURE_TTL_S, abs=5)
    assert [job.id for job in FailedJobs(redis).newest()] == [id_]


class SearchedMeanwhile(Redis):
    """A client of RQ's, during whose `rq requeue` lost jobs are searched.

    RQ removes a job from the failed registry, asks which server it is, and then queues the job.
    """

    def info(self, *args: Any, **kwargs: Any) -> Any:
        QueueMaintenance(RqView(self).queue).recover_lost()
        return super().info(*args, **kwargs)


def test_a_job_that_rq_requeues_while_lost_jobs_are_searched_is_not_listed_as_failed(
    redis: Redis, rq: RqView, maintenance: QueueMaintenance
) -> None:
    id_ = failed(redis)
    with SearchedMeanwhile(connection_pool=redis.connection_pool) as client:
        RqView(client).registries["failed"].requeue(id_)
    finish(ReservedJobs(redis, "w"))
    maintenance.recover_lost()
    assert rq.places(id_) == ["finished"]


def test_a_started_registry_that_is_lost_stops_no_worker(
    redis: Redis, rq: RqView, maintenance: QueueMaintenance
) -> None:
    id_ = started(redis)
    redis.delete(rq_format.STARTED_KEY)
    assert maintenance.recover_lost() == 0
    finish(ReservedJobs(redis, "w"))
    assert rq.status(id_) == "finished"


@pytest.mark.parametrize("make", [enqueue, started, scheduled, failed])
def test_a_job_that_is_where_it_should_be_stays_there(
    make: Callable[[Redis], str], redis: Redis, rq: RqView, maintenance: QueueMaintenance
) -> None:
    id_ = make(redis)
    places, fields = rq.places(id_), rq.fields(id_)
    assert maintenance.recover_lost() == 0
    assert (rq.places(id_), rq.fields(id_)) == (places, fields)


def test_a_job_on_its_way_to_a_plain_worker_or_with_it_is_left_to_it(
    redis: Redis, maintenance: QueueMaintenance
) -> None:
    waiting, running = enqueue(redis), enqueue(redis)
    redis.delete(rq_format.QUEUE_KEY)
    redis.rpush(rq_format.INTERMEDIATE_KEY, waiting)
    redis.hset(rq_format.JOB_PREFIX + running, mapping={"status": "started", "started_at": LONG_AGO})
    redis.zadd(rq_format.STARTED_KEY, {f"{running}:an-execution": time.time() + 60})
    assert maintenance.recover_lost() == 0


def test_what_was_queued_or_started_just_now_is_left_alone(
    redis: Redis, rq: RqView, maintenance: QueueMaintenance
) -> None:
    id_ = enqueue(redis)
    now = rq_format.timestamp(rq.job(id_).created_at.now().astimezone())
    redis.hset(rq_format.JOB_PREFIX + id_, mapping={"enqueued_at": now})
    redis.delete(rq_format.QUEUE_KEY)
    assert maintenance.recover_lost() == 0


def test_jobs_of_other_queues_and_odd_keys_stay_as_they_are(
    redis: Redis, maintenance: QueueMaintenance
) -> None:
    redis.hset(f"{rq_format.JOB_PREFIX}other", mapping={"status": "queued", "origin": "mail", "data": "x"})
    redis.hset(f"{rq_format.JOB_PREFIX}bare", mapping={"status": "queued"})
    redis.set(f"{rq_format.JOB_PREFIX}text", "no hash")
    redis.hset(b"rq:job:\xff\x00", mapping={"status": "queued"})
    assert maintenance.recover_lost() == 0
    assert redis.exists(rq_format.QUEUE_KEY) == 0


def test_lost_jobs_are_found_behind_newer_ones_and_no_others(
    redis: Redis, rq: RqView, maintenance: QueueMaintenance
) -> None:
    ids = [enqueue(redis) for _ in range(30)]
    redis.delete(rq_format.QUEUE_KEY)
    newer = delivery(received_at=1_790_000_000_000)
    put(redis, newer)
    assert maintenance.recover_lost() == 30
    assert sorted(rq.queue.get_job_ids()) == sorted([newer.svix_id, *ids])


def test_maintenance_searches_once_in_a_while(
    redis: Redis, rq: RqView, maintenance: QueueMaintenance
) -> None:
    id_ = enqueue(redis)
    redis.delete(rq_format.QUEUE_KEY)
    maintenance.run()
    assert rq.places(id_) == ["queue"]
    redis.delete(rq_format.QUEUE_KEY)
    redis.hset(rq_format.JOB_PREFIX + id_, "enqueued_at", LONG_AGO)
    QueueMaintenance(rq.queue).run()
    assert rq.places(id_) == [], "another worker has just searched"
    redis.delete(SEARCH_KEY)
    QueueMaintenance(rq.queue).run()
    assert rq.places(id_) == ["queue"]


def test_a_redis_that_evicts_keys_loses_no_delivery_that_comes_again(own_redis: RedisServer) -> None:
    redis = Redis.from_url(own_redis.url)
    rq, queue = RqView(redis), DeliveryQueue(redis)
    given = [delivery() for _ in range(400)]
    for one in given:
        queue.enqueue(one)
    used: Any = redis.info("memory")["used_memory"]
    redis.config_set("maxmemory-policy", "allkeys-lru")
    redis.config_set("maxmemory", used - 300_000)
    for _ in range(50):
        redis.ping()
        redis.set("filling", "x" * 1000)
    redis.config_set("maxmemory", 0)
    redis.delete(rq_format.QUEUE_KEY)
    answers = {queue.enqueue(one) for one in given}
    assert answers == {EnqueueResult.DUPLICATE, EnqueueResult.QUEUED}
    QueueMaintenance(rq.queue).recover_lost()
    beat(redis)
    assert sorted(rq.queue.get_job_ids()) == sorted(one.svix_id for one in given)
    redis.close()

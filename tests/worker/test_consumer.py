import json
import pickle
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import SecretStr
from redis import Redis
from rq.exceptions import NoSuchJobError
from rq.intermediate_queue import IntermediateQueue
from rq.job import Job
from rq.registry import clean_registries
from rq.results import Result
from rq.scheduler import RQScheduler
from rq.worker import SimpleWorker
from structlog.testing import capture_logs

from tests.support.queue import RqView, beat, commands, delivery, enqueue, put_job, rq_command
from tests.support.reserved_jobs import (
    MakeConsumer,
    fail_for_good,
    failure,
    fall_silent,
    fill,
    ids,
    scores,
    settle,
    take,
)
from tests.support.round_trips import TripCounter
from tests.support.settings import NO_DATABASE, MakeSettings
from worker.queue import consumer as queue_module
from worker.queue import rq_format
from worker.queue.consumer import (
    CONSUMERS_KEY,
    DEAD_AFTER_S,
    RESERVED_PREFIX,
    Deferred,
    Failed,
    Finished,
    ReservedJobs,
)
from worker.queue.heartbeat import FORGET_AFTER_S
from worker.queue.lock_waits import DEFER_S, KEY, LockWaits, lock_waits
from worker.queue.producer import DeliveryQueue
from worker.queue.rq_format import (
    FAILURE_TTL_S,
    QUEUE_KEY,
    RESULT_TTL_S,
    RETRY_INTERVALS_S,
    SCHEDULED_KEY,
    decode_call,
)
from worker.redis_client import worker_redis
from worker.shutdown import StopSignal


def test_a_taken_job_has_what_was_enqueued(queue: DeliveryQueue, reserved: ReservedJobs) -> None:
    queue.enqueue(given := delivery())
    (job,) = take(reserved)
    assert decode_call(job.data) == given.body
    assert job.created_at == "2026-01-01T10:00:00.000000Z"
    assert (job.retries_left, job.retry_intervals, job.meta) == (3, RETRY_INTERVALS_S, {})


def test_rq_sees_a_taken_job_as_started(rq: RqView, reserved: ReservedJobs) -> None:
    (id_,) = fill(rq.redis, 1)
    take(reserved)
    job = rq.job(id_)
    assert rq.places(id_) == ["started", "reserved"]
    assert rq.queue.started_job_registry.get_job_and_execution_ids() == [(id_, "w")]
    assert (job.get_status(), job.worker_name, job.is_started) == ("started", "w", True)
    assert job.started_at is not None
    assert abs(job.started_at - datetime.now(UTC)) < timedelta(seconds=10)


def test_a_lost_answer_to_a_take_returns_the_same_jobs(reserved: ReservedJobs) -> None:
    queued = fill(reserved.redis, 5)
    assert [ids(take(reserved, 3)) for _ in range(3)] == [queued[:3]] * 3
    assert ids(take(reserved, 5)) == queued


def test_a_lost_answer_to_finishing_finishes_nothing_twice(rq: RqView, reserved: ReservedJobs) -> None:
    (id_,) = fill(rq.redis, 1)
    register(rq, "w")
    done = [Finished(job, "applied") for job in take(reserved)]
    settle(reserved, *done)
    settle(reserved, *done)
    assert rq.places(id_) == ["finished"]
    assert [worker.successful_job_count for worker in rq.workers()] == [1]


def test_a_batch_ends_at_so_many_bytes(reserved: ReservedJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    queued = fill(reserved.redis, 5)
    (first,) = take(reserved, 1)
    monkeypatch.setattr(queue_module, "MAX_BATCH_BYTES", 2 * len(first.data))
    assert ids(take(reserved)) == queued[:2]
    monkeypatch.setattr(queue_module, "MAX_BATCH_BYTES", 1)
    assert ids(take(reserved)) == queued[:1], "one job is taken, however large"


def test_nothing_is_taken_while_workers_are_suspended(
    rq: RqView, reserved: ReservedJobs, redis_url: str
) -> None:
    queued = fill(rq.redis, 3)
    jobs = take(reserved, 2)
    rq_command(redis_url, "suspend")
    assert reserved.settle_and_take([Finished(jobs[0], "applied")], 2) is None
    assert rq.status(queued[0]) == "finished", "what was in hand is settled all the same"
    rq_command(redis_url, "resume")
    assert ids(take(reserved)) == queued[1:]


def test_waiting_ends_when_a_job_comes_and_holds_it(reserved: ReservedJobs) -> None:
    assert reserved.wait(1, StopSignal()) is False
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(reserved.wait, 10, StopSignal())
        time.sleep(0.1)
        queued = fill(reserved.redis, 2)
        assert waiting.result(5) is True
    assert ids(take(reserved)) == queued


def test_waiting_ends_at_once_on_a_stop_signal_and_loses_no_job(rq: RqView, reserved: ReservedJobs) -> None:
    stopping = StopSignal()
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(reserved.wait, 10, stopping)
        time.sleep(0.1)
        stopping.request()
        assert waiting.result(5) is True
    queued = fill(rq.redis, 1)  # Redis may not have noticed yet that the connection is closed
    reserved.leave()
    assert rq.queue.get_job_ids() == queued


def test_an_idle_heartbeat_is_five_commands_and_says_when_there_is_more_to_do(redis: Redis) -> None:
    beat(redis, "w")
    redis.config_resetstat()
    assert beat(redis, "w").wait_s == DEAD_AFTER_S
    assert sum(commands(redis).values()) == 5, commands(redis)
    redis.zadd(rq_format.SCHEDULED_KEY, {"due-soon": time.time() + 10})
    assert 3 <= beat(redis, "w").wait_s <= 11
    redis.zadd(CONSUMERS_KEY, {"nearly-dead": time.time() - DEAD_AFTER_S + 5})
    assert 1 <= beat(redis, "w").wait_s <= 6


def test_while_a_scheduler_of_rqs_has_its_lock_the_retries_are_its_own(rq: RqView) -> None:
    (id_,) = fill(rq.redis, 1)
    rq.redis.delete(rq_format.QUEUE_KEY)
    rq.redis.hset(rq_format.JOB_PREFIX + id_, "status", "scheduled")
    rq.redis.zadd(rq_format.SCHEDULED_KEY, {id_: 1})
    scheduler = RQScheduler([rq.queue], connection=rq.redis, serializer="json", logging_level="WARNING")
    assert scheduler.acquire_locks() == {"clerk"}
    assert beat(rq.redis).retried == 0
    scheduler.stop()
    assert beat(rq.redis).retried == 1
    assert rq.places(id_) == ["queue"]


def test_taking_and_settling_is_one_round_trip_however_many_jobs(
    redis: Redis, make_settings: MakeSettings, redis_url: str
) -> None:
    with TripCounter(redis_url) as counter:
        client = worker_redis(make_settings(**NO_DATABASE, redis_url=SecretStr(counter.url)))
        reserved = ReservedJobs(client, "w")
        settle(reserved)
        for size in (1, 10, 100):
            fill(redis, size)
            with counter.counting() as trips:
                jobs = take(reserved)
            done: list[Failed | Finished] = [failure(jobs[0])]
            done += [Finished(job, "applied") for job in jobs[1:]]
            fill(redis, size)
            with counter.counting() as more_trips:
                more = reserved.settle_and_take(done, size)
            assert (len(jobs), len(ids(more))) == (size, size)
            assert (trips.count, more_trips.count) == (1, 1)
            reserved.leave()
            redis.delete(rq_format.QUEUE_KEY)
        client.close()


def test_rq_sees_a_finished_job_as_finished_for_an_hour(rq: RqView, reserved: ReservedJobs) -> None:
    (id_,) = fill(rq.redis, 1)
    register(rq, "w")
    settle(reserved, *(Finished(job, "applied") for job in take(reserved)))
    job = rq.job(id_)
    assert rq.places(id_) == ["finished"]
    assert (job.get_status(), job.is_finished, job.worker_name) == ("finished", True, "w")
    assert (job.latest_result(), job.return_value()) == (None, None), "the ledger has the outcome"
    assert job.ended_at is not None
    assert job.started_at is not None
    assert job.started_at <= job.ended_at
    (worker,) = rq.workers()
    assert (worker.successful_job_count, worker.failed_job_count) == (1, 0)
    assert RESULT_TTL_S - 5 <= float(str(rq.redis.ttl(Job.key_for(id_)))) <= RESULT_TTL_S
    assert rq.redis.exists(Result.get_key(id_)) == 0
    (expires,) = scores(rq.redis, rq_format.FINISHED_KEY).values()
    assert abs(expires - time.time() - RESULT_TTL_S) < 5


def test_what_no_waiting_heals_fails_at_once_and_rq_shows_it_for_ninety_days(
    rq: RqView, reserved: ReservedJobs
) -> None:
    register(rq, "w")
    id_ = fail_for_good(reserved)
    job = rq.job(id_)
    assert rq.places(id_) == ["failed"]
    assert (job.get_status(), job.is_failed) == ("failed", True)
    assert job.retries_left == len(RETRY_INTERVALS_S)
    result = job.latest_result()
    assert result is not None
    assert (result.type, result.exc_string) == (Result.Type.FAILED, "Traceback\nUnreadable")
    assert job._exc_info == "Traceback\nUnreadable"
    assert job.ended_at is not None
    (worker,) = rq.workers()
    assert (worker.successful_job_count, worker.failed_job_count) == (0, 1)
    meta = job.meta
    assert (meta["reason"], meta["attempts"]) == ("Unreadable: the event is not a JSON object", 1)
    assert meta["first_failed_at"] == meta["failed_at"]
    assert abs(rq_format.parse_timestamp(meta["failed_at"]) - datetime.now(UTC)) < timedelta(seconds=10)
    assert FAILURE_TTL_S >= 90 * 24 * 3600
    for key in (Job.key_for(id_), Result.get_key(id_)):
        assert FAILURE_TTL_S - 5 <= float(str(rq.redis.ttl(key))) <= FAILURE_TTL_S
    (expires,) = scores(rq.redis, rq_format.FAILED_KEY).values()
    assert abs(expires - time.time() - FAILURE_TTL_S) < 5
    clean_registries(rq.queue)
    assert rq.places(id_) == ["failed"]


def test_what_can_heal_is_scheduled_with_growing_intervals_and_then_fails(
    rq: RqView, reserved: ReservedJobs
) -> None:
    (id_,) = fill(rq.redis, 1)
    for left, interval in zip((2, 1, 0), RETRY_INTERVALS_S, strict=True):
        (job,) = take(reserved)
        settle(reserved, failure(job, retryable=True))
        assert (rq.places(id_), rq.status(id_)) == (["scheduled"], "scheduled")
        assert rq.job(id_).retries_left == left
        assert rq.redis.ttl(Job.key_for(id_)) == -1
        due = rq.registries["scheduled"].get_scheduled_time(id_)  # type: ignore[attr-defined] # a ScheduledJobRegistry
        assert abs(due - datetime.now(UTC) - timedelta(seconds=interval)) < timedelta(seconds=5)
        make_due(rq)
    (job,) = take(reserved)
    settle(reserved, failure(job, retryable=True))
    assert (rq.places(id_), rq.status(id_)) == (["failed"], "failed")
    assert rq.job(id_).meta["attempts"] == len(RETRY_INTERVALS_S) + 1


@pytest.mark.parametrize("ahead_s", [-600, 600])
def test_a_job_is_due_by_the_clock_of_redis_whatever_that_of_the_worker_says(
    ahead_s: int, reserved: ReservedJobs, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused, locked = fill(redis, 2)
    real_time, now = time.time, time.time()
    monkeypatch.setattr(time, "time", lambda: real_time() + ahead_s)
    first, second = take(reserved)
    reserved.settle_and_take([failure(first, retryable=True), Deferred(second, "locked")], 0)
    assert scores(redis, SCHEDULED_KEY) == {
        refused: pytest.approx(now + RETRY_INTERVALS_S[0], abs=5),
        locked: pytest.approx(now + DEFER_S, abs=5),
    }
    assert scores(redis, KEY) == {locked: pytest.approx(now, abs=5)}
    assert lock_waits(redis).longest_s < 5


def make_due(rq: RqView) -> None:
    """Let what is scheduled be due now, and let RQ's own scheduler enqueue it."""
    for id_ in rq.ids("scheduled"):
        rq.redis.zadd(rq_format.SCHEDULED_KEY, {id_: 1})
    scheduler = RQScheduler([rq.queue], connection=rq.redis, serializer="json", logging_level="WARNING")
    scheduler.acquire_locks()
    scheduler.enqueue_scheduled_jobs()
    scheduler.release_locks()
    scheduler.connection.close()


# Who holds what


def test_a_job_that_waits_for_a_lock_comes_again_with_all_its_retries_and_is_counted_since_when(
    rq: RqView, reserved: ReservedJobs
) -> None:
    id_ = enqueue(rq.redis)
    began = time.time()
    for _ in range(2):
        (job,) = take(reserved)
        reserved.settle_and_take([Deferred(job, "locked")], 0)
        assert rq.places(id_) == ["scheduled"]
        assert rq.job(id_).retries_left == len(RETRY_INTERVALS_S)
        waits = lock_waits(rq.redis)
        assert waits.jobs == 1
        assert waits.since is not None
        assert began - 1 < waits.since.timestamp() <= time.time()
        assert 0 <= waits.longest_s < 60
        rq.redis.zrem(SCHEDULED_KEY, id_)
        rq.redis.rpush(QUEUE_KEY, id_)
        first = waits.since
    (job,) = take(reserved)
    assert job.has_waited
    assert lock_waits(rq.redis)[:2] == (1, first), "since the first time"
    reserved.settle_and_take([Finished(job, "applied")], 0)
    assert rq.redis.zcard(KEY) == 0
    assert lock_waits(rq.redis) == LockWaits(0, None, 0)


def test_a_job_that_waited_and_was_finished_or_deleted_by_others_is_forgotten(redis: Redis) -> None:
    redis.zadd(KEY, {"gone": 1})
    assert lock_waits(redis) == LockWaits(0, None, 0)
    assert redis.zcard(KEY) == 0


def test_what_is_given_back_stands_at_the_front_in_its_order(rq: RqView, reserved: ReservedJobs) -> None:
    queued = fill(rq.redis, 5)
    take(reserved, 3)
    assert reserved.release() == 3
    assert rq.queue.get_job_ids() == queued
    assert [rq.places(id_) for id_ in queued] == [["queue"]] * 5
    assert [rq.status(id_) for id_ in queued] == ["queued"] * 5
    assert reserved.release() == 0


def test_a_worker_that_leaves_holds_nothing_and_is_no_member(rq: RqView, reserved: ReservedJobs) -> None:
    queued = fill(rq.redis, 2)
    take(reserved)
    reserved.leave()
    assert rq.queue.get_job_ids() == queued
    assert scores(rq.redis, CONSUMERS_KEY) == {}
    assert rq.redis.keys(f"{RESERVED_PREFIX}*") == []


def test_only_what_silent_workers_hold_is_taken_back(rq: RqView, consumer: MakeConsumer) -> None:
    queued = fill(rq.redis, 6)
    alive, silent, other = consumer("alive"), consumer("silent"), consumer("other")
    for reserved in (alive, silent, other):
        take(reserved, 2)
    fall_silent(rq.redis, "silent")
    fall_silent(rq.redis, "alive")  # but it beats
    assert beat(rq.redis, "alive").released == 2
    assert [rq.places(id_) for id_ in queued] == [
        *[["started", "reserved"]] * 2,
        *[["queue"]] * 2,
        *[["started", "reserved"]] * 2,
    ]
    assert beat(rq.redis, "alive").released == 0


def test_a_frozen_worker_that_wakes_does_not_finish_what_others_have(
    rq: RqView, consumer: MakeConsumer
) -> None:
    queued = fill(rq.redis, 3)
    frozen, other = consumer("frozen"), consumer("other")
    jobs = take(frozen)
    fall_silent(rq.redis, "frozen")
    beat(rq.redis, "other")
    assert ids(take(other, 2)) == queued[:2]
    settle(frozen, Finished(jobs[0], "applied"), failure(jobs[1]), failure(jobs[2], retryable=True))
    assert [rq.places(id_) for id_ in queued] == [["started", "reserved"], ["started", "reserved"], ["queue"]]
    assert [rq.status(id_) for id_ in queued] == ["started", "started", "queued"]
    assert [rq.job(id_).meta for id_ in queued] == [{}, {}, {}]
    settle(other, *(Finished(job, "applied") for job in take(other, 2)))
    assert [rq.status(id_) for id_ in queued] == ["finished", "finished", "queued"]
    assert ids(take(frozen)) == queued[2:], "and goes on with what is there"


def test_a_worker_that_sleeps_for_days_may_take_again_and_is_taken_back_from(
    rq: RqView, consumer: MakeConsumer
) -> None:
    sleeper = consumer("sleeper")
    rq.redis.zadd(CONSUMERS_KEY, {"sleeper": time.time() - 2 * FORGET_AFTER_S})
    beat(rq.redis, "other")
    assert scores(rq.redis, CONSUMERS_KEY).keys() == {"other"}
    (id_,) = fill(rq.redis, 1)
    take(sleeper)
    fall_silent(rq.redis, "sleeper")
    assert beat(rq.redis, "other").released == 1
    assert rq.places(id_) == ["queue"]


@pytest.mark.parametrize("size", [1, 7, 100])
def test_many_workers_share_the_queue_and_each_job_is_one_workers(
    size: int, rq: RqView, make_settings: MakeSettings
) -> None:
    queued = fill(rq.redis, 200)

    def work(name: str) -> list[str]:
        client = worker_redis(make_settings(**NO_DATABASE))
        reserved = ReservedJobs(client, name)
        done: list[Finished] = []
        taken: list[str] = []
        while jobs := reserved.settle_and_take(done, size):
            done = [Finished(job, "applied") for job in jobs]
            taken += ids(jobs)
        client.close()
        return taken

    with ThreadPoolExecutor(4) as threads:
        taken = [id_ for ids_ in threads.map(work, "abcd") for id_ in ids_]
    assert sorted(taken) == sorted(queued)
    assert sorted(rq.ids("finished")) == sorted(queued)


def test_a_job_that_is_on_the_queue_twice_is_finished_once(rq: RqView, reserved: ReservedJobs) -> None:
    (id_,) = fill(rq.redis, 1)
    rq.redis.rpush(rq_format.QUEUE_KEY, id_)
    settle(reserved, *(Finished(job, "applied") for job in take(reserved)))
    assert rq.places(id_) == ["finished"]


def test_an_id_without_a_job_is_dropped_and_said(rq: RqView, reserved: ReservedJobs) -> None:
    queued = fill(rq.redis, 3)
    rq.redis.delete(Job.key_for(queued[1]))
    with capture_logs() as logs:
        assert ids(take(reserved)) == [queued[0], queued[2]]
    assert rq.places(queued[1]) == []
    assert [(line["log_level"], line["jobs"], line["svix_ids"]) for line in logs] == [
        ("error", 1, [queued[1]])
    ]


@pytest.mark.parametrize("end", ["finished", "failed", "scheduled", "given back"])
def test_a_job_that_is_deleted_while_it_is_held_stays_deleted(
    end: str, rq: RqView, reserved: ReservedJobs
) -> None:
    (id_,) = fill(rq.redis, 1)
    (job,) = take(reserved)
    rq.job(id_).delete()
    match end:
        case "finished":
            settle(reserved, Finished(job, "applied"))
        case "failed":
            settle(reserved, failure(job))
        case "scheduled":
            settle(reserved, failure(job, retryable=True))
        case _:
            reserved.release()
    assert take(reserved) == []
    assert rq.places(id_) == []
    assert rq.redis.exists(Job.key_for(id_), Result.get_key(id_)) == 0
    with pytest.raises(NoSuchJobError):
        rq.job(id_)


# RQ's own tools


def register(rq: RqView, name: str) -> None:
    """Let RQ know of a worker, without letting it work."""
    worker = SimpleWorker([rq.queue], name=name, connection=rq.redis, serializer="json", worker_ttl=60)
    worker.register_birth()
    worker.set_state("busy")


def test_rqs_clean_up_leaves_held_jobs_alone(rq: RqView, reserved: ReservedJobs) -> None:
    queued = fill(rq.redis, 3)
    take(reserved, 2)
    worker = SimpleWorker([rq.queue], connection=rq.redis, serializer="json")
    for _ in range(2):
        worker.clean_registries()
        clean_registries(rq.queue)
        IntermediateQueue(rq.queue.key, rq.redis).cleanup(worker, rq.queue)
        rq.registries["started"].cleanup(timestamp=time.time() + 10 * 24 * 3600)
    assert [rq.places(id_) for id_ in queued] == [["started", "reserved"], ["started", "reserved"], ["queue"]]
    settle(reserved, *(Finished(job, "applied") for job in take(reserved, 2)))
    assert [rq.status(id_) for id_ in queued] == ["finished", "finished", "queued"]


def test_rq_info_shows_the_queue_its_registries_and_its_workers(
    rq: RqView, consumer: MakeConsumer, redis_url: str
) -> None:
    reserved = consumer("worker-1")
    register(rq, "worker-1")
    fail_for_good(reserved)
    fill(rq.redis, 5)
    settle(reserved, Finished(take(reserved, 1)[0], "applied"))
    take(reserved, 2)
    shown = rq_command(redis_url, "info", "--serializer", "json")
    assert "2, 2 executing, 1 finished, 1 failed" in shown
    assert "1 queues, 2 jobs total" in shown
    assert "worker-1" in shown
    assert "1 workers, 1 queues" in shown


@pytest.mark.parametrize("serializer", [["--serializer", "json"], []], ids=["json", "default"])
def test_rq_requeue_brings_failed_jobs_back(
    serializer: list[str], rq: RqView, reserved: ReservedJobs, redis_url: str
) -> None:
    failed = [fail_for_good(reserved) for _ in range(3)]
    rq_command(redis_url, "requeue", "--queue", "clerk", *serializer, failed[1])
    assert rq.queue.get_job_ids() == [failed[1]]
    rq_command(redis_url, "requeue", "--queue", "clerk", *serializer, "--all")
    assert sorted(rq.queue.get_job_ids()) == sorted(failed)
    jobs = take(reserved)
    assert sorted(ids(jobs)) == sorted(failed)
    assert [job.meta["attempts"] for job in jobs] == [1, 1, 1]
    assert [json.loads(decode_call(job.data))["type"] for job in jobs] == ["user.created"] * 3
    settle(reserved, *(Finished(job, "applied") for job in jobs))
    assert [rq.places(id_) for id_ in failed] == [["finished"]] * 3


# What others put on the queue


def test_a_foreign_job_that_rq_enqueued_is_taken_as_it_is(rq: RqView, reserved: ReservedJobs) -> None:
    rq.queue.enqueue("os.getpid", job_id="foreign")
    (job,) = take(reserved)
    assert (job.id, job.retries_left, job.retry_intervals, job.meta) == ("foreign", 0, (), {})


@pytest.mark.parametrize(
    "fields",
    [
        {"retries_left": "many", "retry_intervals": "soon", "meta": "none", "created_at": "yesterday"},
        {"retries_left": "-1", "retry_intervals": "{}", "meta": "[]"},
        {"retries_left": "9" * 5000, "retry_intervals": "[" + "9" * 5000 + "]", "meta": "[" * 50_000},
        {"retries_left": "1", "retry_intervals": json.dumps([10**18]), "meta": '{"attempts": "many"}'},
        {"retries_left": "1", "retry_intervals": json.dumps([-(10**18)]), "meta": '{"attempts": 1e999}'},
        {"retries_left": "1", "retry_intervals": "[1.5, null, true]", "meta": pickle.dumps({})},
        {"retries_left": b"\xff", "retry_intervals": b"\xff", "meta": b"\xff", "created_at": b"\xff"},
        {"retries_left": "²", "retry_intervals": "", "meta": "null", "created_at": ""},
    ],
    ids=["text", "odd", "huge", "far", "past", "mixed", "bytes", "empty"],
)
@pytest.mark.parametrize("retryable", [False, True], ids=["for good", "retryable"])
def test_garbage_in_a_jobs_fields_stops_nothing(
    fields: dict[str, Any], rq: RqView, reserved: ReservedJobs, *, retryable: bool
) -> None:
    put_job(rq.redis, "foreign", zlib.compress(b"{}"), **fields)
    queued = fill(rq.redis, 1)
    garbage, good = take(reserved)
    settle(reserved, failure(garbage, retryable=retryable), Finished(good, "applied"))
    assert rq.places("foreign") in (["failed"], ["scheduled"])
    assert json.loads(rq.fields("foreign")[b"meta"])["attempts"] == 1
    assert rq.places(queued[0]) == ["finished"]


def test_any_id_that_another_program_put_on_the_queue_can_be_failed(
    rq: RqView, reserved: ReservedJobs
) -> None:
    put_job(rq.redis, b"\xff\x00 \xc3", b"data")
    (job,) = take(reserved)
    settle(reserved, failure(job))
    assert rq.redis.zscore(rq_format.FAILED_KEY, b"\xff\x00 \xc3") is not None
    assert rq.redis.llen(RESERVED_PREFIX + "w") == 0

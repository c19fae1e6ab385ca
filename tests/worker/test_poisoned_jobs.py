"""Jobs that are written so that reading, moving or listing them goes wrong stop nothing beside them."""

import json
import tracemalloc
import zlib
from base64 import b64encode
from typing import Any

import pytest
from redis import Redis

from db.apply.isolation import Isolation
from tests.support.applied import Applied
from tests.support.payloads import body, user_event
from tests.support.queue import RqView, beat, enqueue, put_job, write_job
from tests.support.reserved_jobs import take
from tests.support.settings import NO_DATABASE, MakeSettings
from worker.clerk.payloads import FieldSources
from worker.monitoring.metrics import TOTALS_KEY, Metrics
from worker.monitoring.prometheus import MetricsEndpoint
from worker.monitoring.receivers import NAMES_KEY
from worker.monitoring.recent import GENUINE_AT_KEY
from worker.monitoring.redis_stats import CAUSES_KEY, redis_facts
from worker.queue import lock_waits
from worker.queue.consumer import CONSUMERS_KEY, ReservedJobs
from worker.queue.failed_jobs import FailedJobs
from worker.queue.producer import LAST_RECEIVED_KEY, WATCHING_SINCE_KEY
from worker.queue.rq_format import (
    FAILED_KEY,
    JOB_PREFIX,
    QUEUE_KEY,
    RESULT_PREFIX,
    SCHEDULED_KEY,
    WORKER_PREFIX,
    WORKER_REPORT,
    WORKERS_KEY,
    encode_call,
)
from worker.runner import batch
from worker.sync import last_run

MB = 1024 * 1024
BOMB = zlib.compress(bytes(32 * MB))
LONG_AGO = 1
FAR = 9e9
FOREIGN = zlib.compress(json.dumps(("os.system", None, ("true",), {})).encode())


def turn(redis: Redis) -> None:
    """Do what a worker does in one turn."""
    reserved = ReservedJobs(redis, "turning")
    done = batch.process(take(reserved), FieldSources(), Isolation(Applied()))
    reserved.settle_and_take(done, 0)


def test_a_key_that_is_no_job_does_not_stop_the_queue(redis: Redis, rq: RqView) -> None:
    redis.set(f"{JOB_PREFIX}text", "no hash")
    redis.rpush(QUEUE_KEY, "text")
    id_ = enqueue(redis)
    turn(redis)
    assert rq.places(id_) == ["finished"]
    assert redis.exists(QUEUE_KEY) == 0


@pytest.mark.parametrize(
    "meta",
    ['{"attempts":' + "9" * 4300 + "}", *('{"a":' + "[" * n + "]" * n + "}" for n in range(880, 1000, 4))],
)
def test_what_can_be_read_and_not_written_again_fails_for_its_reason(
    meta: str, redis: Redis, rq: RqView
) -> None:
    put_job(redis, "odd", FOREIGN, meta=meta)
    id_ = enqueue(redis)
    turn(redis)
    assert rq.places(id_) == ["finished"]
    assert rq.places("odd") == ["failed"]


def test_an_id_that_no_index_holds_fails_alone(redis: Redis, rq: RqView) -> None:
    long = "a" * 3000
    put_job(redis, long, encode_call(body(user_event()).decode()))
    id_ = enqueue(redis)
    turn(redis)
    assert rq.places(id_) == ["finished"]
    assert rq.places(long) == ["failed"]


SCHEDULED: dict[str, dict[str, Any]] = {
    "created": {"created_at": "yesterday"},
    "time-out": {"timeout": "soon"},
    "ttl": {"result_ttl": "long"},
    "intervals": {"retry_intervals": "[" * 50_000},
    "dependencies": {"dependency_ids": "{"},
    "callback": {"success_callback_timeout": "x", "failure_callback_name": b"\xff"},
    "worker": {"worker_name": b"\xff"},
    "place": {"enqueue_at_front": "perhaps"},
    "traceback": {"exc_info": BOMB},
    "bomb": {"data": BOMB},
}


@pytest.mark.parametrize("fields", SCHEDULED.values(), ids=SCHEDULED.keys())
def test_a_job_that_rq_could_not_load_holds_up_no_retry(fields: dict[str, Any], redis: Redis) -> None:
    """Each comes to the queue, where it fails."""
    write_job(redis, "odd", **{"data": FOREIGN, "status": "scheduled", **fields})
    _schedule(redis, "odd", due=LONG_AGO)
    id_ = _scheduled(redis)
    tracemalloc.start()
    beat(redis)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert redis.lrange(QUEUE_KEY, 0, -1) == [b"odd", id_.encode()]
    assert redis.zcard(SCHEDULED_KEY) == 0
    assert peak < 8 * MB


@pytest.mark.parametrize("entry", [b"gone", b"text", b"odd-status", b"\xff\x00"])
def test_an_entry_without_a_scheduled_job_only_goes(entry: bytes, redis: Redis, rq: RqView) -> None:
    redis.set(f"{JOB_PREFIX}text", "no hash")
    write_job(redis, "odd-status", FOREIGN, status="finished")
    _schedule(redis, entry, due=LONG_AGO)
    id_ = _scheduled(redis)
    beat(redis)
    assert redis.lrange(QUEUE_KEY, 0, -1) == [id_.encode()]
    assert redis.zcard(SCHEDULED_KEY) == 0
    assert rq.status(id_) == "queued"


def _scheduled(redis: Redis) -> str:
    id_ = enqueue(redis)
    redis.delete(QUEUE_KEY)
    redis.hset(JOB_PREFIX + id_, "status", "scheduled")
    _schedule(redis, id_, due=LONG_AGO + 1)
    return id_


def _schedule(redis: Redis, id_: Any, due: float) -> None:
    redis.zadd(SCHEDULED_KEY, {id_: due})


LISTED: dict[str, dict[str, Any]] = {
    "retries": {"retries_left": "9" * 5000},
    "meta": {"meta": "[" * 50_000},
    "times": {
        "meta": json.dumps(
            {"reason": "x", "first_failed_at": "9999-99", "failed_at": "0001-01-01T00:00+23:00"}
        )
    },
    "bytes": {"meta": b"\xff", "description": b"\xff", "retry_intervals": b"\xff"},
}


@pytest.mark.parametrize("fields", LISTED.values(), ids=LISTED.keys())
def test_an_odd_job_among_the_failed_is_listed_shown_and_discarded(
    fields: dict[str, Any], redis: Redis
) -> None:
    write_job(redis, "odd", FOREIGN, status="failed", **fields)
    redis.zadd(FAILED_KEY, {"odd": FAR})
    failed = FailedJobs(redis)
    assert [job.id for job in failed.newest()] == ["odd"]
    assert failed.show("odd").body is None
    assert [fate.name for _, fate in failed.discard(["odd"])] == ["DISCARDED"]


def test_keys_that_are_no_job_among_the_failed_are_passed_over_and_go(redis: Redis) -> None:
    redis.set(f"{JOB_PREFIX}text", "no hash")
    redis.set(f"{RESULT_PREFIX}text", "no stream")
    write_job(redis, "odd", FOREIGN, status="failed")
    redis.set(f"{RESULT_PREFIX}odd", "no stream")
    redis.zadd(FAILED_KEY, {"text": FAR, "odd": FAR})
    failed = FailedJobs(redis)
    assert [job.id for job in failed.newest()] == ["odd"]
    assert [fate.name for _, fate in failed.replay(["text", "odd"])] == ["GONE", "REPLAYED"]


@pytest.mark.parametrize("odd", [b"\xff", b"9" * 5000], ids=["bytes", "digits"])
def test_odd_values_in_our_own_keys_hide_no_figures(
    odd: bytes, redis: Redis, make_settings: MakeSettings
) -> None:
    for key in (LAST_RECEIVED_KEY, WATCHING_SINCE_KEY, GENUINE_AT_KEY, last_run.KEY):
        redis.set(key, odd)
    redis.set(CAUSES_KEY, "[[]]")
    redis.zadd(CONSUMERS_KEY, {odd: 1e300})
    redis.sadd(WORKERS_KEY, WORKER_PREFIX.encode() + odd)
    redis.hset(
        WORKER_PREFIX.encode() + odd, mapping={"state": odd, "last_heartbeat": odd, WORKER_REPORT: "["}
    )
    redis.sadd(NAMES_KEY, odd)
    redis.hset(TOTALS_KEY, mapping={odd: 1, "[1]": odd, "[[]]": 1})
    redis.zadd(lock_waits.KEY, {odd: 1e300})
    enqueue(redis)
    facts = redis_facts(redis)
    assert (facts["queue"]["depth"], facts["last_received_at"] is not None) == (1, True)
    endpoint = MetricsEndpoint(make_settings(**NO_DATABASE), Metrics())
    assert b"clerk_sync_redis_up 1.0" in endpoint.render()


def test_a_bomb_in_a_traceback_is_not_inflated(redis: Redis) -> None:
    write_job(redis, "odd", FOREIGN, status="failed")
    redis.xadd(f"{RESULT_PREFIX}odd", {"exc_string": b64encode(BOMB)})
    redis.zadd(FAILED_KEY, {"odd": FAR})
    tracemalloc.start()
    assert len(list(FailedJobs(redis).newest())) == 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * MB

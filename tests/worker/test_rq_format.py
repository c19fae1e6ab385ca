"""What RQ itself writes and reads, against what we say it does: an RQ that does otherwise fails here."""

import json
import pickle
import zlib
from datetime import UTC, datetime
from typing import Any

import pytest
import rq.utils
from hypothesis import given
from hypothesis import strategies as st
from redis import Redis
from rq import Queue, Retry, Worker
from rq.exceptions import InvalidJobOperation, NoSuchJobError
from rq.job import Job
from rq.registry import (
    CanceledJobRegistry,
    FailedJobRegistry,
    FinishedJobRegistry,
    ScheduledJobRegistry,
    StartedJobRegistry,
)
from rq.results import Result
from rq.scheduler import RQScheduler
from rq.serializers import JSONSerializer
from rq.suspension import WORKERS_SUSPENDED
from rq.worker_registration import WORKERS_BY_QUEUE_KEY

from tests.support.payloads import NOW
from tests.support.queue import RqView, delivery
from worker.job import apply_delivery
from worker.queue import rq_format
from worker.queue.producer import DeliveryQueue
from worker.queue.rq_format import ForeignJobError, decode_call, encode_call

MOMENT = datetime(2026, 1, 1, 10, 0, 0, 123456, tzinfo=UTC)


def enqueue_with_rq(rq: RqView, body: str, **options: Any) -> Job:
    """Enqueue as a project without scripts of its own would."""
    defaults: dict[str, Any] = {
        "description": "user.created user_1",
        "job_timeout": 60,
        "result_ttl": 3600,
        "failure_ttl": 90 * 24 * 3600,
        "retry": Retry(max=3, interval=[10, 60, 300]),
    }
    return rq.queue.enqueue("worker.job.apply_delivery", body, **{**defaults, **options})


def test_the_keys_are_those_of_rq(rq: RqView) -> None:
    assert Queue.redis_queues_keys == rq_format.QUEUES_KEY
    assert rq.queue.key == rq_format.QUEUE_KEY
    assert StartedJobRegistry(queue=rq.queue).key == rq_format.STARTED_KEY
    assert FinishedJobRegistry(queue=rq.queue).key == rq_format.FINISHED_KEY
    assert FailedJobRegistry(queue=rq.queue).key == rq_format.FAILED_KEY
    assert ScheduledJobRegistry(queue=rq.queue).key == rq_format.SCHEDULED_KEY
    assert CanceledJobRegistry(queue=rq.queue).key == rq_format.CANCELED_KEY
    assert rq_format.SUSPENDED_KEY == WORKERS_SUSPENDED
    assert RQScheduler.get_locking_key(rq_format.QUEUE) == rq_format.SCHEDULER_LOCK_KEY
    assert WORKERS_BY_QUEUE_KEY % rq.queue.name == rq_format.WORKERS_KEY
    assert Job.key_for("") == rq_format.JOB_PREFIX
    assert Result.get_key("") == rq_format.RESULT_PREFIX
    assert Worker.redis_worker_namespace_prefix == rq_format.WORKER_PREFIX


def test_the_function_that_jobs_name_is_there() -> None:
    assert f"{apply_delivery.__module__}.{apply_delivery.__name__}" == rq_format.JOB_FUNCTION


def seen_by_rq(job: Job) -> dict[str, Any]:
    """Return what RQ makes of a job, without the times of the clock."""
    return {
        name: value for name, value in vars(job).items() if name not in {"_id", "created_at", "enqueued_at"}
    }


def test_a_job_of_ours_is_to_rq_as_one_that_rq_enqueued(queue: DeliveryQueue, rq: RqView) -> None:
    given = delivery()._replace(description="user.created user_1")
    queue.enqueue(given)
    ours, theirs = rq.job(given.svix_id), rq.job(enqueue_with_rq(rq, given.body).id)
    assert seen_by_rq(ours) == seen_by_rq(theirs)
    assert ours.get_status() == theirs.get_status()
    assert ours.created_at == datetime.fromtimestamp(NOW / 1000, UTC)


# What RQ makes of a job without each of the fields: this is why it is written.
NEEDED = {
    "created_at": "created_at",
    "data": "args",
    "description": "description",
    "origin": "origin",
    "status": "get_status",
    "timeout": "timeout",
    "result_ttl": "result_ttl",
    "failure_ttl": "failure_ttl",
    "retries_left": "retries_left",
    "retry_intervals": "retry_intervals",
}


def test_a_job_has_the_fields_without_which_rq_would_not_know_it_and_no_others(
    queue: DeliveryQueue, rq: RqView, redis: Redis
) -> None:
    queue.enqueue(given := delivery())
    fields = rq.fields(given.svix_id)
    assert {name.decode() for name in fields} == NEEDED.keys()
    whole = {name: seen(rq, given.svix_id, attribute) for name, attribute in NEEDED.items()}
    for name, attribute in NEEDED.items():
        redis.hdel(rq_format.JOB_PREFIX + given.svix_id, name)
        assert seen(rq, given.svix_id, attribute) != whole[name], name
        redis.hset(rq_format.JOB_PREFIX + given.svix_id, name, fields[name.encode()])


def seen(rq: RqView, id_: str, attribute: str) -> Any:
    try:
        value = getattr(rq.job(id_), attribute)
        return value() if callable(value) else value
    except (NoSuchJobError, InvalidJobOperation):
        return None


@pytest.mark.parametrize("size", [10, rq_format.COMPRESS_FROM_BYTES, 200_000])
def test_rq_reads_the_body_of_a_small_and_of_a_large_delivery(
    queue: DeliveryQueue, rq: RqView, size: int
) -> None:
    given = delivery()._replace(body="x" * size)
    queue.enqueue(given)
    assert rq.job(given.svix_id).args == [given.body]
    assert (len(rq.fields(given.svix_id)[b"data"]) < size) == (size >= rq_format.COMPRESS_FROM_BYTES)


def test_the_queue_that_we_fill_is_one_that_rq_lists(queue: DeliveryQueue, rq: RqView, redis: Redis) -> None:
    queue.enqueue(delivery())
    assert Queue.all(connection=redis, serializer="json") == [rq.queue]
    assert rq.queue.count == 1


@pytest.mark.parametrize("moment", [MOMENT, MOMENT.replace(microsecond=0), MOMENT.replace(year=1970)])
def test_times_are_written_and_read_as_rq_does(moment: datetime) -> None:
    assert rq_format.timestamp(moment) == rq.utils.utcformat(moment)
    assert rq.utils.utcparse(rq_format.timestamp(moment)) == moment
    assert rq_format.parse_timestamp(rq.utils.utcformat(moment)) == moment


def test_a_time_without_fractions_is_read_as_rq_does() -> None:
    text = "2026-01-01T10:00:00Z"
    assert rq_format.parse_timestamp(text) == rq.utils.utcparse(text) == MOMENT.replace(microsecond=0)


@given(st.text())
def test_a_call_is_what_rqs_serializer_reads_and_writes(body: str) -> None:
    call: list[Any] = [rq_format.JOB_FUNCTION, None, [body], {}]
    theirs = JSONSerializer.dumps(call)
    assert JSONSerializer.loads(encode_call(body)) == call
    assert decode_call(encode_call(body)) == body
    assert decode_call(zlib.compress(theirs)) == decode_call(theirs) == body


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_a_traceback_is_stored_as_rq_stores_it(text: str) -> None:
    connection: Any = None
    theirs = Result("msg_1", Result.Type.FAILED, connection, exc_string=text or "-", serializer="json")
    packed, result = rq_format.encode_exception(text or "-")
    assert result == theirs.serialize()["exc_string"]
    assert zlib.decompress(packed).decode() == (text or "-")


FOREIGN: dict[str, bytes] = {
    "another function": json.dumps(["os.system", None, ["true"], {}]).encode(),
    "another module's function of the same name": json.dumps(["a.apply_delivery", None, ["{}"], {}]).encode(),
    "a method": json.dumps([rq_format.JOB_FUNCTION, {"id": 1}, ["{}"], {}]).encode(),
    "no body": json.dumps([rq_format.JOB_FUNCTION, None, [], {}]).encode(),
    "two bodies": json.dumps([rq_format.JOB_FUNCTION, None, ["{}", "{}"], {}]).encode(),
    "a body that is no text": json.dumps([rq_format.JOB_FUNCTION, None, [{}], {}]).encode(),
    "a keyword": json.dumps([rq_format.JOB_FUNCTION, None, ["{}"], {"retry": True}]).encode(),
    "an object": b"{}",
    "a pickle": pickle.dumps((rq_format.JOB_FUNCTION, None, ("{}",), {})),
    "nothing": b"",
    "garbage": bytes(range(256)),
    "deep nesting": b"[" * 50_000,
    "a long number": b"9" * 6_000,
    "half of a UTF-16 text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "compressed"])
@pytest.mark.parametrize("data", FOREIGN.values(), ids=FOREIGN.keys())
def test_data_that_is_no_call_of_ours_is_foreign(data: bytes, *, packed: bool) -> None:
    with pytest.raises(ForeignJobError) as refused:
        decode_call(zlib.compress(data) if packed else data)
    assert refused.value.retryable is False

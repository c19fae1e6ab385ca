"""RQ's keys and formats. All code that depends on RQ's internals is here and in `worker/queue/lua/`.

Written for RQ 3.0. `tests/worker/test_rq_format.py` compares each of these with what RQ itself writes and
reads, and fails if another version of RQ differs.
"""

import json
import zlib
from base64 import b64encode
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, TypeVar

import orjson
from redis import Redis

from config import ServiceError
from db.times import to_datetime

_Json = TypeVar("_Json", list[Any], dict[str, Any])

QUEUE = "clerk"
JOB_FUNCTION = "worker.job.apply_delivery"
JOB_TIMEOUT_S = 60
RESULT_TTL_S = 3600
FAILURE_TTL_S = 90 * 24 * 3600
COMPRESS_FROM_BYTES = 4096  # an ordinary delivery is smaller, and not worth the time of compressing it
RETRY_INTERVALS_S = (10, 60, 300)
MAX_BODY_BYTES = 4 * 1024 * 1024  # of a delivery in a job; Svix sends at most 1 MiB
MAX_CALL_BYTES = 3 * MAX_BODY_BYTES + 1024  # an escape has six bytes for two bytes of UTF-8

QUEUES_KEY = "rq:queues"
QUEUE_KEY = f"rq:queue:{QUEUE}"
INTERMEDIATE_KEY = f"{QUEUE_KEY}:intermediate"  # plain RQ workers keep taken, not started jobs here
STARTED_KEY = f"rq:wip:{QUEUE}"
FINISHED_KEY = f"rq:finished:{QUEUE}"
FAILED_KEY = f"rq:failed:{QUEUE}"
SCHEDULED_KEY = f"rq:scheduled:{QUEUE}"
CANCELED_KEY = f"rq:canceled:{QUEUE}"
SUSPENDED_KEY = "rq:suspended"
SCHEDULER_LOCK_KEY = f"rq:scheduler-lock:{QUEUE}"
WORKERS_KEY = f"rq:workers:{QUEUE}"
JOB_PREFIX = "rq:job:"
RESULT_PREFIX = "rq:results:"
WORKER_PREFIX = "rq:worker:"
WORKER_REPORT = "clerk_sync"  # a field added to RQ's hash of a worker: what it waits for, and its pool


class ForeignJobError(ServiceError):
    """A job on the queue does not call this project's function with a delivery's body."""


def keys_beside(job_id: str) -> tuple[str, ...]:
    """Return the keys that RQ may keep for a job, besides its hash."""
    job = JOB_PREFIX + job_id
    return (RESULT_PREFIX + job_id, f"{job}:dependents", f"{JOB_PREFIX}:{job_id}:dependencies")


def job_fields(redis: Redis, ids: Iterable[bytes], *names: str) -> list[list[bytes | None]]:
    """Return those fields of each job, in one round trip; None for those that are not there."""
    with redis.pipeline(transaction=False) as pipeline:
        for id_ in ids:
            pipeline.hmget(JOB_PREFIX.encode() + id_, names)
        answers = pipeline.execute(raise_on_error=False)  # another program may have put something else there
    return [answer if isinstance(answer, list) else [None] * len(names) for answer in answers]


def timestamp(moment: datetime) -> str:
    """Return a datetime in RQ's format."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def now() -> str:
    """Return the current time in RQ's format."""
    return timestamp(datetime.now(UTC))


def parse_timestamp(text: str) -> datetime:
    """Parse a time in RQ's format, with or without fractions of a second. Raises ValueError."""
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except OverflowError:
        raise ValueError("there is no such time") from None


def read_json(text: bytes, kind: type[_Json]) -> _Json:
    """Return the JSON value if it has that type, else an empty one: another program may have written it."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return kind()
    return value if isinstance(value, kind) else kind()


def read_count(text: bytes) -> int:
    """Return a number of at most 15 digits, such as a time in ms; 0 for anything else."""
    return int(text) if text.isdigit() and len(text) < 16 else 0


COMMON_FIELDS: dict[str, str | int] = {
    "origin": QUEUE,
    "status": "queued",
    "timeout": JOB_TIMEOUT_S,
    "result_ttl": RESULT_TTL_S,
    "failure_ttl": FAILURE_TTL_S,
    "retries_left": len(RETRY_INTERVALS_S),
    "retry_intervals": json.dumps(RETRY_INTERVALS_S),
}


def own_fields(body: str, description: str, received_at: int) -> list[str | bytes]:
    """Return the fields and values, for HSET, in which the hash of a queued job differs from other jobs.

    `received_at` is in ms.
    """
    moment = timestamp(to_datetime(received_at))
    data = encode_call(body)
    if len(data) >= COMPRESS_FROM_BYTES:
        data = zlib.compress(data, 1)
    return ["created_at", moment, "data", data, "description", description]


_BEFORE_BODY, _AFTER_BODY = json.dumps((JOB_FUNCTION, None, ("",), {})).encode().split(b'""')


def encode_call(body: str) -> bytes:
    """Return the call of the job function in the format of RQ's JSON serializer, with fewer escapes."""
    return _BEFORE_BODY + orjson.dumps(body) + _AFTER_BODY


def decode_call(data: bytes) -> str:
    """Return the delivery's body in a job's `data`.

    Raises ForeignJobError for anything but a call of `worker.job.apply_delivery` in the format of
    `encode_call`. Nothing else from Redis is imported, run, or decompressed beyond a limit.
    """
    call = _inflate(data)
    if not (call.startswith(_BEFORE_BODY + b'"') and call.endswith(b'"' + _AFTER_BODY)):
        raise ForeignJobError("the job does not call this queue's function")
    try:
        return _text(call[len(_BEFORE_BODY) : -len(_AFTER_BODY)])
    except ValueError:
        raise ForeignJobError("the job does not call this queue's function with one text") from None


def _text(literal: bytes) -> str:
    """Return the text in a JSON string. Raises ValueError."""
    try:
        text: str = orjson.loads(literal)
    except orjson.JSONDecodeError:  # orjson refuses lone surrogates
        text = json.loads(literal.decode())
    return text


def _inflate(data: bytes) -> bytes:
    """Return the decompressed data, up to a limit: a few bytes of zlib can expand to any size."""
    plain = data  # RQ reads uncompressed data too
    if not data.startswith(_BEFORE_BODY):
        with suppress(zlib.error):
            plain = zlib.decompressobj().decompress(data, MAX_CALL_BYTES + 1)
    if len(plain) > MAX_CALL_BYTES:
        raise ForeignJobError("the job's data is larger than any delivery")
    return plain


def encode_exception(text: str) -> tuple[bytes, str]:
    """Return a traceback as RQ stores it in a job's hash and in a result."""
    packed = zlib.compress(text.encode())
    return packed, b64encode(packed).decode()

"""Where RQ keeps what, and in which form. All that leans on RQ's internals is here and in `worker.scripts`.

Written against RQ 3.0; `tests/worker/test_rq_layout.py` compares each of these with what RQ itself writes and
reads, and fails when another RQ does otherwise.
"""

import json
import zlib
from base64 import b64encode
from datetime import UTC, datetime
from typing import Any

QUEUE = "clerk"
JOB_FUNCTION = "worker.job.apply_delivery"
JOB_TIMEOUT_S = 60
RESULT_TTL_S = 3600
FAILURE_TTL_S = 90 * 24 * 3600
RETRY_INTERVALS_S = (10, 60, 300)

QUEUES_KEY = "rq:queues"
QUEUE_KEY = f"rq:queue:{QUEUE}"
STARTED_KEY = f"rq:wip:{QUEUE}"
FINISHED_KEY = f"rq:finished:{QUEUE}"
FAILED_KEY = f"rq:failed:{QUEUE}"
SCHEDULED_KEY = f"rq:scheduled:{QUEUE}"
CANCELED_KEY = f"rq:canceled:{QUEUE}"
SUSPENDED_KEY = "rq:suspended"
WORKERS_KEY = f"rq:workers:{QUEUE}"
JOB_PREFIX = "rq:job:"
RESULT_PREFIX = "rq:results:"
WORKER_PREFIX = "rq:worker:"
WORKER_REPORT = "clerk_sync"  # our own field in RQ's hash of a worker: what it waits for, and its pool


class ForeignJobError(Exception):
    """A job on the queue does not call this project's function with a delivery's body."""

    retryable = False


def keys_beside(job_id: str) -> tuple[str, ...]:
    """Return the keys that RQ may keep about a job beside its hash."""
    job = JOB_PREFIX + job_id
    return (RESULT_PREFIX + job_id, f"{job}:dependents", f"{JOB_PREFIX}:{job_id}:dependencies")


def timestamp(moment: datetime) -> str:
    """Return a moment as RQ writes it."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def parse_timestamp(text: str) -> datetime:
    """Return the moment that RQ wrote; with and without fractions of a second."""
    return datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone(UTC)


def job_fields(body: str, description: str, received: datetime) -> list[str | bytes | int]:
    """Return the fields and values of a queued job's hash, for HSET."""
    moment = timestamp(received)
    fields: dict[str, str | bytes | int] = {
        "created_at": moment,
        "enqueued_at": moment,
        "data": zlib.compress(encode_call(body), 1),
        "description": description,
        "origin": QUEUE,
        "status": "queued",
        "timeout": JOB_TIMEOUT_S,
        "result_ttl": RESULT_TTL_S,
        "failure_ttl": FAILURE_TTL_S,
        "retries_left": len(RETRY_INTERVALS_S),
        "retry_intervals": json.dumps(RETRY_INTERVALS_S),
        "started_at": "",
        "ended_at": "",
        "worker_name": "",
    }
    return [part for field in fields.items() for part in field]


def encode_call(body: str) -> bytes:
    """Return the call of the job function as RQ's JSON serializer writes it."""
    return json.dumps((JOB_FUNCTION, None, (body,), {})).encode()


def decode_call(data: bytes) -> str:
    """Return the delivery's body in a job's `data`.

    Raises ForeignJobError for anything but a call of this project's own function: nothing that somebody wrote
    into Redis is ever imported or run.
    """
    try:
        call: Any = json.loads(_inflate(data))
    except (ValueError, RecursionError):
        raise ForeignJobError("the job's data is not what this queue holds") from None
    match call:
        case [function, None, [str(body)], dict(keywords)] if function == JOB_FUNCTION and not keywords:
            return body
        case _:
            raise ForeignJobError("the job does not call this queue's function")


def _inflate(data: bytes) -> bytes:
    try:
        return zlib.decompress(data)
    except zlib.error:  # RQ reads uncompressed data too
        return data


def encode_result(value: str) -> str:
    """Return a return value as RQ stores it in a result."""
    return b64encode(json.dumps(value).encode()).decode()


def encode_exception(text: str) -> tuple[bytes, str]:
    """Return a traceback as RQ stores it in a job's hash and in a result."""
    packed = zlib.compress(text.encode())
    return packed, b64encode(packed).decode()

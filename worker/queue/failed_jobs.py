"""The failed jobs: lists, shows, replays and discards them.

They are the jobs in RQ's failed registry. This service's worker leaves a reason in the job's `meta`. Of a job
that another RQ worker failed, only the error's class is shown, because its text may quote the delivery.
"""

import json
import re
import zlib
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from enum import StrEnum
from itertools import islice
from typing import Any, NamedTuple

from redis import Redis
from redis.exceptions import RedisError, ResponseError

from config import ServiceError, Settings
from db.times import to_datetime
from worker.queue import rq_format as rq
from worker.queue import scripts
from worker.queue.consumer import CONSUMERS_KEY, RESERVED_PREFIX
from worker.queue.description import subject
from worker.redis_causes import explain
from worker.redis_client import ENCODING_ERRORS, QueueUnavailable, worker_redis
from worker.threads import chunks

PAGE = 500
MAX_TRACEBACK_BYTES = 1024 * 1024
UNKNOWN = "unknown"  # the type of a job whose type cannot be read
FIELDS = ("data", "description", "meta", "retries_left", "retry_intervals")
FRAME = re.compile(r'  File ".*", line \d+')
CLASS = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,200}(?=:|$)")
ABANDONED = re.compile(r"Moved to FailedJobRegistry, due to (\w+),")
CAUSE = "The above exception was the direct cause of the following exception:"
CONTEXT = "During handling of the above exception, another exception occurred:"


class UnknownJob(ServiceError):
    """There is no failed job with that id."""


class ReplayResult(StrEnum):
    """The result of replaying or discarding a failed job."""

    REPLAYED = "replayed"
    DISCARDED = "discarded"
    NOT_FAILED = "not failed any more"
    GONE = "gone"


class FailedJob(NamedTuple):
    """A failed job without personal data; `type` and `clerk_id` are None if they cannot be read."""

    id: str
    type: str | None
    clerk_id: str | None
    reason: str
    attempts: int
    first_failed_at: str | None
    failed_at: str | None


class Details(NamedTuple):
    """A failed job with its traceback, and two texts that may contain personal data.

    `body` is the delivery's body, None if the job has none; `raw_traceback` is the stored traceback.
    """

    job: FailedJob
    traceback: str
    body: str | None
    raw_traceback: str


class FailedJobFilter(NamedTuple):
    """Selects failed jobs of this type and user that failed from `since` on, and not after `until`.

    The type UNKNOWN selects jobs without a type.
    """

    type: str | None = None
    clerk_id: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def includes(self, job: FailedJob) -> bool:
        """Say whether `job` matches."""
        return (
            self.type in (None, job.type or UNKNOWN)
            and self.clerk_id in (None, job.clerk_id)
            and (self.since is None or _failing(job) >= self.since)
            and (self.until is None or _failing(job) <= self.until)
        )


MATCH_ALL = FailedJobFilter()


class FailedJobs:
    """The failed jobs of the queue. Every method raises QueueUnavailable when Redis does not answer."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._replay = redis.register_script(scripts.load("replay"))
        self._discard = redis.register_script(scripts.load("discard"))

    def count(self) -> int:
        """Return the number of failed jobs."""
        with _explained():
            return int(self._redis.zcard(rq.FAILED_KEY))

    def newest(self, wanted: FailedJobFilter = MATCH_ALL, limit: int | None = None) -> Iterator[FailedJob]:
        """Yield the failed jobs that match, the newest failure first, at most `limit`.

        All ids are read first, so that none is missed while the list changes; the jobs are read in pages.
        """
        last = limit - 1 if limit and wanted == MATCH_ALL else -1
        with _explained():
            entries: Any = self._redis.zrange(rq.FAILED_KEY, 0, last, desc=True)
        records = (record for page in chunks(map(_text, entries), PAGE) for record in self._read(page))
        jobs = (_failed_job(record) for record in records if record is not None)
        return islice(filter(wanted.includes, jobs), limit)

    def ids(self, wanted: FailedJobFilter = MATCH_ALL) -> list[str]:
        """Return the ids of the failed jobs that match, the oldest failure first."""
        if wanted != MATCH_ALL:
            return [job.id for job in self.newest(wanted)][::-1]
        with _explained():
            entries: Any = self._redis.zrange(rq.FAILED_KEY, 0, -1)
        return [_text(id_) for id_ in entries]

    def failed(self, ids: Sequence[str]) -> list[str]:
        """Return those of the ids that are failed jobs, in the same order."""
        with _explained():
            scores: Any = self._redis.zmscore(rq.FAILED_KEY, list(ids))
        records = self._read(ids)
        known = zip(ids, scores, records, strict=True)
        return [id_ for id_, score, record in known if score is not None and record is not None]

    def show(self, id_: str) -> Details:
        """Return the details of one failed job. Raises UnknownJob."""
        with _explained():
            is_failed = self._redis.zscore(rq.FAILED_KEY, id_) is not None
        record = self._read([id_])[0]
        if not is_failed or record is None:
            raise UnknownJob(f"no failed job {id_}")
        body = None
        with suppress(rq.ForeignJobError):
            body = rq.decode_call(record.data)
        return Details(_failed_job(record), _traceback(record), body, record.traceback)

    def replay(self, ids: Iterable[str]) -> Iterator[tuple[str, ReplayResult]]:
        """Queue jobs again with all their retries, and yield the result of each.

        A job whose list or registry was lost is queued again too.
        """
        now, intervals = rq.now(), json.dumps(rq.RETRY_INTERVALS_S)

        def send(pipeline: Any, id_: str) -> object:
            keys = [rq.JOB_PREFIX + id_, rq.FAILED_KEY, rq.QUEUE_KEY, rq.QUEUES_KEY, rq.INTERMEDIATE_KEY]
            keys += [rq.STARTED_KEY, rq.SCHEDULED_KEY, CONSUMERS_KEY]
            args: list[str | int] = [id_, now, intervals, len(rq.RETRY_INTERVALS_S), RESERVED_PREFIX]
            return self._replay(keys, args, pipeline)

        return self._each(ids, ReplayResult.REPLAYED, send)

    def discard(self, ids: Iterable[str]) -> Iterator[tuple[str, ReplayResult]]:
        """Delete jobs with all keys that RQ keeps for them, and yield the result of each."""

        def send(pipeline: Any, id_: str) -> object:
            keys = [rq.JOB_PREFIX + id_, rq.FAILED_KEY, *rq.keys_beside(id_)]
            return self._discard(keys, [id_], pipeline)

        return self._each(ids, ReplayResult.DISCARDED, send)

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()

    def _read(self, ids: Sequence[str]) -> "list[_Record | None]":
        """Return the stored fields of each job; None for an expired one that is still in the registry."""
        with _explained(), self._redis.pipeline(transaction=False) as pipeline:
            for id_ in ids:
                pipeline.hmget(rq.JOB_PREFIX + id_, FIELDS)
                pipeline.xrevrange(rq.RESULT_PREFIX + id_, count=1)
            answers = pipeline.execute(raise_on_error=False)
        return [
            None if isinstance(fields, ResponseError) else _record(id_, fields, results)
            for id_, fields, results in zip(ids, answers[::2], answers[1::2], strict=True)
        ]

    def _each(
        self, ids: Iterable[str], done: ReplayResult, send: Callable[[Any, str], object]
    ) -> Iterator[tuple[str, ReplayResult]]:
        results = (ReplayResult.GONE, ReplayResult.NOT_FAILED, done)
        for page in chunks(ids, PAGE):
            with _explained(), self._redis.pipeline(transaction=False) as pipeline:
                for id_ in page:
                    send(pipeline, id_)
                answers = pipeline.execute()
            yield from ((id_, results[answer]) for id_, answer in zip(page, answers, strict=True))


def failed_jobs(settings: Settings) -> FailedJobs:
    """Return the failed jobs of the queue at REDIS_URL."""
    return FailedJobs(worker_redis(settings))


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RedisError as error:
        raise QueueUnavailable(explain(error)) from None


class _Record(NamedTuple):
    """The stored fields of one job: `traceback` is that of its last failure, at `failed_at`."""

    id: str
    data: bytes
    description: bytes | None
    meta: dict[str, Any]
    attempts: int
    traceback: str
    failed_at: str | None


def _record(
    id_: str, fields: Sequence[bytes | None], results: Sequence[tuple[bytes, Any]] | ResponseError
) -> _Record | None:
    data, description, meta, retries_left, intervals = fields
    if data is None:
        return None
    traceback, failed_at = "", None
    if results and not isinstance(results, ResponseError):  # a stream, whose ids begin with the time in ms
        at, entry = results[0]
        traceback = _inflated(entry.get(b"exc_string", b""))
        with suppress(OverflowError):
            failed_at = rq.timestamp(to_datetime(int(at.partition(b"-")[0])))
    # how often RQ has tried, judging by the retries that are left
    attempts = len(rq.read_json(intervals or b"", list)) - rq.read_count(retries_left or b"") + 1
    return _Record(
        id_, data, description, rq.read_json(meta or b"", dict), max(1, attempts), traceback, failed_at
    )


def _failed_job(record: _Record) -> FailedJob:
    type_, clerk_id = subject(record.description)
    meta = record.meta
    first, last = _moment(meta.get("first_failed_at")), _moment(meta.get("failed_at"))
    attempts = meta.get("attempts")
    attempts = attempts if isinstance(attempts, int) else 0
    reason = _own_reason(record)
    if reason is None:
        reason = f"{_error_class(record.traceback)}: failed by another RQ worker, whose message is not shown"
        attempts = max(record.attempts, attempts + 1)
        first, last = first or record.failed_at, record.failed_at
    return FailedJob(record.id, type_, clerk_id, reason, max(attempts, 1), first, last)


def _own_reason(record: _Record) -> str | None:
    """Return the reason that `clerk-sync worker` stored, unless another worker has failed the job since."""
    reason = record.meta.get("reason")
    return reason if isinstance(reason, str) and reason and record.traceback.endswith(reason) else None


def _traceback(record: _Record) -> str:
    if _own_reason(record) is not None:
        return record.traceback
    kept = [line for line in record.traceback.splitlines() if FRAME.match(line) or line in (CAUSE, CONTEXT)]
    return "\n".join([*kept, _error_class(record.traceback)])


def _error_class(traceback: str) -> str:
    """Return the class of the error in a traceback that another RQ worker stored."""
    lines = traceback.splitlines()
    frames = [i for i, line in enumerate(lines) if FRAME.match(line)]
    if not frames:
        known = ABANDONED.match(lines[0]) if lines else None
        return known[1] if known else "unknown error"
    error = next((line for line in lines[frames[-1] + 1 :] if not line.startswith(" ")), "")
    found = CLASS.match(error)
    return found[0].rpartition(".")[2] if found else "unknown error"


def _inflated(packed: bytes) -> str:
    try:
        plain = zlib.decompressobj().decompress(b64decode(packed), MAX_TRACEBACK_BYTES)
    except (zlib.error, ValueError):
        return ""
    return plain.decode(errors="replace")


def _moment(value: object) -> str | None:
    """Return a datetime in RQ's format, None for anything else."""
    try:
        return rq.timestamp(rq.parse_timestamp(value)) if isinstance(value, str) else None
    except ValueError:
        return None


def _failing(job: FailedJob) -> datetime:
    """Return when a job failed; a time long ago if that is unknown."""
    return rq.parse_timestamp(job.failed_at) if job.failed_at else datetime.min.replace(tzinfo=UTC)


def _text(value: bytes) -> str:
    return value.decode(errors=ENCODING_ERRORS)

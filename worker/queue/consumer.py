"""The worker's side of the queue in Redis: take, finish, fail, release. RQ sees a normal queue."""

import json
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import structlog
from redis import Redis
from redis.commands.core import Script
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, OutOfMemoryError

from worker.queue import lock_waits, scripts
from worker.queue import rq_format as rq
from worker.queue.producer import WATCHING_SINCE_KEY
from worker.shutdown import SLICE_S, StopSignal

log = structlog.get_logger("worker.queue")

CONSUMERS_KEY = "clerk-sync:consumers"
RESERVED_PREFIX = "clerk-sync:reserved:"
MAX_BATCH_BYTES = 4 * 1024 * 1024
DEAD_AFTER_S = 15  # without a heartbeat; then another worker releases its jobs
FULL_PAUSE_S = 1.0
SHOWN_IDS = 50
WAIT_ANSWER_S = 5.0  # after the time-out of a blocking command, before its connection counts as broken


class TakenJob(NamedTuple):
    """A job that this consumer has reserved, in RQ's format."""

    id: str
    data: bytes
    created_at: str
    retries_left: int
    retry_intervals: tuple[int, ...]
    meta: dict[str, Any]

    @property
    def has_failed(self) -> bool:
        """Whether the job has failed before."""
        return "attempts" in self.meta

    @property
    def has_waited(self) -> bool:
        """Whether another transaction's lock has delayed the job before."""
        return lock_waits.WAITED in self.meta


class Finished(NamedTuple):
    """A processed job, and the outcome of its delivery."""

    job: TakenJob
    outcome: str


class Failed(NamedTuple):
    """A job that failed. `reason` and `traceback` contain no personal data."""

    job: TakenJob
    reason: str
    traceback: str
    retryable: bool

    @property
    def has_retry(self) -> bool:
        """Whether the job is retried automatically."""
        return self.retryable and self.job.retries_left > 0 and len(self.job.retry_intervals) > 0


class Deferred(NamedTuple):
    """A job whose row another transaction has locked: it is tried again in DEFER_S, with all its retries."""

    job: TakenJob
    reason: str


Settled = Finished | Failed | Deferred


def is_full(jobs: Sequence[TakenJob], limit: int) -> bool:
    """Say whether the queue probably has more jobs after a take of up to `limit`."""
    return len(jobs) >= limit or sum(len(job.data) for job in jobs) >= MAX_BATCH_BYTES


class ReservedJobs:
    """The jobs that one consumer has reserved. Its id is the worker's name, plus `part` for a second one.

    A processed batch is settled by the next `settle_and_take`, in the same round trip that takes the next
    batch. Until then its jobs stay reserved. Every method raises redis.RedisError if Redis does not answer,
    and can then be called again: nothing is done twice.
    """

    def __init__(self, redis: Redis, worker: str, part: str = "") -> None:
        self.redis = redis
        self.worker = worker
        self.consumer_id = worker + part
        self._reserved_key = RESERVED_PREFIX + self.consumer_id
        self._worker_key = rq.WORKER_PREFIX + worker
        self._take = redis.register_script(scripts.load("take"))
        self._finish = redis.register_script(scripts.load("finish"))
        self._fail = redis.register_script(scripts.load("fail"))
        self._defer = redis.register_script(scripts.load("defer"))
        self._release = redis.register_script(scripts.load("release"))

    def settle_and_take(self, done: Sequence[Settled], limit: int) -> list[TakenJob] | None:
        """Settle the last batch and take the next of up to `limit` ready jobs, all in one round trip.

        Returns None while `rq suspend` is in effect. With a `limit` of 0 it takes nothing.
        """
        try:
            taken = self._send_and_take(done, limit)
        except NoScriptError:  # Redis was restarted and does not know the scripts
            for script in (self._take, self._finish, self._fail, self._defer):
                self.redis.script_load(script.script)
            taken = self._send_and_take(done, limit)
        if taken is None:
            return None
        jobs, missing = taken
        if missing:
            shown = [id_.decode(errors="replace") for id_ in missing[:SHOWN_IDS]]
            log.error("jobs lost: Redis may have evicted keys", jobs=len(missing), svix_ids=shown)
        return [_taken_job(fields) for fields in jobs]

    def _send_and_take(self, done: Sequence[Settled], limit: int) -> Any:
        with self.redis.pipeline(transaction=False) as pipeline:
            self._send_finished(pipeline, [item for item in done if isinstance(item, Finished)])
            for item in done:
                if isinstance(item, Failed):
                    self._send_failed(pipeline, item)
                elif isinstance(item, Deferred):
                    self._send_deferred(pipeline, item)
            waited = [item.job.id for item in done if item.job.has_waited and not isinstance(item, Deferred)]
            if waited:
                pipeline.zrem(lock_waits.KEY, *waited)
            self._send_take(pipeline, limit)
            return pipeline.execute()[-1]

    def wait(self, timeout_s: int, stopping: StopSignal) -> bool:
        """Wait for a job and reserve it; return whether to call `settle_and_take`. Ends on a stop signal.

        A full Redis refuses to move a job: then this only waits. It uses a connection of its own, which is
        closed if the wait ends without an answer: a job that arrived meanwhile is then in the reserved list.
        """
        # Methods of a connection that redis-py 8.1 does not document (tests/test_private_names.py).
        connection: Any = self.redis.connection_pool.get_connection()
        try:
            connection.send_command("BLMOVE", rq.QUEUE_KEY, self._reserved_key, "LEFT", "RIGHT", timeout_s)
            deadline = time.monotonic() + timeout_s + WAIT_ANSWER_S
            while not connection.can_read(SLICE_S):
                if stopping.requested or time.monotonic() > deadline:
                    connection.disconnect()
                    return True
            return connection.read_response() is not None
        except OutOfMemoryError:
            stopping.wait(FULL_PAUSE_S)
            return True
        except RedisConnectionError:  # the next take shows whether Redis is unavailable
            connection.disconnect()
            return True
        finally:
            self.redis.connection_pool.release(connection)

    def release(self) -> int:
        """Put the reserved jobs back at the front of the queue, in their order; return their number."""
        keys = [self._reserved_key, rq.QUEUE_KEY, rq.STARTED_KEY]
        return cast("int", self._release(keys, [self.consumer_id, rq.JOB_PREFIX]))

    def leave(self) -> None:
        """Release the reserved jobs and deregister this consumer."""
        self.release()
        self.redis.zrem(CONSUMERS_KEY, self.consumer_id)

    def _send_take(self, pipeline: Any, limit: int) -> None:
        keys = [rq.QUEUE_KEY, self._reserved_key, CONSUMERS_KEY]
        keys += [rq.STARTED_KEY, rq.SUSPENDED_KEY, rq.FINISHED_KEY, WATCHING_SINCE_KEY]
        prefixes = (rq.JOB_PREFIX, rq.RESULT_PREFIX)
        args = [self.worker, limit, MAX_BATCH_BYTES, rq.now(), *prefixes, self.consumer_id]
        _send(pipeline, self._take, keys, args)

    def _send_finished(self, pipeline: Any, done: Sequence[Finished]) -> None:
        if not done:
            return
        keys = [self._reserved_key, rq.STARTED_KEY, rq.FINISHED_KEY, self._worker_key]
        ids = (item.job.id for item in done)
        args = [self.consumer_id, rq.now(), rq.RESULT_TTL_S, rq.JOB_PREFIX, *ids]
        _send(pipeline, self._finish, keys, args)

    def _send_failed(self, pipeline: Any, failed: Failed) -> None:
        job = failed.job
        exc_info, exc_string = rq.encode_exception(failed.traceback)
        registry, retry_in_s = rq.FAILED_KEY, ""
        if failed.has_retry:
            interval_s = job.retry_intervals[max(len(job.retry_intervals) - job.retries_left, 0)]
            registry, retry_in_s = rq.SCHEDULED_KEY, str(int(interval_s))
        keys = [self._reserved_key, rq.STARTED_KEY, registry, self._worker_key]
        keys += [rq.RESULT_PREFIX + job.id, rq.JOB_PREFIX + job.id]
        meta = _dumped(failure_meta(job.meta, failed.reason), failure_meta({}, failed.reason))
        args = [job.id, self.worker, self.consumer_id, rq.now(), rq.FAILURE_TTL_S, retry_in_s, meta]
        _send(pipeline, self._fail, keys, [*args, exc_info, exc_string])

    def _send_deferred(self, pipeline: Any, deferred: Deferred) -> None:
        job = deferred.job
        keys = [self._reserved_key, rq.STARTED_KEY, rq.SCHEDULED_KEY, lock_waits.KEY, rq.JOB_PREFIX + job.id]
        meta = _dumped({**job.meta, lock_waits.WAITED: True}, {lock_waits.WAITED: True})
        args = [job.id, self.consumer_id, lock_waits.DEFER_S, meta]
        _send(pipeline, self._defer, keys, args)


def _dumped(meta: dict[str, Any], otherwise: dict[str, Any]) -> str:
    try:
        return json.dumps(meta)
    except (ValueError, RecursionError):  # another program's value, which cannot be serialized again
        return json.dumps(otherwise)


def failure_meta(meta: dict[str, Any], reason: str) -> dict[str, Any]:
    """Return a job's `meta` after one more failure: reason, attempts, first and last failure."""
    now = rq.now()
    attempts = meta.get("attempts")
    return {
        **{key: value for key, value in meta.items() if key != lock_waits.WAITED},
        "reason": reason,
        "attempts": attempts + 1 if isinstance(attempts, int) else 1,
        "first_failed_at": meta.get("first_failed_at", now),
        "failed_at": now,
    }


def _send(pipeline: Any, script: Script, keys: Sequence[str], args: Sequence[Any]) -> None:
    # Script.__call__ checks before each pipeline whether Redis knows the script, with one more round trip.
    pipeline.evalsha(script.sha, len(keys), *keys, *args)


def _taken_job(fields: Sequence[bytes]) -> TakenJob:
    id_, data, created_at, retries_left, retry_intervals, meta = fields
    return TakenJob(
        id_.decode(errors="surrogateescape"),
        data,
        created_at.decode(errors="replace"),
        rq.read_count(retries_left),
        _intervals(retry_intervals),
        rq.read_json(meta, dict) if meta else {},
    )


@lru_cache(maxsize=16)
def _intervals(text: bytes) -> tuple[int, ...]:
    # Nearly every job has the same: parsed once, not once a job.
    found = rq.read_json(text, list)
    return tuple(item for item in found if isinstance(item, int) and 0 <= item <= rq.FAILURE_TTL_S)

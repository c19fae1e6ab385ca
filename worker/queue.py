"""The queue of deliveries in Redis: enqueue, take, finish, fail, give back. To RQ it is one of its own."""

import json
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar, cast

from redis import BlockingConnectionPool, ConnectionPool, Redis
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.commands.core import Script
from redis.connection import HiredisRespSerializer
from redis.exceptions import NoScriptError, OutOfMemoryError, RedisError
from redis.retry import Retry

from config import Settings, SettingsError
from worker import rq_layout as rq
from worker import scripts

INTAKE_TIMEOUT_S = 1.5
INTAKE_CONNECTIONS = 16  # of one receiver process; each is in use for a round trip
WORKER_TIMEOUT_S = 15.0
_Json = TypeVar("_Json", list[Any], dict[str, Any])

HOLDERS_KEY = "clerk-sync:holders"
HELD_PREFIX = "clerk-sync:held:"
LAST_RECEIVED_KEY = "clerk-sync:last-received"
ENCODING_ERRORS = "surrogateescape"  # any id that somebody put on the queue can be named again
MAX_BATCH_BYTES = 4 * 1024 * 1024
SILENT_AFTER_S = 15  # a worker beats every few seconds; after this long it is taken for dead
FORGET_AFTER_S = 24 * 3600


class QueueUnavailable(Exception):
    """Redis did not take or give a job. Waiting helps."""

    retryable = True


class Answer(StrEnum):
    """What became of a delivery at the queue."""

    QUEUED = "queued"
    DUPLICATE = "duplicate"
    REQUEUED = "requeued"


class Delivery(NamedTuple):
    """A verified delivery; `description` is its type and Clerk id only, `received_at` is in ms."""

    svix_id: str
    body: str
    description: str
    received_at: int


class TakenJob(NamedTuple):
    """A job that this worker holds, as RQ stores it."""

    id: str
    data: bytes
    created_at: str
    retries_left: int
    retry_intervals: tuple[int, ...]
    meta: dict[str, Any]


class Finished(NamedTuple):
    """A job that is done, and what became of its delivery."""

    job: TakenJob
    outcome: str


class Failed(NamedTuple):
    """A job that could not be done. `reason` and `traceback` hold no personal data."""

    job: TakenJob
    reason: str
    traceback: str
    retryable: bool

    @property
    def has_retry(self) -> bool:
        """Whether it is tried again by itself."""
        return self.retryable and self.job.retries_left > 0 and len(self.job.retry_intervals) > 0


class DeliveryQueue:
    """The receiver's side of the queue."""

    def __init__(self, redis: Redis, max_depth: int = sys.maxsize) -> None:
        self.redis = redis
        self._max_depth = max_depth
        self._script = redis.register_script(scripts.enqueue(rq.COMMON_FIELDS))

    def enqueue(self, delivery: Delivery) -> Answer:
        """Store the delivery and return what it was, once Redis has confirmed it. One round trip.

        Raises QueueUnavailable when Redis cannot be reached, is too slow, or refuses (full, read-only), and
        when so many jobs wait already that it would have to wait too long.
        """
        received = datetime.fromtimestamp(delivery.received_at / 1000, UTC)
        try:
            answer = self._run(
                keys=[
                    rq.JOB_PREFIX + delivery.svix_id,
                    rq.QUEUE_KEY,
                    rq.QUEUES_KEY,
                    rq.FAILED_KEY,
                    rq.CANCELED_KEY,
                    LAST_RECEIVED_KEY,
                ],
                args=[
                    delivery.svix_id,
                    delivery.received_at,
                    self._max_depth,
                    *rq.own_fields(delivery.body, delivery.description, received),
                ],
            )
        except RedisError as error:
            raise QueueUnavailable(f"Redis did not take the job ({redis_trouble(error)})") from None
        if answer == TOO_DEEP:
            raise QueueUnavailable("the queue is as long as it may be (MAX_QUEUE_DEPTH)")
        return _ANSWERS[cast("int", answer)]

    def _run(self, keys: Sequence[str], args: Sequence[Any]) -> Any:
        try:
            return self._send(keys, args)
        except NoScriptError:  # Redis was started since
            self.redis.script_load(self._script.script)
            return self._send(keys, args)

    def _send(self, keys: Sequence[str], args: Sequence[Any]) -> Any:
        # What Redis.evalsha does around this (retries, observers, options) costs more than the rest.
        pool = self.redis.connection_pool
        connection: Any = pool.get_connection()
        try:
            connection.send_command("EVALSHA", self._script.sha, len(keys), *keys, *args)
            return connection.read_response()
        finally:
            pool.release(connection)

    def ping(self) -> None:
        """Raise QueueUnavailable unless Redis answers and would take a write."""
        try:
            self.redis.set(f"{LAST_RECEIVED_KEY}:probe", 1, ex=60)
        except RedisError as error:
            raise QueueUnavailable(f"Redis takes no writes ({redis_trouble(error)})") from None


TOO_DEEP = -1
_ANSWERS = {0: Answer.DUPLICATE, 1: Answer.QUEUED, 2: Answer.REQUEUED}


class HeldJobs:
    """A worker's side of the queue: the jobs that it holds under its name, or a `part` of them.

    Every method raises redis.RedisError when Redis does not answer, and may then simply be called again: what
    had been done is not done twice.
    """

    def __init__(self, redis: Redis, worker: str, part: str = "") -> None:
        self.redis = redis
        self.worker = worker
        self._holder = worker + part
        self._held_key = HELD_PREFIX + self._holder
        self._worker_key = rq.WORKER_PREFIX + worker
        self._beat = redis.register_script(scripts.BEAT)
        self._take = redis.register_script(scripts.TAKE)
        self._finish = redis.register_script(scripts.FINISH)
        self._fail = redis.register_script(scripts.FAIL)
        self._give_back = redis.register_script(scripts.GIVE_BACK)
        self._reap = redis.register_script(scripts.REAP)

    def finish_and_take(self, done: Sequence[Finished | Failed], limit: int) -> list[TakenJob] | None:
        """Settle what is done and take up to `limit` ready jobs, all in one round trip.

        Returns None when `rq suspend` has stopped the workers. Nothing is taken with a `limit` of 0.
        """
        try:
            taken = self._settle_and_take(done, limit)
        except NoScriptError:  # Redis was restarted, and has forgotten the scripts
            for script in (self._take, self._finish, self._fail):
                self.redis.script_load(script.script)
            taken = self._settle_and_take(done, limit)
        return None if taken is None else [_taken_job(fields) for fields in taken]

    def _settle_and_take(self, done: Sequence[Finished | Failed], limit: int) -> Any:
        with self.redis.pipeline(transaction=False) as pipeline:
            self._send_finished(pipeline, [item for item in done if isinstance(item, Finished)])
            for item in done:
                if isinstance(item, Failed):
                    self._send_failed(pipeline, item)
            self._send_take(pipeline, limit)
            return pipeline.execute()[-1]

    def wait(self, timeout_s: int) -> bool:
        """Wait for a job, and hold it; return whether one came. In a Redis that is full, only wait."""
        try:
            return self.redis.blmove(rq.QUEUE_KEY, self._held_key, timeout_s, "LEFT", "RIGHT") is not None
        except OutOfMemoryError:
            time.sleep(timeout_s)
            return False

    def give_back(self) -> int:
        """Put what is held back to the front of the queue, in its order; return how many."""
        return cast(
            "int",
            self._give_back(
                keys=[self._held_key, rq.QUEUE_KEY, rq.STARTED_KEY], args=[self._holder, rq.JOB_PREFIX]
            ),
        )

    def beat(self) -> None:
        """Say that this worker lives, so that nobody takes over what it holds."""
        self._beat(keys=[HOLDERS_KEY], args=[self._holder])

    def leave(self) -> None:
        """Give back what is held and end this worker's membership."""
        self.give_back()
        self.redis.zrem(HOLDERS_KEY, self._holder)

    def reap(self) -> int:
        """Give back what workers hold that have been silent for SILENT_AFTER_S; return how many jobs."""
        return cast(
            "int",
            self._reap(
                keys=[HOLDERS_KEY, rq.QUEUE_KEY, rq.STARTED_KEY],
                args=[SILENT_AFTER_S, FORGET_AFTER_S, rq.JOB_PREFIX, HELD_PREFIX],
            ),
        )

    def _send_take(self, pipeline: Any, limit: int) -> None:
        _send(
            pipeline,
            self._take,
            keys=[
                rq.QUEUE_KEY,
                self._held_key,
                HOLDERS_KEY,
                rq.STARTED_KEY,
                rq.SUSPENDED_KEY,
                rq.FINISHED_KEY,
            ],
            args=[
                self.worker,
                limit,
                MAX_BATCH_BYTES,
                _now(),
                rq.JOB_PREFIX,
                rq.RESULT_PREFIX,
                self._holder,
            ],
        )

    def _send_finished(self, pipeline: Any, done: Sequence[Finished]) -> None:
        if not done:
            return
        results = {outcome: rq.encode_result(outcome) for outcome in {item.outcome for item in done}}
        jobs = [part for item in done for part in (item.job.id, results[item.outcome])]
        _send(
            pipeline,
            self._finish,
            keys=[self._held_key, rq.STARTED_KEY, rq.FINISHED_KEY, self._worker_key],
            args=[
                self.worker,
                self._holder,
                _now(),
                rq.RESULT_TTL_S,
                rq.JOB_PREFIX,
                rq.RESULT_PREFIX,
                *jobs,
            ],
        )

    def _send_failed(self, pipeline: Any, failed: Failed) -> None:
        job = failed.job
        exc_info, exc_string = rq.encode_exception(failed.traceback)
        due = _retry_due(job) if failed.has_retry else None
        _send(
            pipeline,
            self._fail,
            keys=[
                self._held_key,
                rq.STARTED_KEY,
                rq.FAILED_KEY if due is None else rq.SCHEDULED_KEY,
                self._worker_key,
                rq.RESULT_PREFIX + job.id,
                rq.JOB_PREFIX + job.id,
            ],
            args=[
                job.id,
                self.worker,
                self._holder,
                _now(),
                rq.FAILURE_TTL_S,
                "" if due is None else int(due.timestamp()),
                _meta_text(job, failed.reason),
                exc_info,
                exc_string,
            ],
        )


def _meta_text(job: TakenJob, reason: str) -> str:
    try:
        return json.dumps(failure_meta(job.meta, reason))
    except (ValueError, RecursionError):  # what somebody else wrote there can be read, and not written again
        return json.dumps(failure_meta({}, reason))


def failure_meta(meta: dict[str, Any], reason: str) -> dict[str, Any]:
    """Return a job's `meta` after one more failure: reason, attempts, first and last failure."""
    now = _now()
    attempts = meta.get("attempts")
    return {
        **meta,
        "reason": reason,
        "attempts": attempts + 1 if isinstance(attempts, int) else 1,
        "first_failed_at": meta.get("first_failed_at", now),
        "failed_at": now,
    }


def intake(settings: Settings) -> DeliveryQueue:
    """Return the receiver's queue, on no more than INTAKE_CONNECTIONS: small Redis plans take few."""
    pool: BlockingConnectionPool = BlockingConnectionPool.from_url(
        redis_url(settings), max_connections=INTAKE_CONNECTIONS, timeout=INTAKE_TIMEOUT_S, **_impatience()
    )
    return DeliveryQueue(Redis.from_pool(pool), settings.max_queue_depth)


def redis_trouble(error: RedisError) -> str:
    """Return the name of an error, also of one in a script; its own text may hold a job's fields."""
    return OutOfMemoryError.__name__ if "OOM" in str(error) else type(error).__name__


class _Packer(HiredisRespSerializer):
    """hiredis, which takes no id with lone surrogates, unless it comes as bytes."""

    def pack(self, *args: Any) -> list[bytes]:
        encoded = [arg.encode(errors=ENCODING_ERRORS) if isinstance(arg, str) else arg for arg in args]
        return cast("list[bytes]", super().pack(*cast("Any", encoded)))


def impatient_redis(settings: Settings) -> Redis:
    """Return a client for whoever must answer soon: no retries, short time-outs. Clerk delivers again."""
    return Redis.from_url(redis_url(settings), **_impatience())


def _impatience() -> dict[str, Any]:
    return {
        "socket_timeout": INTAKE_TIMEOUT_S,
        "socket_connect_timeout": INTAKE_TIMEOUT_S,
        "retry": Retry(NoBackoff(), 0),
        "encoding_errors": ENCODING_ERRORS,
        "command_packer": _Packer(),
    }


def worker_redis(settings: Settings) -> Redis:
    """Return a patient client for workers and commands: it retries for some seconds by itself."""
    return Redis.from_url(
        redis_url(settings),
        socket_timeout=WORKER_TIMEOUT_S,
        socket_connect_timeout=5,
        socket_keepalive=True,
        health_check_interval=30,
        retry=Retry(ExponentialBackoff(cap=0.4, base=0.05), 3),  # for each of connecting and asking
        encoding_errors=ENCODING_ERRORS,
        command_packer=_Packer(),
    )


def redis_url(settings: Settings) -> str:
    """Return the URL of Redis. Raises SettingsError when it is not set, or redis-py cannot read it."""
    if settings.redis_url is None:
        raise SettingsError("REDIS_URL is not set")
    url = settings.redis_url.get_secret_value()
    try:
        ConnectionPool.from_url(url).make_connection()  # which connects nowhere
    except (RedisError, TypeError, ValueError):
        raise SettingsError("REDIS_URL has an option that cannot be read") from None
    return url


def _send(pipeline: Any, script: Script, keys: Sequence[str], args: Sequence[Any]) -> None:
    # Script.__call__ asks Redis whether it knows the script before each pipeline: a round trip more.
    pipeline.evalsha(script.sha, len(keys), *keys, *args)


def _taken_job(fields: Sequence[bytes]) -> TakenJob:
    id_, data, created_at, retries_left, retry_intervals, meta = fields
    return TakenJob(
        id_.decode(errors="surrogateescape"),
        data,
        created_at.decode(errors="replace"),
        int(retries_left) if retries_left.isdigit() and len(retries_left) < 10 else 0,
        _intervals(retry_intervals),
        _json(meta, dict) if meta else {},
    )


@lru_cache(maxsize=16)
def _intervals(text: bytes) -> tuple[int, ...]:
    # Nearly every job has the same: parsed once, not once a job.
    return tuple(interval for interval in _json(text, list) if _is_interval(interval))


def _is_interval(value: object) -> bool:
    return isinstance(value, int) and 0 <= value <= rq.FAILURE_TTL_S


def _json(text: bytes, kind: type[_Json]) -> _Json:
    """Return the JSON value of that kind, empty for anything else: somebody else may have written the job."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return kind()
    return value if isinstance(value, kind) else kind()


def _retry_due(job: TakenJob) -> datetime:
    index = max(len(job.retry_intervals) - job.retries_left, 0)
    return datetime.now(UTC) + timedelta(seconds=job.retry_intervals[index])


def _now() -> str:
    return rq.timestamp(datetime.now(UTC))

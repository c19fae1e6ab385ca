"""What health and status show: each part asked by itself, side by side, within a time limit."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import UTC, datetime
from typing import Any, NamedTuple

from redis import Redis
from redis.exceptions import RedisError

from config import Settings
from db import ledger, schema
from db.engine import Database
from db.errors import DatabaseError
from worker import rq_layout as rq
from worker.queue import LAST_RECEIVED_KEY, impatient_redis

LIMIT_S = 2.5

Facts = Mapping[str, Any]


class Broken(Exception):
    """A part answered, and what it says is not good; the message says what to do."""

    retryable = True


class Answer(NamedTuple):
    """What one part said, in how many ms; `error` is None when all is well."""

    facts: Facts
    ms: float
    error: str | None


class Question:
    """One part to ask, in a thread of its own.

    While an answer is outstanding the part is not asked again: what hangs costs one thread, however often
    somebody wants to know.
    """

    def __init__(self, name: str, ask: Callable[[], Facts]) -> None:
        self.name = name
        self._ask = ask
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"status-{name}")
        self._pending: Future[Answer] | None = None

    def start(self) -> Future[Answer]:
        """Ask, unless the last answer is still outstanding."""
        if self._pending is None or self._pending.done():
            self._pending = self._thread.submit(self._timed)
        return self._pending

    def _timed(self) -> Answer:
        began = time.perf_counter()
        facts: Facts = {}
        error: str | None = None
        try:
            facts = self._ask()
        except (Broken, DatabaseError) as trouble:
            error = str(trouble)
        except RedisError as trouble:
            error = f"Redis does not answer ({type(trouble).__name__})"
        return Answer(facts, round((time.perf_counter() - began) * 1000, 1), error)


class Status:
    """Asks Redis and the database. Made once per process; `report` answers within LIMIT_S, whatever hangs."""

    def __init__(self, settings: Settings) -> None:
        self._redis = impatient_redis(settings)
        self._database = Database(settings, attempts=1)
        self._questions = (
            Question("redis", lambda: redis_facts(self._redis)),
            Question("database", lambda: database_facts(self._database)),
            Question("schema", lambda: schema_facts(self._database)),
        )

    def report(self) -> dict[str, Any]:
        """Return what is known now, ready for JSON; `status` is "ok" only when every check is."""
        answers = _answers(self._questions)
        facts = {key: value for answer in answers.values() for key, value in answer.facts.items()}
        pool = self._database.pool_state()
        return {
            "status": "failing" if any(answer.error for answer in answers.values()) else "ok",
            "checks": {
                name: {"ok": answer.error is None, "ms": answer.ms, "error": answer.error}
                for name, answer in answers.items()
            },
            "schema": facts.get("schema"),
            "pool": {"size": pool.size, "in_use": pool.in_use, "overflow": pool.overflow},
            "queue": facts.get("queue", _UNKNOWN_QUEUE),
            "workers": facts.get("workers", {"alive": None, "list": []}),
            "last_received_at": facts.get("last_received_at"),
            "last_applied_at": facts.get("last_applied_at"),
        }

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()
        self._database.dispose()


_UNKNOWN_QUEUE = dict.fromkeys(("depth", "oldest_age_s", "started", "scheduled", "failed"))


def redis_facts(redis: Redis) -> Facts:
    """Return the queue's numbers, the workers, and when the last delivery came. Raises RedisError."""
    with redis.pipeline(transaction=False) as pipeline:
        pipeline.llen(rq.QUEUE_KEY)
        pipeline.lindex(rq.QUEUE_KEY, 0)
        for key in (rq.STARTED_KEY, rq.SCHEDULED_KEY, rq.FAILED_KEY):
            pipeline.zcard(key)
        pipeline.get(LAST_RECEIVED_KEY)
        pipeline.smembers(rq.WORKERS_KEY)
        depth, oldest, started, scheduled, failed, received, workers = pipeline.execute()
    return {
        "queue": {
            "depth": depth,
            "oldest_age_s": _age_s(redis, oldest),
            "started": started,
            "scheduled": scheduled,
            "failed": failed,
        },
        "workers": _workers(redis, workers),
        "last_received_at": _iso(datetime.fromtimestamp(int(received) / 1000, UTC)) if received else None,
    }


def database_facts(database: Database) -> Facts:
    """Return nothing but that the database answers. Raises DatabaseError."""
    database.ping()
    return {}


def schema_facts(database: Database) -> Facts:
    """Return the schema's state and when the last delivery was applied. Raises Broken, DatabaseError."""
    state = schema.state(database)
    if state in {schema.SchemaState.MISSING, schema.SchemaState.OLD}:
        raise Broken(f"the schema is {state.value}: run clerk-sync db upgrade")
    if state is schema.SchemaState.NEWER:
        raise Broken("the schema is newer than this version: deploy the version that made it")
    applied_at = ledger.last_applied_at(database)
    return {"schema": state.value, "last_applied_at": _iso(applied_at) if applied_at else None}


def _answers(questions: Sequence[Question]) -> dict[str, Answer]:
    deadline = time.monotonic() + LIMIT_S
    pending = {question.name: question.start() for question in questions}
    return {name: _answer(future, deadline - time.monotonic()) for name, future in pending.items()}


def _answer(future: "Future[Answer]", limit_s: float) -> Answer:
    try:
        return future.result(max(0.0, limit_s))
    except FutureTimeout:
        return Answer({}, LIMIT_S * 1000, f"no answer within {LIMIT_S} s")


def _age_s(redis: Redis, job_id: bytes | None) -> float | None:
    created_at: Any = (
        redis.hget(rq.JOB_PREFIX + job_id.decode(errors="replace"), "created_at") if job_id else None
    )
    if not created_at:
        return None
    age = datetime.now(UTC) - rq.parse_timestamp(created_at.decode())
    return round(max(0.0, age.total_seconds()), 3)


def _workers(redis: Redis, keys: set[bytes]) -> dict[str, Any]:
    names = sorted(key.decode().removeprefix(rq.WORKER_PREFIX) for key in keys)
    with redis.pipeline(transaction=False) as pipeline:
        for name in names:
            pipeline.hgetall(rq.WORKER_PREFIX + name)
        hashes = pipeline.execute()
    alive = [_worker(name, fields) for name, fields in zip(names, hashes, strict=True) if fields]
    return {"alive": len(alive), "list": alive}


def _worker(name: str, fields: Mapping[bytes, bytes]) -> dict[str, Any]:
    report = json.loads(fields.get(rq.WORKER_REPORT.encode(), b"{}"))
    return {
        "name": name,
        "state": fields.get(b"state", b"").decode(),
        "last_seen_at": fields.get(b"last_heartbeat", b"").decode(),
        "waiting_for": report.get("waiting_for"),
        "pool": report.get("pool"),
    }


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

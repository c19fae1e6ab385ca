"""What health and status show: each part asked by itself, side by side, within a time limit."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeout
from datetime import UTC, datetime
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple

from redis import Redis
from redis.exceptions import RedisError, ResponseError

from config import Settings
from db import ledger, schema
from db.connection.engine import Database
from db.connection.errors import DatabaseError
from worker.queue import rq_format as rq
from worker.queue.consumer import CONSUMERS_KEY, SILENT_AFTER_S
from worker.queue.producer import LAST_RECEIVED_KEY, WATCHING_SINCE_KEY, probe
from worker.redis_client import QueueUnavailable, fail_fast_redis
from worker.sync import last_run
from worker.sync.last_run import Result

LIMIT_S = 2.5
ANSWER_LIMIT_S = 10.0  # of PostgreSQL: one that comes later than LIMIT_S is shown to who asks next
WAITING_FOR = ("database", "Redis")  # what a worker says that it waits for

Facts = Mapping[str, Any]


class ProbeFailed(Exception):
    """A part answered, and what it says is not good; the message says what to do, `facts` what is known."""

    retryable = True

    def __init__(self, message: str, facts: Facts | None = None) -> None:
        super().__init__(message)
        self.facts = facts or {}


class ProbeResult(NamedTuple):
    """What one part said, in how many ms; `error` is None when all is well."""

    facts: Facts
    ms: float
    error: str | None


class Probe:
    """One part to ask, in a thread of its own.

    While an answer is outstanding the part is not asked again: what hangs costs one thread, however often
    somebody wants to know. Nor does it keep the process from ending, as an executor's thread would.
    """

    def __init__(self, name: str, ask: Callable[..., Facts]) -> None:
        self.name = name
        self._ask = ask
        self._thread: Thread | None = None
        self._asked: SimpleQueue[tuple[Future[ProbeResult], tuple[object, ...]]] = SimpleQueue()
        self._pending: Future[ProbeResult] | None = None
        self._about: tuple[object, ...] = ()

    def start(self, *about: object) -> Future[ProbeResult]:
        """Ask, unless the last answer to the same is still outstanding."""
        if self._pending is None or self._pending.done() or self._about != about:
            self._pending = self._submit(about)
            self._about = about
        return self._pending

    def _submit(self, about: tuple[object, ...]) -> Future[ProbeResult]:
        future: Future[ProbeResult] = Future()
        self._asked.put((future, about))
        if self._thread is None:
            self._thread = Thread(target=self._answer_all, name=f"status-{self.name}", daemon=True)
            self._thread.start()
        return future

    def _answer_all(self) -> None:
        while True:
            future, about = self._asked.get()
            if future.set_running_or_notify_cancel():
                future.set_result(self._timed(*about))

    def _timed(self, *about: object) -> ProbeResult:
        began = time.perf_counter()
        facts: Facts = {}
        error: str | None = None
        try:
            facts = self._ask(*about)
        except ProbeFailed as trouble:
            facts, error = trouble.facts, str(trouble)
        except (DatabaseError, QueueUnavailable) as trouble:
            error = str(trouble)
        except RedisError as trouble:
            error = f"Redis does not answer ({type(trouble).__name__})"
        except Exception as fault:  # such as a job that somebody else put on the queue
            error = f"unexpected {type(fault).__name__}"
        return ProbeResult(facts, round((time.perf_counter() - began) * 1000, 1), error)


Probes = Mapping[str, tuple[Probe, tuple[object, ...]]]  # each with what it is to be asked about


class Status:
    """Asks Redis and the database. Made once per process; `report` answers within LIMIT_S, whatever hangs."""

    def __init__(self, settings: Settings) -> None:
        self._silence_minutes = settings.silence_alarm_minutes
        self._max_queue_depth = settings.max_queue_depth
        self._repair_every_s = settings.reconcile_every
        self._began = datetime.now(UTC)
        self.redis = fail_fast_redis(settings)
        # Of its connections some may have died since, or been forgotten on their way.
        self.database = Database(settings, attempts=2, answer_limit_s=ANSWER_LIMIT_S)
        self._questions = (
            Probe("redis", lambda: _writable(redis_facts(self.redis))),
            Probe("database", lambda: database_facts(self.database)),
            Probe("schema", lambda: schema_facts(self.database)),
        )

    @property
    def questions(self) -> Probes:
        """What has to be asked for a report, for whoever asks other things at the same time."""
        return {question.name: (question, ()) for question in self._questions}

    def report(self, answers: Mapping[str, ProbeResult] | None = None) -> dict[str, Any]:
        """Return what is known now, ready for JSON, or what `answers` to the questions say.

        `status` is "failing" when a check fails; "degraded" when deliveries do not come, or so many wait that
        no more are taken, or none are applied, or the last repair failed or is overdue; else "ok". `warnings`
        say why it is degraded, and what else is not as it should be. `repair` is there when RECONCILE_EVERY
        is set.
        """
        given = ask(self.questions) if answers is None else answers
        answers = {question.name: given[question.name] for question in self._questions}
        facts = {key: value for answer in answers.values() for key, value in answer.facts.items()}
        pool = self.database.pool_state()
        repair = self._repair(facts)
        alarms = [
            *self._silence(facts),
            *self._too_deep(facts),
            *_no_worker(facts),
            *_suspended(facts),
            *_all_wait(facts),
            *_repair_alarms(repair),
        ]
        report = {
            "status": _verdict(answers, alarms),
            "warnings": [*alarms, *_drift(repair), *_no_append_only_file(facts), *_evicts(facts)],
            "checks": {
                name: {"ok": answer.error is None, "ms": answer.ms, "error": answer.error}
                for name, answer in answers.items()
            },
            "schema": facts.get("schema"),
            "pool": {"size": pool.size, "in_use": pool.in_use, "overflow": pool.overflow},
            "queue": facts.get("queue", _UNKNOWN_QUEUE),
            "workers": facts.get("workers", {"alive": None, "last_seen_at": None, "list": []}),
            "last_received_at": facts.get("last_received_at"),
            "last_applied_at": facts.get("last_applied_at"),
        }
        return report if self._repair_every_s is None else {**report, "repair": repair}

    def close(self) -> None:
        """Close the connections."""
        self.redis.close()
        self.database.dispose()

    def _silence(self, facts: Facts) -> list[str]:
        """Say that no delivery has come for too long: since the last one, or since somebody looks."""
        since = facts.get("last_received_at") or facts.get("watching_since")
        if self._silence_minutes is None or since is None:
            return []
        minutes = (datetime.now(UTC) - datetime.fromisoformat(since)).total_seconds() / 60
        if minutes < self._silence_minutes:
            return []
        return [f"no delivery for {minutes:.0f} minutes: see the endpoint in Clerk's dashboard"]

    def _too_deep(self, facts: Facts) -> list[str]:
        if "queue" not in facts or facts["queue"]["depth"] < self._max_queue_depth:
            return []
        return ["the queue is as long as it may be (MAX_QUEUE_DEPTH): deliveries are refused"]

    def _repair(self, facts: Facts) -> dict[str, Any] | None:
        """Return what is to be said of the last repair, None where none runs or Redis does not answer."""
        if self._repair_every_s is None or "repair" not in facts:
            return None
        return last_run.summary(facts["repair"], self._repair_every_s, self._began)


_UNKNOWN_QUEUE = dict.fromkeys(("depth", "oldest_age_s", "started", "scheduled", "failed"))


def _verdict(answers: Mapping[str, ProbeResult], alarms: Sequence[str]) -> str:
    if any(answer.error for answer in answers.values()):
        return "failing"
    return "degraded" if alarms else "ok"


def _no_worker(facts: Facts) -> list[str]:
    if facts.get("workers", {}).get("alive") != 0:
        return []
    return ["no worker is alive: deliveries wait in the queue (start clerk-sync worker)"]


def _suspended(facts: Facts) -> list[str]:
    if not facts.get("suspended"):
        return []
    return ['the workers are suspended: rq resume --url "$REDIS_URL"']


def _all_wait(facts: Facts) -> list[str]:
    """Say what every worker waits for. Only their own words are told: Redis may hold anybody's."""
    waiting = [worker["waiting_for"] for worker in facts.get("workers", {}).get("list", ())]
    if not waiting or any(what not in WAITING_FOR for what in waiting):
        return []
    return [f"every worker waits for {' or '.join(sorted(set(waiting)))}: see the workers' log"]


def _repair_alarms(repair: Facts | None) -> list[str]:
    if repair is None:
        return []
    failed = repair["result"] is Result.FAILED
    return [
        *([f"the last repair failed: {repair['reason']}"] if failed else []),
        *(
            ["no repair has ended for three times RECONCILE_EVERY: see the workers' log"]
            if repair["overdue"]
            else []
        ),
    ]


def _drift(repair: Facts | None) -> list[str]:
    """Say what somebody has to look at, which is no trouble of the service."""
    if repair is None or repair["differing"] is None:
        return []
    if repair["reason"]:
        return [f"the last repair proves nothing: {repair['reason']}"]
    if not repair["differing"]:
        return []
    who = "1 user differs" if repair["differing"] == 1 else f"{repair['differing']:,} users differ"
    return [f"{who} from Clerk: see clerk-sync reconcile"]


def _evicts(facts: Facts) -> list[str]:
    if not facts.get("evicts"):
        return []
    return ["Redis throws keys away when it is full, jobs too: set maxmemory-policy noeviction"]


def _no_append_only_file(facts: Facts) -> list[str]:
    if facts.get("append_only") is not False:
        return []
    return ["Redis keeps no append-only file: what waits is lost when it crashes (set appendonly yes)"]


def redis_facts(redis: Redis) -> Facts:
    """Return the queue's numbers, the workers, the last delivery and the last repair. Raises RedisError.

    `refusal` says why Redis takes no writes, None when it does. `watching_since` is when somebody first
    looked. `append_only` says whether Redis has an append-only file, `evicts` whether it may throw keys away
    when it is full; None when it does not tell.
    """
    with redis.pipeline(transaction=False) as pipeline:
        pipeline.llen(rq.QUEUE_KEY)
        pipeline.lindex(rq.QUEUE_KEY, 0)
        for key in (rq.STARTED_KEY, rq.SCHEDULED_KEY, rq.FAILED_KEY):
            pipeline.zcard(key)
        pipeline.get(LAST_RECEIVED_KEY)
        pipeline.smembers(rq.WORKERS_KEY)
        pipeline.zrange(CONSUMERS_KEY, 0, -1, desc=True, withscores=True)
        pipeline.time()
        pipeline.get(last_run.KEY)
        pipeline.get(WATCHING_SINCE_KEY)
        pipeline.exists(rq.SUSPENDED_KEY)
        depth, oldest, started, scheduled, failed, received, workers, *rest = pipeline.execute()
    seen, now, repair, since, suspended = rest
    return {
        "queue": {
            "depth": depth,
            "oldest_age_s": _age_s(redis, oldest),
            "started": started,
            "scheduled": scheduled,
            "failed": failed,
        },
        "workers": {
            **_workers(redis, workers, {name for name, at in seen if at < now[0] - SILENT_AFTER_S}),
            "last_seen_at": _iso(datetime.fromtimestamp(seen[0][1], UTC)) if seen else None,
        },
        "last_received_at": _moment(received),
        "watching_since": _moment(since) or _iso(datetime.now(UTC)),
        "suspended": bool(suspended),
        **_info(redis),
        "repair": last_run.parse(repair),
        "refusal": _refusal(redis),  # asked last: of a Redis that is away it is not to be told
    }


def _refusal(redis: Redis) -> str | None:
    try:
        probe(redis.execute_command)
    except QueueUnavailable as error:
        return str(error)
    return None


def _writable(facts: Facts) -> Facts:
    """Return what Redis said. Raises Broken when it answers, but takes no writes and so no deliveries."""
    if facts["refusal"]:
        raise ProbeFailed(
            f"{facts['refusal']}: deliveries are refused. Look at its memory, its disk, its role", facts
        )
    return facts


def database_facts(database: Database) -> Facts:
    """Return nothing but that the database answers. Raises DatabaseError."""
    database.ping()
    return {}


def schema_facts(database: Database) -> Facts:
    """Return the schema's state and when the last delivery was applied. Raises Broken, DatabaseError."""
    state = schema.state(database)
    if state in {schema.SchemaState.MISSING, schema.SchemaState.OLD}:
        raise ProbeFailed(f"the schema is {state.value}: run clerk-sync db upgrade")
    if state is schema.SchemaState.NEWER:
        raise ProbeFailed("the schema is newer than this version: deploy the version that made it")
    applied_at = ledger.last_applied_at(database)
    return {"schema": state.value, "last_applied_at": _iso(applied_at) if applied_at else None}


def ask(questions: Probes) -> dict[str, ProbeResult]:
    """Ask side by side, each about what stands beside it. The answers come after LIMIT_S at the latest."""
    deadline = time.monotonic() + LIMIT_S
    pending = {name: question.start(*about) for name, (question, about) in questions.items()}
    return {name: _answer(future, deadline - time.monotonic()) for name, future in pending.items()}


def _answer(future: Future[ProbeResult], limit_s: float) -> ProbeResult:
    try:
        return future.result(max(0.0, limit_s))
    except FutureTimeout:
        future.cancel()  # one that has not begun, as an older one hangs, is not to begin any more
        return ProbeResult({}, LIMIT_S * 1000, f"no answer within {LIMIT_S} s")
    except CancelledError:  # somebody else asked the same, and gave up
        return ProbeResult({}, LIMIT_S * 1000, "no answer in time")


def _info(redis: Redis) -> Facts:
    """Return whether Redis has an append-only file, and whether it may throw keys away. None: unknown."""
    try:
        info: Any = redis.info()
    except ResponseError:  # a managed Redis may not tell
        info = {}
    enabled, policy = info.get("aof_enabled"), info.get("maxmemory_policy")
    return {
        "append_only": None if enabled is None else bool(enabled),
        "evicts": None if policy is None else policy != "noeviction" and info.get("maxmemory") != 0,
    }


def _age_s(redis: Redis, job_id: bytes | None) -> float | None:
    if job_id is None:
        return None
    # One that was replayed has waited since then.
    moments: Any = redis.hmget(rq.JOB_PREFIX + job_id.decode(errors="replace"), ["enqueued_at", "created_at"])
    try:
        age = datetime.now(UTC) - rq.parse_timestamp((moments[0] or moments[1]).decode())
    except (AttributeError, ValueError, OverflowError):  # no such job, or one that somebody else put there
        return None
    return round(max(0.0, age.total_seconds()), 3)


def _workers(redis: Redis, keys: set[bytes], silent: set[bytes]) -> dict[str, Any]:
    """Return the workers that RQ knows, less those that beat no more: RQ itself forgets them much later."""
    gone = {name.decode() for name in silent}
    names = sorted({key.decode().removeprefix(rq.WORKER_PREFIX) for key in keys} - gone)
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


def _moment(ms: bytes | None) -> str | None:
    return _iso(datetime.fromtimestamp(int(ms) / 1000, UTC)) if ms else None


def _iso(moment: datetime) -> str:
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

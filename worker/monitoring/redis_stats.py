"""The state of the service in Redis: the queue, the workers, the last delivery and reconciliation."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from redis import Redis
from redis.exceptions import ResponseError

from worker.monitoring import receivers, recent
from worker.monitoring.probes import Facts
from worker.monitoring.words import iso, iso_of
from worker.queue import rq_format as rq
from worker.queue.consumer import CONSUMERS_KEY, DEAD_AFTER_S, RESERVED_PREFIX
from worker.queue.failed_jobs import FailedJobs
from worker.queue.lock_waits import lock_waits
from worker.queue.producer import LAST_RECEIVED_KEY, WATCHING_SINCE_KEY, probe
from worker.queue.retries import Retries, retries
from worker.redis_causes import CLUSTER_MODE, OUT_OF_MEMORY
from worker.redis_client import QueueUnavailable
from worker.sync import last_run

CAUSES_KEY = "clerk-sync:causes"  # JSON: the causes in the last report that Redis alone does not show
MAX_REASON = 300  # characters of a worker's reason that are shown
DEPENDENCIES = ("database", "Redis")  # the servers that a worker may wait for


def redis_facts(redis: Redis) -> Facts:
    """Return the queue's numbers, workers, last delivery and last reconciliation. Raises RedisError.

    `refusal` says why Redis takes no writes, None when it does; `alive` is None, not 0, where it takes no
    heartbeats either. `watching_since` is the time of the first probe. `append_only` says whether Redis has
    an append-only file, `evicts` whether it may evict keys when it is full; None when Redis does not say.
    `recent` is a Recent; `newest_failure` a failed job's reason.
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
        pipeline.get(CAUSES_KEY)
        depth, oldest, started, scheduled, failed, received, workers, *rest = pipeline.execute()
    seen, now, reconciliation, since, suspended, causes = rest
    reserved, heads = _reserved(redis, [name for name, _ in seen])
    first = (id_ for id_ in (oldest, *heads) if id_ is not None)
    ages = (_age_s(*moments) for moments in rq.job_fields(redis, first, "enqueued_at", "created_at"))
    newest = next(FailedJobs(redis).newest(limit=1), None) if failed else None
    info = _info(redis)
    facts: dict[str, Any] = {
        "queue": {
            "depth": depth,
            "oldest_age_s": max((age for age in ages if age is not None), default=None),
            "reserved": reserved,
            "started": started,
            "scheduled": scheduled,
            "failed": failed,
        },
        "workers": {
            **_workers(redis, workers, {_text(name): at for name, at in seen}, now[0]),
            "last_seen_at": iso_of(seen[0][1] if seen else None),
        },
        "receivers": receivers.count(redis, now[0]),
        "recent": recent.read(redis, now[0]),
        "newest_failure": newest.reason[:MAX_REASON] if newest else None,
        "last_received_at": _moment(received),
        "watching_since": _moment(since) or iso(datetime.now(UTC)),
        "suspended": bool(suspended),
        "causes": rq.read_json(causes or b"[]", list),
        **_durability(info),
        "reconciliation": last_run.parse(reconciliation),
        "lock_waits": lock_waits(redis),
        "retries": retries(redis) if scheduled else Retries(0, None),
    }
    # Asked last: a Redis that is away raises before, and is not said to refuse writes.
    refusal = CLUSTER_MODE if info.get("cluster_enabled") else _refusal(redis)
    if refusal not in {None, OUT_OF_MEMORY}:  # a full one takes heartbeats
        for found in (facts["workers"], facts["receivers"]):
            found["alive"] = found["alive"] or None
    return {**facts, "refusal": refusal}


def _refusal(redis: Redis) -> str | None:
    try:
        probe(redis.execute_command)
    except QueueUnavailable as error:
        return str(error)
    return None


def _info(redis: Redis) -> dict[str, Any]:
    try:
        info: Any = redis.info()
    except ResponseError:  # a managed Redis may forbid INFO
        return {}
    return dict(info)


def _durability(info: Mapping[str, Any]) -> Facts:
    enabled, policy = info.get("aof_enabled"), info.get("maxmemory_policy")
    return {
        "append_only": None if enabled is None else bool(enabled),
        "evicts": None if policy is None else policy != "noeviction" and info.get("maxmemory") != 0,
    }


def _reserved(redis: Redis, consumers: Sequence[bytes]) -> tuple[int, list[bytes | None]]:
    """Return how many jobs workers hold, suspended ones too, and the first job of each consumer."""
    with redis.pipeline(transaction=False) as pipeline:
        for consumer in consumers:
            pipeline.llen(RESERVED_PREFIX.encode() + consumer)
            pipeline.lindex(RESERVED_PREFIX.encode() + consumer, 0)
        answers = pipeline.execute()
    return sum(answers[::2]), answers[1::2]


def _age_s(enqueued_at: bytes | None, created_at: bytes | None) -> float | None:
    """Return the age of a job in seconds; that of a replayed job counts from the replay."""
    try:
        age = datetime.now(UTC) - rq.parse_timestamp((enqueued_at or created_at or b"").decode())
    except (ValueError, OverflowError):  # no such job, or a job of another program
        return None
    return round(max(0.0, age.total_seconds()), 3)


def _workers(redis: Redis, keys: set[bytes], beats: Mapping[str, float], now_s: int) -> dict[str, Any]:
    """Return RQ's workers, except those without a heartbeat, which RQ removes much later.

    A worker with a heartbeat counts also if Redis has evicted its hash, or the set of names.
    """
    gone = {name for name, at in beats.items() if at < now_s - DEAD_AFTER_S}
    known = {_text(key).removeprefix(rq.WORKER_PREFIX) for key in keys}
    names = sorted((known | beats.keys()) - gone)
    with redis.pipeline(transaction=False) as pipeline:
        for name in names:
            pipeline.hgetall(rq.WORKER_PREFIX + name)
        hashes = pipeline.execute()
    alive = [
        _worker(name, fields, beats.get(name))
        for name, fields in zip(names, hashes, strict=True)
        if fields or (name in known and name in beats)
    ]
    return {"alive": len(alive), "list": alive}


def _worker(name: str, fields: Mapping[bytes, bytes], beat_s: float | None) -> dict[str, Any]:
    report: Facts = rq.read_json(fields.get(rq.WORKER_REPORT.encode(), b"{}"), dict)
    dependency, reason, in_hand_s = (report.get(key) for key in ("waiting_for", "reason", "in_hand_s"))
    is_waiting = dependency in DEPENDENCIES  # another program may have written anything there
    return {
        "name": name,
        "state": _text(fields.get(b"state", b"")),
        # an idle worker writes its hash less often than its heartbeat
        "last_seen_at": iso_of(beat_s) or _text(fields.get(b"last_heartbeat", b"")),
        "waiting_for": dependency if is_waiting else None,
        "reason": reason[:MAX_REASON] if is_waiting and isinstance(reason, str) else None,
        "in_hand_s": in_hand_s if isinstance(in_hand_s, int | float) else None,
        "pool": report.get("pool"),
    }


def _text(found: bytes) -> str:
    return found.decode(errors="replace")


def _moment(ms: bytes | None) -> str | None:
    return iso_of(rq.read_count(ms or b"") / 1000 or None)

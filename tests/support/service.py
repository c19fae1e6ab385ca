"""A worker and a receiver that are alive, as far as Redis knows."""

import json
from collections.abc import Callable
from typing import Any

from redis import Redis

from tests.support.queue import beat
from worker.monitoring import receivers
from worker.queue.rq_format import WORKER_PREFIX, WORKER_REPORT, WORKERS_KEY

AskHealth = Callable[..., dict[str, Any]]


def add_worker(redis: Redis, name: str = "one", **report: object) -> None:
    """Register a worker whose heartbeat says `report`."""
    fields: dict[Any, Any] = {
        "state": "idle",
        "last_heartbeat": "2026-01-01T10:00:00.0Z",
        WORKER_REPORT: json.dumps(report),
    }
    redis.sadd(WORKERS_KEY, WORKER_PREFIX + name)
    redis.hset(WORKER_PREFIX + name, mapping=fields)
    beat(redis, name)


def add_service(redis: Redis) -> None:
    """Register a worker and a receiver."""
    add_worker(redis)
    receivers.beat(redis, "receiver")

"""The receiver's side of the queue in Redis: a verified delivery becomes a job, once."""

import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import cache
from hashlib import sha1
from typing import NamedTuple, cast

from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, RedisError

from config import Settings
from db.times import now_ms
from worker.auto_pipeline import AutoPipeline, too_many_clients
from worker.queue import rq_format as rq
from worker.queue import scripts
from worker.redis_causes import explain
from worker.redis_client import FAIL_FAST_TIMEOUT_S, QueueUnavailable, delivery_redis

LAST_RECEIVED_KEY = "clerk-sync:last-received"
WATCHING_SINCE_KEY = "clerk-sync:watching-since"
COMMON_KEYS = (rq.QUEUE_KEY, rq.QUEUES_KEY, rq.FAILED_KEY, rq.CANCELED_KEY, LAST_RECEIVED_KEY)
QUEUE_FULL = -1
PROBE_PATIENCE_S = 0.2  # for a connection of its own


class EnqueueResult(StrEnum):
    """The result of enqueuing a delivery."""

    QUEUED = "queued"
    DUPLICATE = "duplicate"
    REQUEUED = "requeued"


RESULTS = (EnqueueResult.DUPLICATE, EnqueueResult.QUEUED, EnqueueResult.REQUEUED)  # as the script counts them


class Delivery(NamedTuple):
    """A verified delivery; `description` is its type and Clerk id only, `received_at` is in ms."""

    svix_id: str
    body: str
    description: str
    received_at: int


class DeliveryQueue:
    """The receiver's side of the queue."""

    def __init__(self, redis: Redis, max_depth: int = sys.maxsize) -> None:
        pool = redis.connection_pool
        # `ping` has its own connection, so that frequent probes occupy none of those for deliveries.
        self._deliveries = AutoPipeline(pool, max(1, pool.max_connections - 1), FAIL_FAST_TIMEOUT_S)
        self._probes = AutoPipeline(pool, 1, PROBE_PATIENCE_S)
        self._max_depth = max_depth
        common = ", ".join(f"'{part}'" for field in rq.COMMON_FIELDS.items() for part in field)
        self._script = scripts.load("enqueue").replace("$common", common)

    def enqueue(self, delivery: Delivery) -> EnqueueResult:
        """Store the delivery and return the result, once Redis has confirmed it. One round trip.

        Raises QueueUnavailable if Redis cannot be reached, is too slow, or refuses writes (full, read-only),
        and if the queue is full (MAX_QUEUE_DEPTH).
        """
        keys = (rq.JOB_PREFIX + delivery.svix_id, *COMMON_KEYS)
        own = rq.own_fields(delivery.body, delivery.description, delivery.received_at)
        arguments = (delivery.svix_id, delivery.received_at, self._max_depth, *own)
        try:
            answer = _run(self._deliveries.ask, self._script, keys, arguments)
        except RedisError as error:
            raise QueueUnavailable(explain(error)) from None
        if answer == QUEUE_FULL:
            raise QueueUnavailable("the queue is full (MAX_QUEUE_DEPTH)")
        return RESULTS[cast("int", answer)]

    def ping(self) -> None:
        """Raise QueueUnavailable unless Redis would accept a delivery."""
        probe(self._ask_probe)

    def _ask_probe(self, *command: str | bytes | int) -> object:
        try:
            return self._probes.ask(*command)
        except RedisConnectionError as error:
            if not (too_many_clients(error) and self._deliveries.has_open):
                raise
        return self._deliveries.ask(*command)  # a connection that is open still takes deliveries

    def close(self) -> None:
        """Close the connections. They are opened again on demand."""
        self._deliveries.close()
        self._probes.close()


def probe(ask: Callable[..., object]) -> None:
    """Raise QueueUnavailable unless Redis would accept a delivery; `ask` sends a command to it.

    The time of the first probe is stored: without any delivery, silence counts from then.
    """
    keys = (f"{rq.JOB_PREFIX}clerk-sync:probe", rq.QUEUE_KEY, rq.FAILED_KEY, WATCHING_SINCE_KEY)
    try:
        _run(ask, scripts.load("probe"), keys, (now_ms(),))
    except RedisError as error:
        raise QueueUnavailable(explain(error)) from None


def _run(
    ask: Callable[..., object], script: str, keys: Sequence[str], arguments: Sequence[str | bytes | int]
) -> object:
    try:
        return ask("EVALSHA", _sha(script), len(keys), *keys, *arguments)
    except NoScriptError:  # Redis was restarted
        return ask("EVAL", script, len(keys), *keys, *arguments)


@cache
def _sha(script: str) -> str:
    return sha1(script.encode(), usedforsecurity=False).hexdigest()


def delivery_queue(settings: Settings) -> DeliveryQueue:
    """Return the receiver's queue. It connects with the first delivery."""
    return DeliveryQueue(delivery_redis(settings), settings.max_queue_depth)

"""The periodic tasks of a web process: its heartbeat, and adding its counts to the totals."""

import uuid
from contextlib import suppress
from functools import partial
from typing import Any, cast

from redis import Redis
from redis.exceptions import RedisError

from config import Settings
from db.times import now_ms
from worker.monitoring.metrics import FLUSH_EVERY_S, Metrics
from worker.monitoring.words import iso_of
from worker.periodic import PeriodicRunner, PeriodicTask
from worker.queue.producer import WATCHING_SINCE_KEY
from worker.redis_client import ENCODING_ERRORS, heartbeat_redis

NAMES_KEY = "clerk-sync:receiver-names"
KEY_PREFIX = "clerk-sync:receiver:"  # each heartbeat renews its expiry, by Redis's clock
BEAT_EVERY_S = 12.0  # one command, on a connection that stays open
REGISTER_EVERY_S = 600.0  # Redis may have evicted only the set of names
SILENT_AFTER_S = 26
FORGET_AFTER_S = 24 * 3600


class ReceiverTasks:
    """The periodic tasks of a web process, in a thread, from `start` until `stop`."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._redis = heartbeat_redis(settings)
        self._metrics = metrics
        self._name = uuid.uuid4().hex
        self._runner = PeriodicRunner(
            PeriodicTask("heartbeat", BEAT_EVERY_S, partial(beat, self._redis, self._name)),
            PeriodicTask("registration", REGISTER_EVERY_S, partial(register, self._redis, self._name)),
            PeriodicTask("flush metrics", FLUSH_EVERY_S, partial(metrics.flush, self._redis)),
        )

    def start(self) -> None:
        """Start the thread."""
        self._runner.start()

    def stop(self) -> None:
        """End the thread, add the remaining counts to the totals, and deregister."""
        self._runner.stop(FLUSH_EVERY_S)
        with suppress(RedisError):
            self._metrics.flush(self._redis)
            deregister(self._redis, self._name)
        self._redis.connection_pool.disconnect()


def beat(redis: Redis, name: str) -> None:
    """Record that the receiver is alive; register it, where Redis does not know it (any more).

    An expiry that is renewed needs no memory, so a full Redis takes it. Raises RedisError.
    """
    if not redis.expire(KEY_PREFIX + name, FORGET_AFTER_S):
        register(redis, name)


def register(redis: Redis, name: str) -> None:
    """Register the receiver; in an empty Redis, record when its data began. Raises RedisError."""
    with redis.pipeline() as pipeline:
        pipeline.sadd(NAMES_KEY, name)
        pipeline.set(KEY_PREFIX + name, 1, ex=FORGET_AFTER_S)
        pipeline.set(WATCHING_SINCE_KEY, now_ms(), nx=True)
        pipeline.execute()


def deregister(redis: Redis, name: str) -> None:
    """Remove the receiver. Raises RedisError."""
    redis.srem(NAMES_KEY, name)
    redis.delete(KEY_PREFIX + name)


def count(redis: Redis, now_s: int) -> dict[str, Any]:
    """Return how many receivers are alive at `now_s`, Redis's time, and when one was last seen.

    Raises RedisError.
    """
    names = [name.decode(errors=ENCODING_ERRORS) for name in cast("set[bytes]", redis.smembers(NAMES_KEY))]
    with redis.pipeline(transaction=False) as pipeline:
        for name in names:
            pipeline.ttl(KEY_PREFIX + name)
        ages = dict(zip(names, (FORGET_AFTER_S - left_s for left_s in pipeline.execute()), strict=True))
    if gone := [name for name, age_s in ages.items() if age_s > FORGET_AFTER_S]:
        with suppress(RedisError):  # Redis may refuse writes
            redis.srem(NAMES_KEY, *gone)
    known = [age_s for name, age_s in ages.items() if name not in gone]
    alive = sum(age_s < SILENT_AFTER_S for age_s in known)
    return {"alive": alive, "last_seen_at": iso_of(now_s - min(known) if known else None)}

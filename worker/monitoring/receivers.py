"""What a web process does beside receiving: it says that it lives, and adds up what it has counted."""

import uuid
from contextlib import suppress
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from config import Settings
from worker.monitoring.metrics import FLUSH_EVERY_S, Metrics
from worker.periodic import PeriodicRunner, PeriodicTask
from worker.queue import scripts
from worker.redis_client import fail_fast_redis

KEY = "clerk-sync:receivers"
BEAT_EVERY_S = 60.0  # a heartbeat of an idle receiver is four commands to Redis, one of them to connect
SILENT_AFTER_S = 150
FORGET_AFTER_S = 24 * 3600


class ReceiverTasks:
    """A thread of a web process, from `start` until `stop`."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._redis = fail_fast_redis(settings)
        self._metrics = metrics
        self._name = uuid.uuid4().hex
        self._heartbeat = self._redis.register_script(scripts.load("record_alive"))
        self._runner = PeriodicRunner(
            PeriodicTask("heartbeat", BEAT_EVERY_S, self._beat),
            PeriodicTask("flush metrics", FLUSH_EVERY_S, self._flush),
        )

    def start(self) -> None:
        """Begin."""
        self._runner.start()

    def stop(self) -> None:
        """Add up what is left, deregister, and end."""
        self._runner.stop(FLUSH_EVERY_S)
        with suppress(RedisError):
            self._flush()
            self._redis.zrem(KEY, self._name)

    def _beat(self) -> None:
        self._heartbeat(keys=[KEY], args=[self._name])

    def _flush(self) -> None:
        self._metrics.flush(self._redis)


def count(redis: Redis, now_s: int) -> dict[str, Any]:
    """Return how many receivers are alive at `now_s`, the time of Redis, and when one was last seen, in s.

    Raises RedisError.
    """
    with redis.pipeline(transaction=False) as pipeline:
        pipeline.zremrangebyscore(KEY, "-inf", now_s - FORGET_AFTER_S)
        pipeline.zcount(KEY, now_s - SILENT_AFTER_S, "+inf")
        pipeline.zrange(KEY, 0, 0, desc=True, withscores=True)
        _, alive, newest = pipeline.execute(raise_on_error=False)
    return {"alive": alive, "last_seen_s": newest[0][1] if newest else None}

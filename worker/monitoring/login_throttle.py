"""Limits the attempts with a wrong password per address, over all processes."""

import threading
import time
from ipaddress import IPv6Address, ip_address

from redis.exceptions import RedisError

from config import Settings
from worker.queue import scripts
from worker.redis_client import fail_fast_redis

KEY_PREFIX = "clerk-sync:attempts:"
WINDOW_S = 300
LIMIT = 10
REDIS_PAUSE_S = 10
KEPT = 10_000
IPV6_HOME_BITS = 64  # the smallest network that a provider gives to a customer


class LoginThrottle:
    """Counts attempts by address: after LIMIT wrong ones in WINDOW_S, further ones are refused.

    An attempt is counted before its password is compared, and subtracted if it is right. So simultaneous
    guesses are limited like sequential ones. A refused attempt is not counted, as its password may be right.
    Attempts are counted in Redis, and in this process while Redis is unavailable.
    """

    def __init__(self, settings: Settings) -> None:
        self._redis = fail_fast_redis(settings)
        self._lock = threading.Lock()
        self._here: dict[str, tuple[int, float]] = {}
        self._redis_again_at = 0.0

    def may_try(self, address: str | None) -> bool:
        """Say whether an attempt is allowed, and count it if so."""
        key = _key(address)
        if self._count_here(key, 1) > LIMIT:
            return False
        if self._count_in_redis(key, 1) > LIMIT:
            self._count_here(key, -1)
            return False
        return True

    def succeeded(self, address: str | None) -> None:
        """Subtract an attempt whose password was right."""
        key = _key(address)
        self._count_here(key, -1)
        self._count_in_redis(key, -1)

    def _count_here(self, key: str, by: int) -> int:
        with self._lock:
            now = time.monotonic()
            self._here = {key: entry for key, entry in self._here.items() if now - entry[1] < WINDOW_S}
            if len(self._here) >= KEPT:
                self._here.clear()
            count, since = self._here.get(key, (0, now))
            if count + by <= LIMIT:
                self._here[key] = (max(0, count + by), since)
            return count + by

    def _count_in_redis(self, key: str, by: int) -> int:
        if time.monotonic() < self._redis_again_at:
            return 0
        try:
            script, arguments = scripts.load("count_attempt"), (WINDOW_S, by, LIMIT)
            count: object = self._redis.eval(script, 1, KEY_PREFIX + key, *arguments)
        except RedisError:
            # Otherwise every request would wait for Redis's time-out.
            self._redis_again_at = time.monotonic() + REDIS_PAUSE_S
            return 0
        return count if isinstance(count, int) else 0


def _key(address: str | None) -> str:
    """Return the key for an address; all addresses of an IPv6 network share one."""
    try:
        parsed = ip_address(address or "")
    except ValueError:
        return "unknown"
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is None:
        return f"{int(parsed) >> (128 - IPV6_HOME_BITS):x}"
    return str(parsed)

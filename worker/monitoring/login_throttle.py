"""How often somebody has tried a wrong password lately, counted over all processes."""

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
IPV6_HOME_BITS = 64  # what one customer has at the least


class LoginThrottle:
    """Counts failed attempts by address: LIMIT of them in WINDOW_S are too many.

    They are counted in Redis, and beside it in this process alone: while Redis is away that has to do.
    """

    def __init__(self, settings: Settings) -> None:
        self._redis = fail_fast_redis(settings)
        self._here: dict[str, tuple[int, float]] = {}
        self._redis_again_at = 0.0

    def too_many(self, address: str | None) -> bool:
        """Say whether whoever is there must wait."""
        who = _who(address)
        return max(self._count_here(who), self._count_there(who)) >= LIMIT

    def failed(self, address: str | None) -> None:
        """Count one more."""
        who = _who(address)
        self._forget_old()
        count, since = self._here.get(who, (0, time.monotonic()))
        self._here[who] = (count + 1, since)
        if time.monotonic() >= self._redis_again_at:
            try:
                self._redis.eval(scripts.load("count_attempt"), 1, KEY_PREFIX + who, WINDOW_S)
            except RedisError:
                self._leave_redis_alone()

    def _count_here(self, who: str) -> int:
        count, since = self._here.get(who, (0, 0.0))
        return count if time.monotonic() - since < WINDOW_S else 0

    def _count_there(self, who: str) -> int:
        if time.monotonic() < self._redis_again_at:
            return 0
        try:
            count: object = self._redis.get(KEY_PREFIX + who)
        except RedisError:
            self._leave_redis_alone()
            return 0
        return int(count) if isinstance(count, bytes) and count.isdigit() else 0

    def _leave_redis_alone(self) -> None:
        # Every request would wait for its time-out.
        self._redis_again_at = time.monotonic() + REDIS_PAUSE_S

    def _forget_old(self) -> None:
        now = time.monotonic()
        self._here = {who: entry for who, entry in self._here.items() if now - entry[1] < WINDOW_S}
        if len(self._here) >= KEPT:
            self._here.clear()


def _who(address: str | None) -> str:
    """Return a key for an address: an IPv6 one counts with its whole network."""
    try:
        parsed = ip_address(address or "")
    except ValueError:
        return "unknown"
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is None:
        return f"{int(parsed) >> (128 - IPV6_HOME_BITS):x}"
    return str(parsed)

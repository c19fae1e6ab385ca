"""Clients for Redis: one that waits and retries, for workers, and one that fails fast, for quick answers.

A process opens at most REDIS_MAX_CONNECTIONS. In a receiver, deliveries and readiness have their own
connections; the others (health, metrics, console, pull) share OTHER_CONNECTIONS, so that a flood of requests
delays no delivery. Connections that are idle for IDLE_S are closed, because small plans allow few.
"""

import time
from collections.abc import Callable
from functools import lru_cache
from threading import Thread
from typing import Any, cast
from weakref import WeakMethod

import hiredis
from redis import BlockingConnectionPool, ConnectionPool, Redis
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ReadOnlyError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry

from config import ServiceError, Settings, SettingsError

FAIL_FAST_TIMEOUT_S = 1.5
PATIENCE_S = 15.0
IDLE_S = 10.0
OTHER_CONNECTIONS = 4  # one of them is for the heartbeat
# Options of redis-py 8.1 that are functions or other objects: a URL, which holds only text, cannot set them.
OBJECTS = frozenset(
    {
        "event_dispatcher",
        "oss_cluster_maint_notifications_handler",
        "redis_connect_func",
        "socket_keepalive_options",
        "socket_type",
    }
)
ENCODING_ERRORS = "surrogateescape"  # bytes that are not UTF-8 are written as they were read
# redis-py closes a connection on the errors that Retry names. ReadOnlyError is one of them: after a failover
# an open connection would lead to the old primary for as long as that lives.
FAIL_FAST: dict[str, Any] = {
    "socket_timeout": FAIL_FAST_TIMEOUT_S,
    "socket_connect_timeout": FAIL_FAST_TIMEOUT_S,
    "retry": Retry(NoBackoff(), 0, (RedisConnectionError, RedisTimeoutError, ReadOnlyError)),
}


class QueueUnavailable(ServiceError):
    """Redis did not accept or return a job. Waiting helps."""

    retryable = True


class OtherConnections(BlockingConnectionPool):
    """The connections of a receiver for everything except deliveries; a thread may have to wait for one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)  # type: ignore[no-untyped-call]
        close_regularly(self.close_idle)

    def close_idle(self) -> None:
        """Close the idle connections."""
        self.disconnect(inuse_connections=False)


def close_regularly(close_idle: Callable[[], None]) -> None:
    """Call this method every IDLE_S in a thread, until its object is deleted."""
    Thread(target=_close_regularly, args=(WeakMethod(close_idle),), name="redis-idle", daemon=True).start()


def _close_regularly(method: WeakMethod[Callable[[], None]]) -> None:
    time.sleep(IDLE_S)
    while close_idle := method():
        close_idle()
        del close_idle
        time.sleep(IDLE_S)


def packed(*command: str | bytes | int) -> bytes:
    """Return a command in Redis's protocol. Ids that are not UTF-8 are supported."""
    words = [part.encode(errors=ENCODING_ERRORS) if isinstance(part, str) else part for part in command]
    return cast("bytes", hiredis.pack_command(cast("Any", tuple(words))))


class _Packer:
    """Serializes commands for Redis; ids that are not UTF-8 are supported.

    As fast as redis-py's serializer for hiredis, which refuses lone surrogates; redis-py's other one, which
    accepts them, takes 2.5 times as long for an enqueue.
    """

    def pack(self, *args: str | bytes | float) -> list[bytes]:
        """Return a command; its name may consist of two words."""
        name, *rest = args
        words = name.split() if isinstance(name, str) else [name]
        return [packed(*cast("Any", words), *cast("Any", rest))]


def fail_fast_redis(settings: Settings) -> Redis:
    """Return a client for quick answers: no retries, short time-outs.

    All such clients of a process share OTHER_CONNECTIONS, so closing one leaves the connections open.
    """
    return Redis(connection_pool=_other_connections(settings))


@lru_cache(maxsize=4)
def _other_connections(settings: Settings) -> ConnectionPool:
    return _pool(settings, OtherConnections, OTHER_CONNECTIONS - 1, timeout=FAIL_FAST_TIMEOUT_S, **FAIL_FAST)


def heartbeat_redis(settings: Settings) -> Redis:
    """Return a client with the same time-outs for one thread, whose connection stays open."""
    return Redis.from_pool(_pool(settings, ConnectionPool, 1, **FAIL_FAST))


def delivery_redis(settings: Settings) -> Redis:
    """Return a client for deliveries, with the same time-outs and all remaining connections."""
    count = settings.redis_max_connections - OTHER_CONNECTIONS
    return Redis.from_pool(_pool(settings, ConnectionPool, count, **FAIL_FAST))


def worker_redis(settings: Settings) -> Redis:
    """Return a client for workers and commands, which retries for some seconds."""
    return Redis.from_pool(
        _pool(
            settings,
            BlockingConnectionPool,
            settings.redis_max_connections,
            timeout=PATIENCE_S,
            socket_timeout=PATIENCE_S,
            socket_connect_timeout=5,
            health_check_interval=30,
            # For connecting and for commands. A time-out is not retried: the caller must report it soon.
            retry=Retry(ExponentialBackoff(cap=0.4, base=0.05), 3, (RedisConnectionError, ReadOnlyError)),
        )
    )


def _pool(settings: Settings, kind: type[ConnectionPool], count: int, **options: Any) -> ConnectionPool:
    named: ConnectionPool = ConnectionPool.from_url(redis_url(settings))
    return kind(
        connection_class=named.connection_class,
        max_connections=count,
        # The URL's options come first: those that follow replace them.
        **named.connection_kwargs
        | _tls(settings)
        | options
        | {
            # Redis's maintenance notifications would lengthen the time-outs, and take a round trip each.
            "maint_notifications_config": MaintNotificationsConfig(enabled=False),
            "driver_info": None,
            "decode_responses": False,
            "encoding": "utf-8",
            "encoding_errors": ENCODING_ERRORS,
            "command_packer": _Packer(),
        },
    )


def _tls(settings: Settings) -> dict[str, Any]:
    """Return the TLS options in the settings, if the URL uses TLS. Without them the URL's options apply."""
    if not redis_url(settings).startswith("rediss://"):
        return {}
    ca_certs, cert_reqs = settings.redis_ssl_ca_certs, settings.redis_ssl_cert_reqs
    return {
        **({"ssl_ca_certs": ca_certs} if ca_certs else {}),
        **({"ssl_cert_reqs": cert_reqs, "ssl_check_hostname": cert_reqs == "required"} if cert_reqs else {}),
    }


def redis_url(settings: Settings) -> str:
    """Return the URL of Redis. Raises SettingsError when it is not set, or redis-py cannot read it."""
    if settings.redis_url is None:
        raise SettingsError("REDIS_URL is not set")
    url = settings.redis_url.get_secret_value()
    try:
        named = ConnectionPool.from_url(url)
        named.make_connection()  # this opens no connection
        is_readable = OBJECTS.isdisjoint(named.connection_kwargs)
    except (AttributeError, RedisError, TypeError, ValueError):
        is_readable = False
    if not is_readable:
        raise SettingsError("REDIS_URL has an option that cannot be read")
    return url

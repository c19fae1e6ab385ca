"""Clients for Redis: one that waits, for workers, and one that fails fast, for quick answers.

A process opens REDIS_MAX_CONNECTIONS at most. In a receiver deliveries and readiness have their own; all
else (health, metrics, console, pull) shares OTHER_CONNECTIONS: no flood of requests delays a delivery.
Connections that are idle for IDLE_S are closed: small plans allow few, and other processes need them.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, cast
from weakref import WeakMethod

import hiredis
from redis import BlockingConnectionPool, ConnectionPool, Redis
from redis import ConnectionError as RedisConnectionError
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import ReadOnlyError, RedisError, ResponseError
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry

from config import Settings, SettingsError

FAIL_FAST_TIMEOUT_S = 1.5
PATIENCE_S = 15.0
IDLE_S = 10.0
OTHER_CONNECTIONS = 4  # one of them is the heartbeat's
REFUSED_PAUSE_S = 0.05
READ_ONLY = "READONLY"
ENCODING_ERRORS = "surrogateescape"  # any id on the queue can be written again as it was read
FAIL_FAST: dict[str, Any] = {
    "socket_timeout": FAIL_FAST_TIMEOUT_S,
    "socket_connect_timeout": FAIL_FAST_TIMEOUT_S,
    "retry": Retry(NoBackoff(), 0),
}


class QueueUnavailable(Exception):
    """Redis did not take or give a job. Waiting helps."""

    retryable = True


class FewConnections:
    """A fixed number of connections to Redis for any number of threads, each of which asks one thing.

    redis-py's own pools look at a connection's socket each time before they hand it out. Here a connection
    that Redis has closed is noticed when it is used: an enqueue takes 44 µs of CPU instead of 85 with
    BlockingConnectionPool, of some 300 for a delivery.
    """

    def __init__(self, pool: ConnectionPool, count: int, patience_s: float) -> None:
        """`pool` makes the connections and keeps none of them."""
        self._pool = pool
        self._patience_s = patience_s
        self._idle: list[Any] = []  # the last used comes last
        self._made = False
        self._unused = 0  # how many of them, from the first on, have not been used since the last look
        self._permits: SimpleQueue[None] = SimpleQueue()
        for _ in range(count):
            self._permits.put(None)

    def ask(self, *command: str | bytes | int) -> Any:
        """Return Redis's answer. What is asked may be asked twice.

        Raises redis.RedisError, also when no connection is free for `patience_s`. While Redis has too many
        clients, a connection that is open already serves as soon as it is free.
        """
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                return self._ask_on_one(command)
            except RedisConnectionError as error:
                if not _too_many_clients(error) or time.monotonic() > deadline:
                    raise
            time.sleep(REFUSED_PAUSE_S)

    def _ask_on_one(self, command: Sequence[str | bytes | int]) -> Any:
        try:
            self._permits.get(timeout=self._patience_s)
        except Empty:
            raise RedisConnectionError("no connection is free") from None
        try:
            connection = self._take()
            try:
                return _ask(connection, command)
            finally:
                # one that could not be opened is the last to be tried again
                self._idle.insert(len(self._idle) if connection.is_connected else 0, connection)
        finally:
            self._permits.put(None)

    def _take(self) -> Any:
        try:
            connection = self._idle.pop()
        except IndexError:
            if not self._made:
                self._made = True
                close_regularly(self.close_idle)
            return self._pool.make_connection()
        self._unused = min(self._unused, len(self._idle))
        return connection

    def close_idle(self) -> None:
        """Close the connections that have not been used since this was called last."""
        closed = []
        with suppress(IndexError):  # those in use by now are not there
            for _ in range(self._unused):
                closed.append(connection := self._idle.pop(0))
                connection.disconnect()
        self._idle[:0] = closed  # they are opened again when they are needed
        self._unused = len(self._idle)

    def close(self) -> None:
        """Close the connections that are not in use."""
        for connection in self._idle:
            connection.disconnect()


class OtherConnections(BlockingConnectionPool):
    """The connections of a receiver for all but deliveries, for which a thread may have to wait."""

    def make_connection(self) -> Any:
        """Return a connection, which is not open yet."""
        if not self._connections:  # of redis-py's own, as in 8.1
            close_regularly(self.close_idle)
        made: Any = super().make_connection()  # type: ignore[no-untyped-call]
        return made

    def close_idle(self) -> None:
        """Close the connections that are not in use now."""
        self.disconnect(inuse_connections=False)


def close_regularly(close_idle: Callable[[], None]) -> None:
    """Call this method every IDLE_S in a thread of its own, for as long as its object is there."""
    Thread(target=_close_regularly, args=(WeakMethod(close_idle),), name="redis-idle", daemon=True).start()


def _close_regularly(method: WeakMethod[Callable[[], None]]) -> None:
    time.sleep(IDLE_S)
    while close_idle := method():
        close_idle()
        del close_idle
        time.sleep(IDLE_S)


def _too_many_clients(error: RedisConnectionError) -> bool:
    # Redis says so and closes the connection, which can reach us before its words do.
    return "max number of clients" in str(error) or "losed by server" in str(error) or "reset" in str(error)


def _ask(connection: Any, command: Sequence[str | bytes | int]) -> Any:
    was_open = connection.is_connected
    try:
        return _exchange(connection, command)
    except (RedisConnectionError, ResponseError):
        if not was_open or connection.is_connected:
            raise
        return _exchange(connection, command)  # Redis had closed it since, or leads no more


def _exchange(connection: Any, command: Sequence[str | bytes | int]) -> Any:
    try:
        connection.send_command(*command)
        return connection.read_response()
    except BaseException as error:
        # The next answer on it could be this command's. And a replica's address may lead to a new primary.
        if not isinstance(error, ResponseError) or _is_read_only(error):
            connection.disconnect()
        raise


def _is_read_only(error: Exception) -> bool:
    """Return whether Redis refused a write as a replica; before 7 a script's error has the code inside."""
    return isinstance(error, ReadOnlyError) or READ_ONLY in str(error)


class _Packer:
    """Writes commands for Redis, ids that are no UTF-8 included.

    As fast as redis-py's own, which takes no lone surrogates; its serializer that does takes 2.5 times as
    long for an enqueue.
    """

    def pack(self, *args: str | bytes | float) -> list[bytes]:
        """Return a command; its name may be of two words."""
        name, *rest = (arg.encode(errors=ENCODING_ERRORS) if isinstance(arg, str) else arg for arg in args)
        words = (*cast("bytes", name).split(), *rest)
        return [hiredis.pack_command(cast("Any", words))]


def fail_fast_redis(settings: Settings) -> Redis:
    """Return a client for what must answer soon: no retries, short time-outs.

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
    """Return a client for deliveries, with the same time-outs and the connections that are left for them."""
    count = settings.redis_max_connections - OTHER_CONNECTIONS
    return Redis.from_pool(_pool(settings, ConnectionPool, count, **FAIL_FAST))


def worker_redis(settings: Settings) -> Redis:
    """Return a patient client for workers and commands: it retries for some seconds by itself."""
    return Redis.from_pool(
        _pool(
            settings,
            BlockingConnectionPool,
            settings.redis_max_connections,
            timeout=PATIENCE_S,
            socket_timeout=PATIENCE_S,
            socket_connect_timeout=5,
            socket_keepalive=True,
            health_check_interval=30,
            retry=Retry(ExponentialBackoff(cap=0.4, base=0.05), 3),  # for each of connecting and asking
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
            # Redis's announcements of its maintenance would lengthen the time-outs; each costs a round trip.
            "maint_notifications_config": MaintNotificationsConfig(enabled=False),
            "driver_info": None,
            "decode_responses": False,
            "encoding_errors": ENCODING_ERRORS,
            "command_packer": _Packer(),
        },
    )


def _tls(settings: Settings) -> dict[str, Any]:
    """Return what the settings say of TLS, where the URL asks for it. Unset, the URL's own options count."""
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
        ConnectionPool.from_url(url).make_connection()  # which connects nowhere
    except (RedisError, TypeError, ValueError):
        raise SettingsError("REDIS_URL has an option that cannot be read") from None
    return url

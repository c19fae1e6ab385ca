"""The ways to Redis: patient for workers, impatient for whoever must answer soon."""

from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import Any, cast

import hiredis
from redis import ConnectionError as RedisConnectionError
from redis import ConnectionPool, Redis
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry

from config import Settings, SettingsError

FAIL_FAST_TIMEOUT_S = 1.5
PATIENCE_S = 15.0
READ_ONLY = "READONLY"
ENCODING_ERRORS = "surrogateescape"  # any id that somebody put on the queue can be named again


class QueueUnavailable(Exception):
    """Redis did not take or give a job. Waiting helps."""

    retryable = True


class FewConnections:
    """A fixed number of connections to Redis for any number of threads, each of which asks one thing.

    redis-py's own pools look at a connection's socket each time before they hand it out; that alone takes
    longer than a script. Here a connection that Redis has closed is noticed when it is used.
    """

    def __init__(self, pool: ConnectionPool, count: int, patience_s: float) -> None:
        self._pool = pool
        self._patience_s = patience_s
        self._idle: list[Any] = []
        self._permits: SimpleQueue[None] = SimpleQueue()
        for _ in range(count):
            self._permits.put(None)

    def ask(self, *command: str | bytes | int) -> Any:
        """Return Redis's answer. What is asked may be asked twice.

        Raises redis.RedisError, also when no connection is free for `patience_s`.
        """
        try:
            self._permits.get(timeout=self._patience_s)
        except Empty:
            raise RedisConnectionError("no connection is free") from None
        try:
            connection = self._take()
            try:
                return _ask(connection, command)
            finally:
                self._idle.append(connection)
        finally:
            self._permits.put(None)

    def _take(self) -> Any:
        try:
            return self._idle.pop()  # the last used
        except IndexError:
            return self._pool.make_connection()

    def close(self) -> None:
        """Close the connections that are not in use."""
        for connection in self._idle:
            connection.disconnect()


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
        # Nobody knows what would be read from it next. And where a replica answers now, another may lead at
        # the same address.
        if not isinstance(error, ResponseError) or READ_ONLY in str(error):
            connection.disconnect()
        raise


class _Packer:
    """Writes commands for Redis. redis-py's own takes no text with lone surrogates."""

    def pack(self, *args: str | bytes | float) -> list[bytes]:
        """Return a command; its name may be of two words."""
        name, *rest = (arg.encode(errors=ENCODING_ERRORS) if isinstance(arg, str) else arg for arg in args)
        words = (*cast("bytes", name).split(), *rest)
        return [hiredis.pack_command(cast("Any", words))]


def fail_fast_redis(settings: Settings) -> Redis:
    """Return a client for whoever must answer soon: no retries, short time-outs. Clerk delivers again."""
    return _client(
        settings,
        socket_timeout=FAIL_FAST_TIMEOUT_S,
        socket_connect_timeout=FAIL_FAST_TIMEOUT_S,
        retry=Retry(NoBackoff(), 0),
    )


def worker_redis(settings: Settings) -> Redis:
    """Return a patient client for workers and commands: it retries for some seconds by itself."""
    return _client(
        settings,
        socket_timeout=PATIENCE_S,
        socket_connect_timeout=5,
        socket_keepalive=True,
        health_check_interval=30,
        retry=Retry(ExponentialBackoff(cap=0.4, base=0.05), 3),  # for each of connecting and asking
    )


def _client(settings: Settings, **options: Any) -> Redis:
    # Redis's announcements of its maintenance would lengthen the time-outs, and each costs a round trip.
    quiet: Any = {"maint_notifications_config": MaintNotificationsConfig(enabled=False), "driver_info": None}
    pool: ConnectionPool = ConnectionPool.from_url(redis_url(settings), **quiet)
    # Afterwards, as what stands in the URL would go before it.
    pool.connection_kwargs.update(
        options, decode_responses=False, encoding_errors=ENCODING_ERRORS, command_packer=_Packer()
    )
    return Redis.from_pool(pool)


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

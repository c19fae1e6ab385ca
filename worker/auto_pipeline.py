"""Sends the commands of many threads over few connections: commands that wait are sent together.

A thread that finds a free connection sends immediately, together with all commands that wait; the other
threads wait for their answers. Under load one write to Redis and one read serve several deliveries. That
saves an eighth of a receiver's CPU time per delivery, and a quarter of Redis's (16 clients, two processes).
"""

import time
from collections.abc import Sequence
from concurrent.futures import wait
from contextlib import suppress
from threading import Lock
from typing import Any

from redis import ConnectionError as RedisConnectionError
from redis import ConnectionPool
from redis.exceptions import ReadOnlyError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from worker.redis_client import FAIL_FAST_TIMEOUT_S, close_regularly, packed
from worker.threads import in_background

MOST_AT_ONCE = 100  # commands, so that the first does not wait long for the last
REFUSED_PAUSE_S = 0.05
OPENING_S = 1.2 * FAIL_FAST_TIMEOUT_S  # so that a time-out of a single step occurs first, and names the cause
READ_ONLY = "READONLY"
_NONE_YET = object()


class AutoPipeline:
    """Sends commands to Redis for any number of threads, each with one command at a time."""

    def __init__(self, pool: ConnectionPool, connections: int, patience_s: float) -> None:
        """`pool` creates the connections, but keeps none of them."""
        self._pool = pool
        self._patience_s = patience_s
        self._free = connections
        self._lock = Lock()  # of `_free` and `_waiting`
        self._waiting: list[Asked] = []
        self._idle: list[Any] = []  # the most recently used is last
        self._unused = 0  # how many of them, from the first on, were not used since the last check
        close_regularly(self.close_idle)

    def ask(self, *command: str | bytes | int) -> Any:
        """Return Redis's answer. The command may be sent twice.

        Raises redis.RedisError, also if no connection is free for `patience_s`. While Redis refuses new
        clients, the command waits for a connection that is already open.
        """
        asked = Asked(packed(*command))
        self._join(asked)
        if not asked.turn.acquire(timeout=self._patience_s):
            if self._withdraw(asked):
                raise RedisConnectionError("no connection is free")
            asked.turn.acquire()  # it was sent: a time-out of its connection ends the wait
        if asked.leads:
            self._send_with_waiting(asked)
        if asked.error is None:
            return asked.answer
        try:
            raise asked.error
        finally:
            del asked  # the error refers to this frame, which would keep the body in memory

    def _join(self, asked: "Asked") -> None:
        with self._lock:
            if self._free:
                self._free -= 1
                asked.lead()
            else:
                self._waiting.append(asked)

    def _withdraw(self, asked: "Asked") -> bool:
        with self._lock:
            if asked not in self._waiting:
                return False
            self._waiting.remove(asked)
            return True

    def _send_with_waiting(self, first: "Asked") -> None:
        """Send this command and those that wait; pass the connection to the first that arrived meanwhile."""
        with self._lock:
            together = [first, *self._waiting[: MOST_AT_ONCE - 1]]
            del self._waiting[: MOST_AT_ONCE - 1]
        try:
            self._ask(together)
        except BaseException as error:
            for asked in together:
                if asked.is_open:
                    asked.fail(error)
            if not isinstance(error, RedisError):
                raise
        finally:
            with self._lock:
                if self._waiting:
                    self._waiting.pop(0).lead()
                else:
                    self._free += 1
            for asked in together[1:]:
                asked.turn.release()

    def _ask(self, together: "Sequence[Asked]") -> None:
        deadline = time.monotonic() + self._patience_s
        while True:
            try:
                self._ask_on_one(together)
            except RedisConnectionError as error:
                if not too_many_clients(error) or time.monotonic() > deadline:
                    raise
            else:
                return
            time.sleep(REFUSED_PAUSE_S)

    def _ask_on_one(self, together: "Sequence[Asked]") -> None:
        connection = self._take()
        try:
            if connection.is_connected:
                with suppress(RedisConnectionError):
                    _exchange(connection, together)
            if not connection.is_connected:  # not opened, closed by Redis, or of no use any more
                self._open(connection)
                _exchange(connection, together)
        except _StillOpening:
            raise
        except BaseException:
            self._keep(connection)
            raise
        self._keep(connection)

    def _open(self, connection: Any) -> None:
        """Open it within OPENING_S.

        Resolving the name, each address, TLS and each command have time-outs of their own. If all of it takes
        longer, it continues in the background, for later deliveries.
        """
        opening = in_background(connection.connect)
        if not wait([opening], OPENING_S).done:
            opening.add_done_callback(lambda _: self._keep(connection))
            raise _StillOpening("Timeout connecting to server")  # in redis-py's words
        opening.result()

    def _keep(self, connection: Any) -> None:
        # a connection that could not be opened is tried again last
        self._idle.insert(len(self._idle) if connection.is_connected else 0, connection)

    def _take(self) -> Any:
        try:
            connection = self._idle.pop()
        except IndexError:
            return self._pool.make_connection()
        self._unused = min(self._unused, len(self._idle))
        return connection

    @property
    def has_open(self) -> bool:
        """Whether a connection is open and free."""
        return any(connection.is_connected for connection in list(self._idle))

    def close_idle(self) -> None:
        """Close the connections that were not used since the last call."""
        closed = []
        with suppress(IndexError):  # some may be in use by now
            for _ in range(self._unused):
                closed.append(connection := self._idle.pop(0))
                connection.disconnect()
        self._idle[:0] = closed  # they are opened again on demand
        self._unused = len(self._idle)

    def close(self) -> None:
        """Close the idle connections."""
        for connection in self._idle:
            connection.disconnect()


class _StillOpening(RedisTimeoutError):
    """The connection is not open yet."""


class Asked:
    """A command whose thread waits until it must send the waiting commands, or has its answer."""

    __slots__ = ("answer", "command", "error", "leads", "turn")

    def __init__(self, command: bytes) -> None:
        self.command = command
        self.answer: Any = _NONE_YET
        self.error: BaseException | None = None
        self.leads = False
        self.turn = Lock()
        self.turn.acquire()

    def lead(self) -> None:
        """Make its thread send the waiting commands."""
        self.leads = True
        self.turn.release()

    def fail(self, error: BaseException) -> None:
        """Keep an error without its traceback, whose frames refer to other threads' commands."""
        self.error = error.with_traceback(None)

    @property
    def is_open(self) -> bool:
        """Whether it has no answer, or only a replica's: the address may lead to a new primary by now."""
        return self.answer is _NONE_YET and (self.error is None or _is_read_only(self.error))


def _exchange(connection: Any, together: "Sequence[Asked]") -> None:
    """Send the unanswered commands, and keep each answer. On RedisError the connection is closed."""
    asking = [asked for asked in together if asked.is_open]
    try:
        connection.send_packed_command([b"".join([asked.command for asked in asking])])
        for asked in asking:
            try:
                asked.answer = connection.read_response()
                asked.error = None
            except ResponseError as error:
                asked.fail(error)
    except BaseException:
        connection.disconnect()  # the next answer read from it could belong to one of these commands
        raise
    if any(asked.is_open for asked in asking):
        connection.disconnect()


def too_many_clients(error: RedisConnectionError) -> bool:
    """Say whether Redis may have refused the connection because it has too many."""
    # Redis sends this error and closes the connection; the close may be noticed before the error.
    text = str(error).lower()
    return any(words in text for words in ("max number of clients", "closed by server", "reset"))


def _is_read_only(error: BaseException) -> bool:
    """Return whether Redis refused a write as a replica; before 7 the code is inside a script's error."""
    return isinstance(error, ReadOnlyError) or READ_ONLY in str(error)

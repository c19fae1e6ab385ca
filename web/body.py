"""Reads a delivery's body within limits of size and memory; `web.body_timeout` limits the time.

The size is at most MAX_BODY_BYTES. The bodies that one process holds, finished or not, take at most
ORDINARY_BYTES for each connection, and LARGE_BODIES_BYTES for all larger ones together.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from wsgiref.types import WSGIEnvironment

from werkzeug.exceptions import RequestTimeout

ORDINARY_BYTES = 8 * 1024  # Clerk sends 0.3 to 3 kB, and more only with a lot of metadata
LARGE_BODIES_BYTES = 2 * 1024 * 1024


class BodyRefused(Exception):
    """The body is not read, or not to its end."""


class TooLarge(BodyRefused):
    """The body is larger than MAX_BODY_BYTES."""


class NoRoom(BodyRefused):
    """The body is large, and other large bodies occupy all the memory for them."""


class Incomplete(BodyRefused):
    """The body did not arrive completely, or not in time."""


class BodyReader:
    """Reads the bodies of one process, in many threads."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._room = max(LARGE_BODIES_BYTES, max_bytes)
        self._lock = threading.Lock()

    @contextmanager
    def body(self, environ: WSGIEnvironment) -> Iterator[bytes]:
        """Yield the whole body; its memory stays reserved until the block ends.

        Memory is reserved for each part before it is read, not for the declared length: else a few clients
        that declare large bodies and send nothing would leave no room for others.
        Raises TooLarge (before reading, if the length is declared), NoRoom and Incomplete.
        """
        length = _declared_length(environ)
        if length is not None and length > self._max_bytes:
            raise TooLarge("larger than MAX_BODY_BYTES")
        end = self._max_bytes + 1 if length is None else length
        parts: list[bytes] = []
        size = reserved = 0
        try:
            while size < end:
                step = min(ORDINARY_BYTES, end - size)
                if parts:
                    self._reserve(step)
                    reserved += step
                parts.append(_receive(environ, step))
                size += len(parts[-1])
                if len(parts[-1]) < step:
                    break
            if size > self._max_bytes:
                raise TooLarge("larger than MAX_BODY_BYTES")
            if length is not None and size < length:
                raise Incomplete("late or cut off")
            yield b"".join(parts)
        finally:
            if reserved:  # ordinary deliveries take no lock
                self._reserve(-reserved)

    def _reserve(self, size: int) -> None:
        with self._lock:
            if size > self._room:
                raise NoRoom("too many large bodies at once")
            self._room -= size


def _declared_length(environ: WSGIEnvironment) -> int | None:
    """Return the Content-Length, or None for a chunked body."""
    declared = environ.get("CONTENT_LENGTH", "")
    if declared.isascii() and declared.isdigit():
        # int() refuses more than 4,300 digits, and granian any length beyond 64 bits, but no leading zeros.
        return int(declared.lstrip("0") or "0")
    return None if environ.get("wsgi.input_terminated") else 0


def _receive(environ: WSGIEnvironment, size: int) -> bytes:
    try:
        received: bytes = environ["wsgi.input"].read(size)
    except RequestTimeout:
        raise Incomplete("late or cut off") from None
    return received

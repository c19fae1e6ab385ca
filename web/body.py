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

    retryable = True


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

        Raises TooLarge and NoRoom (before reading, if the length is declared), and Incomplete.
        """
        length = _declared_length(environ)
        if length is None:
            yield from self._body_of_any_length(environ)
        elif length > self._max_bytes:
            raise TooLarge("larger than MAX_BODY_BYTES")
        elif length <= ORDINARY_BYTES:
            yield _read(environ, length)
        else:
            with self._room_for(length):
                yield _read(environ, length)

    def _body_of_any_length(self, environ: WSGIEnvironment) -> Iterator[bytes]:
        ordinary = min(ORDINARY_BYTES, self._max_bytes)
        beginning = _receive(environ, ordinary + 1)
        if len(beginning) <= ordinary:
            yield beginning
            return
        with self._room_for(self._max_bytes):
            body = beginning + _receive(environ, self._max_bytes + 1 - len(beginning))
            if len(body) > self._max_bytes:
                raise TooLarge("larger than MAX_BODY_BYTES")
            yield body

    @contextmanager
    def _room_for(self, length: int) -> Iterator[None]:
        with self._lock:
            if length > self._room:
                raise NoRoom("too many large bodies at once")
            self._room -= length
        try:
            yield
        finally:
            with self._lock:
                self._room += length


def _declared_length(environ: WSGIEnvironment) -> int | None:
    """Return the Content-Length, or None for a chunked body."""
    declared = environ.get("CONTENT_LENGTH", "")
    if declared.isascii() and declared.isdigit():
        # int() refuses more than 4,300 digits, and granian any length beyond 64 bits, but no leading zeros.
        return int(declared.lstrip("0") or "0")
    return None if environ.get("wsgi.input_terminated") else 0


def _read(environ: WSGIEnvironment, length: int) -> bytes:
    body = _receive(environ, length)
    if len(body) < length:
        raise Incomplete("late or cut off")
    return body


def _receive(environ: WSGIEnvironment, size: int) -> bytes:
    try:
        received: bytes = environ["wsgi.input"].read(size)
    except RequestTimeout:
        raise Incomplete("late or cut off") from None
    return received

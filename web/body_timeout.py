"""Ends requests whose body arrives too slowly, and connections while few are left.

Granian waits for a body without a time limit, and the wait occupies a thread and a connection. Only closing
the connection ends it, but granian gives only the client's address, without the port. So a thread looks for
late bodies, and closes the connections from their addresses on which nothing was sent for as long: that of
the late body, and idle ones. Clients open a new connection, and Clerk repeats a delivery that a proxy loses
by this.

While connections are scarce, every answer ends its connection, and `web.connections` closes others.
"""

import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import Any
from wsgiref.types import InputStream, StartResponse, WSGIApplication, WSGIEnvironment

from werkzeug.exceptions import RequestTimeout

from web.connections import SUPPORTED, Connections, Limits

# "100 Continue" is sent just after the time limit of its body has started.
AFTER_CONTINUE_S = 1.0


class BodyTimeout:
    """A WSGI application whose bodies must arrive within `body_timeout_s` after the headers.

    Reading a late body raises werkzeug's RequestTimeout.
    """

    def __init__(self, app: WSGIApplication, port: int, limits: Limits) -> None:
        self._app = app
        self._limits = limits
        self._connections = Connections(port, limits)
        self._awaited: set[_Body] = set()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Call the application with a body that has a time limit."""
        environ["wsgi.input"] = _Body(
            environ["wsgi.input"], environ["REMOTE_ADDR"], self._limits.body_timeout_s, self._awaited
        )
        if self._connections.scarce:
            start_response = _ending(start_response)
        return _whole(self._app(environ, start_response))

    def watch(self) -> None:
        """Start a thread that closes the connections that take too long."""
        if SUPPORTED:
            threading.Thread(target=self._watch, name="connections", daemon=True).start()

    def _watch(self) -> None:
        while True:
            time.sleep(self._limits.look_every_s)
            with suppress(OSError):  # no file descriptor is left to open the list of connections
                self._connections.make_room()
                late = {body.address for body in list(self._awaited) if body.is_late()}
                if late:
                    self._connections.close_silent(late, self._limits.body_timeout_s - AFTER_CONTINUE_S)


class _Body:
    """The part of `wsgi.input` that werkzeug uses. It is in `awaited` while a thread waits for more data."""

    __slots__ = ("_awaited", "_began", "_stream", "_timeout_s", "address")

    def __init__(self, stream: InputStream, address: str, timeout_s: float, awaited: "set[_Body]") -> None:
        self._stream = stream
        self._awaited = awaited
        self._began = time.monotonic()
        self._timeout_s = timeout_s
        self.address = address

    def is_late(self) -> bool:
        return time.monotonic() - self._began > self._timeout_s

    def read(self, *size: int) -> bytes:
        self._awaited.add(self)
        try:
            data = self._stream.read(*size)
        finally:
            self._awaited.discard(self)
        if self.is_late():
            raise RequestTimeout  # the part that arrived may look complete: granian reports no error
        return data


def _ending(start_response: StartResponse) -> StartResponse:
    """Return a start_response that ends the connection after the answer."""

    def start(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        return start_response(status, [*headers, ("Connection", "close")], exc_info)

    return start


def _whole(answer: Iterable[bytes]) -> list[bytes]:
    """Return the answer in one piece: granian sends a list without holding a thread for it."""
    try:
        return [b"".join(answer)]
    finally:
        if hasattr(answer, "close"):
            answer.close()

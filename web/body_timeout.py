"""How long a body may take to come, BODY_TIMEOUT_S, and how long a connection may idle when many do.

Granian waits for a body as long as the client likes, with a thread and one of its connections. Only the end
of the connection ends that wait, and of a connection granian tells the client's address without the port.
So once a second a thread looks for bodies that are late, and closes what their address has open here and has
been sent nothing on for as long. That is the late one's connection, and beside it any that idles: a client
opens another, and Clerk delivers again what a proxy loses with it.

When a process has most of the connections that it takes, whatever idles as long makes room, a head that does
not end included: those who wait to be accepted are behind it.

Only Linux says when something was last sent. Elsewhere a late body is refused once it is there.
"""

import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Protocol
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from werkzeug.exceptions import RequestTimeout

BODY_TIMEOUT_S = 10.0
LOOK_EVERY_S = 1.0
# "100 Continue" is sent just after the clock of its body has started.
SILENT_S = BODY_TIMEOUT_S - 1
CROWDED = 0.75  # of the connections that a process takes
OPEN_FILES = "/proc/self/fd"
# linux/tcp.h, struct tcp_info: tcpi_last_data_sent, in ms. Before anything is sent it counts from the accept.
LAST_DATA_SENT = struct.Struct("=44xI")


class BodyTimeout:
    """A WSGI application whose bodies have to come within BODY_TIMEOUT_S of their head.

    Reading one that is late raises werkzeug's RequestTimeout.
    """

    def __init__(self, app: WSGIApplication) -> None:
        self._app = app
        self._awaited: set[_Body] = set()

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Pass the request on, with a body that is watched while it is read."""
        environ["wsgi.input"] = _Body(environ["wsgi.input"], environ["REMOTE_ADDR"], self._awaited)
        return self._app(environ, start_response)

    def watch(self, port: int, connections: int) -> None:
        """Close the connections to `port` that take too long, in a thread, from now on.

        This process takes `connections` at a time.
        """
        if sys.platform == "linux":
            threading.Thread(target=self._watch, args=(port, CROWDED * connections), daemon=True).start()

    def _watch(self, port: int, crowded: float) -> None:
        while True:
            time.sleep(LOOK_EVERY_S)
            late = {body.address for body in list(self._awaited) if body.is_late()}
            with suppress(OSError):  # no file descriptor left to look with
                if len(os.listdir(OPEN_FILES)) > crowded:
                    _close_silent(port)
                elif late:
                    _close_silent(port, late)


class _Readable(Protocol):
    def read(self, size: int | None = None, /) -> bytes: ...


class _Body:
    """What werkzeug needs of `wsgi.input`; it is in `awaited` while somebody waits for more of it."""

    __slots__ = ("_awaited", "_began", "_stream", "address")

    def __init__(self, stream: _Readable, address: str, awaited: "set[_Body]") -> None:
        self._stream = stream
        self._awaited = awaited
        self._began = time.monotonic()
        self.address = address

    def is_late(self) -> bool:
        return time.monotonic() - self._began > BODY_TIMEOUT_S

    def read(self, size: int | None = None) -> bytes:
        self._awaited.add(self)
        try:
            data = self._stream.read(size)
        finally:
            self._awaited.discard(self)
        if self.is_late():
            raise RequestTimeout  # what has come of it may look whole: granian tells no error
        return data


def _close_silent(port: int, addresses: Collection[str] | None = None) -> None:
    """Close the connections to `port`, from these addresses or any, that were sent nothing for SILENT_S."""
    for name in os.listdir(OPEN_FILES):
        with suppress(OSError), _duplicate(int(name)) as connection:  # it may be gone, or none
            if connection.getsockname()[1:] != (port,):
                continue
            peer = connection.getpeername()[0]  # an OSError where we listen
            if (addresses is None or peer in addresses) and _silent_s(connection) > SILENT_S:
                connection.shutdown(socket.SHUT_RDWR)


def _duplicate(number: int) -> socket.socket:
    # Granian may close the original at any time, and its number may be another connection's then.
    duplicate = os.dup(number)
    try:
        return socket.socket(fileno=duplicate)
    except OSError:
        os.close(duplicate)
        raise


def _silent_s(connection: socket.socket) -> float:
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, LAST_DATA_SENT.size)
    (milliseconds,) = LAST_DATA_SENT.unpack(info)
    return float(milliseconds) / 1000

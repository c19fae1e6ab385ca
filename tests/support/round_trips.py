"""A TCP proxy that counts round trips, whatever the protocol.

    with TripCounter(url) as counter:
        client = connect(counter.url)
        with counter.counting() as trips:
            client.ask()
        assert trips.count == 1

One side's bytes are passed on when it has been quiet for a while, and only then is the other side heard. So
what a client sends without waiting for an answer is one burst, however it was cut into packets, and every
burst after an answer is one round trip.
"""

import select
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Self
from urllib.parse import urlsplit

from tests.support.databases import with_place

QUIET_S = 0.04
CHUNK = 1 << 16


class Trips:
    """What was counted: round trips, and the bytes that clients sent."""

    def __init__(self) -> None:
        self.count = 0
        self.sent = b""


class TripCounter:
    """Listens on a port of its own and leads every connection to the server in `target`, a URL."""

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = with_place(target, f"127.0.0.1:{self._listener.getsockname()[1]}")
        self._trips = Trips()
        self._sockets: list[socket.socket] = []

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for connection in self._sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def counting(self) -> Iterator[Trips]:
        """Count anew for the length of the block."""
        self._trips = trips = Trips()
        yield trips
        self._trips = Trips()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                self._sockets += [client, server]
                threading.Thread(target=self._lead, args=(client, server), daemon=True).start()

    def _lead(self, client: socket.socket, server: socket.socket) -> None:
        answered = True
        with suppress(OSError), client, server:
            while True:
                speaker = select.select([client, server], [], [])[0][0]
                burst = _burst(speaker)
                if not burst:
                    return
                if speaker is client:
                    self._trips.count += answered
                    self._trips.sent += burst
                (server if speaker is client else client).sendall(burst)
                answered = speaker is server


def _burst(speaker: socket.socket) -> bytes:
    """Return what a side says before it falls quiet; nothing when it has hung up."""
    said = b""
    while select.select([speaker], [], [], QUIET_S)[0]:
        chunk = speaker.recv(CHUNK)
        if not chunk:
            break
        said += chunk
    return said

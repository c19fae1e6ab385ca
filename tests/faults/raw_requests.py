"""Requests as bytes, over connections of their own."""

import select
import socket
import time
from contextlib import suppress

from cli.dev.servers import HOST
from tests.faults.service import Service
from tests.support.deliveries import PATH, genuine, signed

ANSWER_S = 5.0
HALF_CLOSED_AFTER_S = 0.5


def genuine_request() -> bytes:
    """Return a delivery as it goes over the wire."""
    content = genuine()
    fields = {
        **signed(content),
        "host": "localhost",
        "content-length": str(len(content)),
        "connection": "close",
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST {PATH} HTTP/1.1\r\n{head}\r\n".encode() + content


def connect(service: Service) -> socket.socket:
    return socket.create_connection((HOST, service.ports[0]), ANSWER_S)


def answer_to(service: Service, raw: bytes) -> int:
    """Send a request and return the status, or 0 if the connection is closed without an answer.

    A receiver may wait for the rest of a request, so after HALF_CLOSED_AFTER_S the sending side is closed.
    """
    with connect(service) as connection, suppress(ConnectionError):
        connection.sendall(raw)
        ready, _, _ = select.select([connection], [], [], HALF_CLOSED_AFTER_S)
        if not ready:
            connection.shutdown(socket.SHUT_WR)
        line = connection.recv(65536).split(b"\r\n")[0]
        return int(line.split()[1]) if line else 0
    return 0


def taken_in(service: Service) -> float:
    """Send a genuine delivery, which must be accepted, and return the time to the answer, in s."""
    began = time.monotonic()
    assert answer_to(service, genuine_request()) == 202
    return time.monotonic() - began

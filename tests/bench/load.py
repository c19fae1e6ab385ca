"""The load client: signed deliveries over bare sockets, in a process of its own.

    python -m tests.bench.load '{"port": 8000, "seconds": 4, …}'     (the fields of Spec)

All requests are signed before the clock starts, each with a svix-id of its own. Closed loop: every connection
sends its next delivery when the last one is answered. Open loop: deliveries are due at a fixed rate whatever
the server does, and latency counts from when each was due. When the server closes a connection, the next
delivery opens a new one. Prints a LoadReport as JSON.

Bare sockets and one `select` take a third of the CPU time of an HTTP library or asyncio, and so leave more of
the shared cores to the servers.
"""

import gc
import json
import math
import selectors
import signal
import socket
import sys
import time
from base64 import b64decode
from collections import Counter
from typing import NamedTuple

from cli.samples import signed_headers
from tests.bench.events import traffic

HOST = "127.0.0.1"
PATH = "/webhooks/clerk"
CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 20.0
LONGEST_WAIT_S = 0.2
ATTEMPTS = 3


class Spec(NamedTuple):
    """What to send: the `traffic` of a seed, at most `deliveries` of them within `seconds`.

    With a `rate` (deliveries/s) the loop is open: it sends `rate * seconds` deliveries, and ends early when
    it is `give_up_s` late. Deliveries that begin in the first `warm_up_s` do not count in the rate and the
    latencies.
    """

    port: int
    secret: str
    seed: int
    seconds: float
    deliveries: int = 0
    connections: int = 16
    rate: float | None = None
    warm_up_s: float = 0.0
    give_up_s: float = 2.0
    keep_alive: bool = True


class LoadReport(NamedTuple):
    """The result. `sent_at` (s since the epoch) has one entry per delivery sent, in their order.

    `failed` counts the answers other than 2xx, and deliveries without an answer. `cpu_us` is the client's own
    CPU time per delivery. `late_s` is the time from when the last delivery was due until it was answered.
    """

    rate: float
    p50_ms: float
    p99_ms: float
    answered: int
    failed: int
    connected: int
    gave_up: bool
    late_s: float
    cpu_us: float
    sent_at: list[float]


class Connection:
    """One of the client's connections, and the delivery that is on it."""

    def __init__(self, port: int, selector: selectors.BaseSelector) -> None:
        self.index = -1
        self.began = 0.0
        self.connected = 0
        self._port = port
        self._selector = selector
        self._socket: socket.socket | None = None
        self._request = b""
        self._answer = b""
        self._attempts = 0

    def send(self, index: int, request: bytes, began: float) -> int | None:
        """Send the delivery of that index, over a new connection when the server has closed the last one.

        Returns None, or 0 when the server takes no connection.
        """
        self.index, self.began, self._request, self._attempts = index, began, request, 0
        return self._send()

    def read(self) -> int | None:
        """Read; return the status once the whole answer is there, or 0 if there will be none."""
        assert self._socket
        try:
            data = self._socket.recv(65536)
        except ConnectionError:
            data = b""
        self._answer += data
        if not data:
            return self._closed()
        head, separator, body = self._answer.partition(b"\r\n\r\n")
        if not separator:
            return None
        head = head.lower()
        status, length = int(head[9:12]), _content_length(head)
        if length is None or len(body) < length:
            return None
        if b"\r\nconnection: close" in head:
            self.close()
        self._answer = b""
        return status

    def close(self) -> None:
        """Close the socket; the next delivery opens another."""
        if self._socket:
            self._selector.unregister(self._socket)
            self._socket.close()
            self._socket = None

    def _send(self) -> int | None:
        while self._attempts < ATTEMPTS:
            self._attempts += 1
            try:
                self._open().sendall(self._request)
            except OSError:
                self.close()
            else:
                return None
        return 0

    def _open(self) -> socket.socket:
        self._answer = b""
        if self._socket is None:
            self._socket = socket.create_connection((HOST, self._port), CONNECT_TIMEOUT_S)
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(self._socket, selectors.EVENT_READ, self)
            self.connected += 1
        return self._socket

    def _closed(self) -> int | None:
        """Close the connection that the server has closed, and return as `read` does."""
        self.close()
        if self.index < 0:
            return None
        if not self._answer:  # the server closed it before it read the delivery, which is sent again
            return self._send()
        head, separator, _ = self._answer.partition(b"\r\n\r\n")
        return int(head[9:12]) if separator and _content_length(head.lower()) is None else 0


class Client:
    """Sends the deliveries of a Spec."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._requests = signed_requests(spec)
        # Its timeout has µs; epoll would round every pause up to a whole ms
        self._selector = selectors.SelectSelector()
        self._connections = [Connection(spec.port, self._selector) for _ in range(spec.connections)]
        self._idle = list(self._connections)
        self._statuses: Counter[int] = Counter()
        self._latencies: list[tuple[float, float]] = []
        self._sent_at: list[float] = []
        self._gave_up = False
        self._stopped = False
        self._start = 0.0

    def run(self) -> LoadReport:
        """Send until the time is over, wait for the last answers, and report."""
        signal.signal(signal.SIGTERM, self._stop)
        gc.freeze()
        gc.disable()
        cpu = time.process_time()
        self._start = time.perf_counter()
        while self._wants_more():
            self._send_what_is_due()
            self._read(self._pause())
        deadline = time.perf_counter() + ANSWER_TIMEOUT_S
        while len(self._idle) < len(self._connections) and time.perf_counter() < deadline:
            self._read(LONGEST_WAIT_S)
        return self._report(time.process_time() - cpu)

    def _wants_more(self) -> bool:
        now, sent = time.perf_counter(), len(self._sent_at)
        if self._stopped or sent >= len(self._requests):
            return False
        if self._spec.rate is None:
            return now < self._start + self._spec.seconds
        self._gave_up = now - self._due(sent) > self._spec.give_up_s
        return not self._gave_up

    def _send_what_is_due(self) -> None:
        sent = len(self._sent_at)
        now = time.perf_counter()
        while self._idle and sent < len(self._requests) and self._due(sent) <= now:
            connection = self._idle.pop()
            self._sent_at.append(time.time())
            began = self._due(sent) if self._spec.rate else now
            self._settle(connection, connection.send(sent, self._requests[sent], began))
            sent += 1
            now = time.perf_counter()

    def _read(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            connection: Connection = key.data
            self._settle(connection, connection.read())

    def _settle(self, connection: Connection, status: int | None) -> None:
        if status is not None and connection.index >= 0:
            self._statuses[status] += 1
            self._latencies.append((connection.began, time.perf_counter() - connection.began))
            connection.index = -1
            self._idle.append(connection)

    def _due(self, index: int) -> float:
        return self._start if self._spec.rate is None else self._start + index / self._spec.rate

    def _pause(self) -> float:
        if not self._idle:
            return LONGEST_WAIT_S
        return min(max(self._due(len(self._sent_at)) - time.perf_counter(), 0), LONGEST_WAIT_S)

    def _stop(self, *_: object) -> None:
        self._stopped = True

    def _report(self, cpu_s: float) -> LoadReport:
        counted_from = self._start + self._spec.warm_up_s
        counted = [(began, latency) for began, latency in self._latencies if began >= counted_from]
        latencies = sorted(latency * 1000 for _, latency in counted)
        end = max((began + latency for began, latency in counted), default=counted_from)
        succeeded = sum(count for status, count in self._statuses.items() if 200 <= status < 300)
        return LoadReport(
            rate=len(counted) / (end - counted_from) if counted else 0.0,
            p50_ms=percentile(latencies, 50),
            p99_ms=percentile(latencies, 99),
            answered=succeeded,
            failed=len(self._sent_at) - succeeded,
            connected=sum(connection.connected for connection in self._connections),
            gave_up=self._gave_up or self._stopped,
            late_s=max(0.0, end - self._due(len(self._sent_at) - 1)) if self._spec.rate else 0.0,
            cpu_us=cpu_s * 1e6 / max(len(self._sent_at), 1),
            sent_at=self._sent_at,
        )


def percentile(ordered: list[float], percent: float) -> float:
    """Return the value that `percent` of the values do not exceed (nearest rank); 0 without values."""
    if not ordered:
        return 0.0
    return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)]


def signed_requests(spec: Spec) -> list[bytes]:
    """Return the HTTP requests, each signed for now."""
    key = b64decode(spec.secret.removeprefix("whsec_"))  # without config, which takes long to import
    now_s = int(time.time())
    count = int(spec.rate * spec.seconds) if spec.rate else spec.deliveries
    return [
        _request(spec, event.svix_id, event.body.encode(), key, now_s)
        for event in traffic(count, seed=spec.seed)
    ]


def _request(spec: Spec, svix_id: str, body: bytes, key: bytes, now_s: int) -> bytes:
    headers = {
        "host": f"{HOST}:{spec.port}",
        "user-agent": "Svix-Webhooks/1.0",
        "content-length": str(len(body)),
        **signed_headers(key, svix_id, now_s, body),
        **({} if spec.keep_alive else {"connection": "close"}),
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {PATH} HTTP/1.1\r\n{lines}\r\n".encode() + body


def _content_length(head: bytes) -> int | None:
    """Return the length of the body from a lower-case head; None if the body ends with the connection."""
    _, found, rest = head.partition(b"\r\ncontent-length:")
    if found:
        return int(rest.partition(b"\r\n")[0])
    return 0 if head[9:12] == b"204" else None


def main() -> None:
    report = Client(Spec(**json.loads(sys.argv[1]))).run()
    sys.stdout.write(json.dumps(report._asdict()))


if __name__ == "__main__":
    main()

"""An HTTP server that keeps what is posted to it, in the place of the receiver."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import AF_INET, AF_INET6
from typing import NamedTuple, Self


class RecordedRequest(NamedTuple):
    """`client` tells the connections apart; `at` is when it came, in s of the monotonic clock."""

    path: str
    headers: dict[str, str]
    body: bytes
    client: tuple[str, int]
    at: float


class Recorder(ThreadingHTTPServer):
    """Keeps each request, and gives `answer` after `answer_s`."""

    request_queue_size = 128
    daemon_threads = True

    def __init__(
        self,
        address: str = "127.0.0.1",
        *,
        protocol: str = "HTTP/1.1",
        answer_s: float = 0,
        status: int = 202,
    ) -> None:
        self.address_family = AF_INET6 if ":" in address else AF_INET
        super().__init__((address, 0), RecordingHandler)
        self.requests: list[RecordedRequest] = []
        self.answer = (status, b'{"status":"queued"}')
        self.answer_s = answer_s
        self.protocol = protocol

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @contextmanager
    def running(self) -> Iterator[Self]:
        """Serve for the length of the block."""
        with self:
            thread = threading.Thread(target=self.serve_forever, args=(0.01,))
            thread.start()
            try:
                yield self
            finally:
                self.shutdown()
                thread.join(20)


class RecordingHandler(BaseHTTPRequestHandler):
    server: Recorder

    def setup(self) -> None:
        super().setup()
        self.protocol_version = self.server.protocol

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append(
            RecordedRequest(self.path, headers, body, self.client_address, time.monotonic())
        )
        time.sleep(self.server.answer_s)
        status, answer = self.server.answer
        self.send_response(status)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Say nothing."""

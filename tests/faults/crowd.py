"""A crowd of connections that stay open as long as they can, and genuine deliveries beside it.

    python -m tests.faults.crowd PORT WAY SECONDS      the crowd alone, as a process of its own

When the receiver closes a connection, the crowd opens another one at once.
"""

import asyncio
import base64
import os
import random
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from statistics import quantiles
from typing import NamedTuple

from cli.dev.servers import HOST
from tests.faults.raw_requests import genuine_request
from tests.faults.service import ROOT, Service
from tests.support.processes import family, pss_mb

CONNECTIONS = 1200
LARGE = 1024 * 1024
SOON_S = 2.0
GROWTH_MB = 80  # the promise is 100
PAUSE_S = 0.1
GIVES_UP_S = 15  # as Svix does
FULL_AFTER_S = 3.0

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def head(length: int | None = None, *, chunked: bool = False) -> bytes:
    """Return the head of a forged delivery; its headers look genuine."""
    signature = base64.b64encode(os.urandom(32)).decode()
    how = "transfer-encoding: chunked" if chunked else f"content-length: {length}"
    return (
        f"POST /webhooks/clerk HTTP/1.1\r\nHost: x\r\nsvix-id: msg_{random.getrandbits(60)}\r\n"
        f"svix-timestamp: {int(time.time())}\r\nsvix-signature: v1,{signature}\r\n{how}\r\n\r\n"
    ).encode()


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()


async def drip(streams: Streams, data: bytes, every_s: float, at_once: int = 1) -> None:
    """Send the data in small pieces, and read nothing before the end."""
    reader, writer = streams
    for start in range(0, len(data), at_once):
        writer.write(data[start : start + at_once])
        await writer.drain()
        await asyncio.sleep(every_s)
    await reader.read()


async def ask_now_and_then(streams: Streams, request: bytes, every_s: float) -> None:
    """Send a request every `every_s` seconds, and read the answers."""
    reader, writer = streams
    await asyncio.sleep(random.random() * every_s)
    while True:
        writer.write(request)
        await writer.drain()
        if not await reader.read(65536):
            return
        await asyncio.sleep(every_s)


async def send_and_hold(streams: Streams, data: bytes) -> None:
    """Send all of it, and wait for the end of the connection."""
    reader, writer = streams
    writer.write(data)
    await writer.drain()
    while await reader.read(65536):
        pass


async def read_slowly(streams: Streams, requests: bytes) -> None:
    """Send many requests, and read a byte of the answers now and then."""
    reader, writer = streams
    writer.write(requests)
    while await reader.read(1):
        await asyncio.sleep(1)


WAYS: dict[str, Callable[[Streams], Awaitable[None]]] = {
    "nothing": lambda s: send_and_hold(s, b""),
    "a GET every 4 s": lambda s: ask_now_and_then(s, get("/health/live"), 4),
    "a 404 every 8 s": lambda s: ask_now_and_then(s, get("/x"), 8),
    "a forgery every 2 s": lambda s: ask_now_and_then(s, head(2) + b"{}", 2),
    "GETs without a pause": lambda s: ask_now_and_then(s, get("/health/live"), 0),
    "readiness without a pause": lambda s: ask_now_and_then(s, get("/health/ready"), 0),
    "half a head": lambda s: send_and_hold(s, head(2000)[:-2]),
    "a head, dripping": lambda s: drip(s, head(2000), 0.5),
    "a head of 15 kB, unfinished": lambda s: send_and_hold(s, head(2000)[:-2] + b"x: " + b"a" * 15_000),
    "half a body": lambda s: send_and_hold(s, head(2000) + b"a" * 1000),
    "a body, dripping": lambda s: drip(s, head(2000) + b"a" * 1000, 0.5, 300),
    "a chunked body without an end": lambda s: send_and_hold(s, head(chunked=True) + b"5\r\naaaaa\r\n"),
    "all but the last byte of 16 kB": lambda s: send_and_hold(s, head(16_384) + b"a" * 16_383),
    "all but the last byte of 1 MiB": lambda s: send_and_hold(s, head(LARGE) + b"a" * (LARGE - 1)),
    "1 MiB in chunks, unfinished": lambda s: send_and_hold(
        s, head(chunked=True) + (b"10000\r\n" + b"a" * 65536 + b"\r\n") * 15
    ),
    "1 MiB, whole and forged": lambda s: send_and_hold(s, head(LARGE) + b"a" * LARGE),
    "100 GETs in a row, read slowly": lambda s: read_slowly(s, get("/metrics") * 100),
    "10,000 GETs in a row": lambda s: send_and_hold(s, get("/health/live") * 10_000),
}


async def crowd(port: int, way: str, seconds: float) -> None:
    """Hold CONNECTIONS for `seconds`."""
    hold = WAYS[way]
    ends_at = time.monotonic() + seconds
    asyncio.get_running_loop().call_later(FULL_AFTER_S, sys.stdout.write, "full\n")

    async def one() -> None:
        while time.monotonic() < ends_at:
            with suppress(OSError, asyncio.TimeoutError):
                streams = await asyncio.open_connection(HOST, port)
                try:
                    await asyncio.wait_for(hold(streams), ends_at - time.monotonic())
                finally:
                    streams[1].transport.abort()

    await asyncio.gather(*(one() for _ in range(CONNECTIONS)))


class SeenBesideCrowd(NamedTuple):
    """The answers to deliveries on new connections beside a crowd; memory is the receiver's PSS."""

    way: str
    sent: int
    refused: int
    p95_s: float
    slowest_s: float
    growth_mb: float


def beside(service: Service, way: str, seconds: float) -> SeenBesideCrowd:
    """Deliver to the receiver beside a crowd for `seconds`; `refused` counts the answers other than 202."""
    (receiver,), (port,) = service.receivers, service.ports
    idle = most = memory_mb(receiver.living_pid)
    refused = 0
    times: list[float] = []
    lasts_s = str(seconds + FULL_AFTER_S)
    argv = [sys.executable, "-u", "-m", "tests.faults.crowd", str(port), way, lasts_s]
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE) as client:
        try:
            assert client.stdout
            assert client.stdout.readline() == b"full\n"
            ends_at = time.monotonic() + seconds
            while time.monotonic() < ends_at:
                began = time.monotonic()
                refused += _status(port) != 202
                times.append(time.monotonic() - began)
                most = max(most, memory_mb(receiver.living_pid))
                time.sleep(PAUSE_S)
        finally:
            client.kill()
    p95_s = quantiles(times, n=20, method="inclusive")[-1] if len(times) > 1 else times[0]
    return SeenBesideCrowd(way, len(times), refused, p95_s, max(times), most - idle)


def _status(port: int) -> int:
    """Send a genuine delivery on a connection of its own; return the status, or 0 without an answer."""
    with suppress(OSError), socket.create_connection((HOST, port), GIVES_UP_S) as connection:
        connection.sendall(genuine_request())
        return int(connection.recv(65536)[9:12] or b"0")
    return 0


def check(seen: SeenBesideCrowd, soon_s: float = SOON_S) -> None:
    """Fail unless 95 % of the deliveries were answered soon, and memory grew little."""
    assert seen.p95_s < soon_s, seen
    assert seen.refused <= min(seen.sent / 4, max(1, seen.sent / 20)), seen  # one of few
    assert seen.growth_mb < GROWTH_MB, seen


def memory_mb(pid: int) -> float:
    """Return the memory of a process and its children; shared pages count once."""
    return sum(map(pss_mb, family(pid)))


def main(port: str, way: str, seconds: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    asyncio.run(crowd(int(port), way, float(seconds)))


if __name__ == "__main__":
    main(*sys.argv[1:])

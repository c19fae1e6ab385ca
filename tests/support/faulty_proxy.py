"""The network between the service and its servers: slow, forgetful, or in front of one that starts up."""

import asyncio
import math
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from weakref import WeakSet

from tests.support.databases import with_place
from tests.support.proxy import HOST, End, OneWay, Proxy

SSL_REQUEST = struct.pack("!II", 8, 80877103)
# What PostgreSQL answers while it recovers. Source: PostgreSQL documentation, "Message Formats"
FIELDS = b"SFATAL\0VFATAL\0C57P03\0Mthe database system is starting up\0\0"
STARTING_UP = b"E" + struct.pack("!I", 4 + len(FIELDS)) + FIELDS
START_S = 10


class FaultyProxy(Proxy):
    """A proxy in a thread of this process; every connection is as slow as the proxy is at that moment."""

    def __init__(self, target_port: int) -> None:
        super().__init__(target_port, 0)
        self._listener = socket.create_server((HOST, 0), backlog=1024)
        self.port: int = self._listener.getsockname()[1]
        self._ways: WeakSet[OneWay] = WeakSet()
        self._refuses = False
        self._listens = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"proxy {self.port}", daemon=True)

    def start(self) -> None:
        """Begin to pass connections on."""
        self._thread.start()
        assert self._listens.wait(START_S)

    def stop(self) -> None:
        """Close every connection and end."""
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join(START_S)

    @contextmanager
    def slow(self, delay_s: float) -> Iterator[None]:
        """Let every byte take that long, each way, for the length of the block."""
        self._loop.call_soon_threadsafe(self._set_delay, delay_s)
        try:
            yield
        finally:
            self._loop.call_soon_threadsafe(self._set_delay, 0)

    @contextmanager
    def starting_up(self) -> Iterator[None]:
        """Answer every new connection as a PostgreSQL does that is recovering."""
        self._refuses = True
        try:
            yield
        finally:
            self._refuses = False

    def forget(self) -> None:
        """Let nothing arrive any more on the connections there are, without a word to either end."""
        self._loop.call_soon_threadsafe(self._forget)

    def cut(self) -> None:
        """Close every connection there is, in the middle of whatever is on its way."""
        self._loop.call_soon_threadsafe(self._abort)

    def accept(self) -> End:
        """Return the client's end of a new connection."""
        if self._refuses:
            return Refusal()
        end = super().accept()
        self._ways.update((end._onward, end._back))
        return end

    def _set_delay(self, delay_s: float) -> None:
        self._delay_s = delay_s
        for way in self._ways:
            way._delay_s = delay_s

    def _forget(self) -> None:
        for way in self._ways:
            way._delay_s = math.inf

    def _abort(self) -> None:
        for way in self._ways:
            if way._exit:
                way._exit.abort()

    def _run(self) -> None:
        with asyncio.Runner() as runner:
            self._loop = runner.get_loop()
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._closing = asyncio.Event()
        async with await self._loop.create_server(self.accept, sock=self._listener, backlog=1024) as server:
            self._listens.set()
            await self._closing.wait()
            server.close()
            self._abort()
            await asyncio.sleep(0)  # a transport is closed one turn after it was aborted


@contextmanager
def proxy_to(url: str) -> Iterator[tuple[FaultyProxy, str]]:
    """Give a proxy to where `url` leads, on this machine, and the URL through it."""
    port = urlsplit(url).port
    assert port
    proxy = FaultyProxy(port)
    proxy.start()
    try:
        yield proxy, with_place(url, f"{HOST}:{proxy.port}")
    finally:
        proxy.stop()


class Refusal(End):
    """The client's end of a connection to a PostgreSQL that is not ready."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        assert self._transport
        if data == SSL_REQUEST:
            self._transport.write(b"N")
        else:
            self._transport.write(STARTING_UP)
            self._transport.close()

    def connection_lost(self, _error: Exception | None) -> None:
        self._transport = None

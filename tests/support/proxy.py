"""A TCP proxy that puts a server farther away: every byte arrives a fixed time later, in its order.

    python -m tests.support.proxy LISTEN_PORT TARGET_PORT DELAY_MS

It runs in a process of its own, so that it delays no other process. Only time is added: however much is on
its way at once, nothing waits for anything but its own delay.
"""

import asyncio
import selectors
import sys
from collections import deque
from collections.abc import Callable

HOST = "127.0.0.1"
READY = "ready"


class OneWay:
    """One direction of a connection. What is sent goes out `delay_s` later; None is the end."""

    def __init__(self, delay_s: float, opens_at: float) -> None:
        self._delay_s = delay_s
        self._opens_at = opens_at
        self._loop = asyncio.get_running_loop()
        self._travelling: deque[tuple[float, bytes | None]] = deque()
        self._exit: asyncio.Transport | None = None

    def send(self, data: bytes | None) -> None:
        """Let `data` begin its way."""
        due = max(self._loop.time(), self._opens_at) + self._delay_s
        self._travelling.append((due, data))
        if len(self._travelling) == 1 and self._exit:
            self._loop.call_at(due, self._arrive)

    def lead_to(self, transport: asyncio.Transport) -> None:
        """Name the connection where all comes out, also what was sent before that connection was made."""
        self._exit = transport
        if self._travelling:
            self._loop.call_at(self._travelling[0][0], self._arrive)

    def _arrive(self) -> None:
        if self._exit is None:
            return
        while self._travelling and self._travelling[0][0] <= self._loop.time():
            _, data = self._travelling.popleft()
            if data is None:
                self._exit.close()
            elif not self._exit.is_closing():
                self._exit.write(data)
        if self._travelling:
            self._loop.call_at(self._travelling[0][0], self._arrive)


class End(asyncio.Protocol):
    """One of the two sockets of a connection."""

    def __init__(self, onward: OneWay, back: OneWay) -> None:
        self._onward = onward
        self._back = back

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        # No sender waits because much is on its way: that would be a narrower line, not a longer one.
        transport.set_write_buffer_limits(sys.maxsize)
        self._back.lead_to(transport)

    def data_received(self, data: bytes) -> None:
        self._onward.send(data)

    def connection_lost(self, _error: Exception | None) -> None:
        self._onward.send(None)


class Proxy:
    """Accepts connections and leads each to the target."""

    def __init__(self, target_port: int, delay_s: float) -> None:
        self._target_port = target_port
        self._delay_s = delay_s
        self._connecting: set[asyncio.Task[None]] = set()

    def accept(self) -> End:
        """Return the client's end of a new connection."""
        # The client believes itself connected at once; over a real line that had taken a round trip.
        opens_at = asyncio.get_running_loop().time() + 2 * self._delay_s
        there, back = OneWay(self._delay_s, opens_at), OneWay(self._delay_s, opens_at)
        task = asyncio.create_task(self._connect(there, back))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)
        return End(there, back)

    async def _connect(self, there: OneWay, back: OneWay) -> None:
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: End(back, there), HOST, self._target_port
            )
        except OSError:
            back.send(None)


async def serve(listen_port: int, target_port: int, delay_s: float, on_ready: Callable[[], None]) -> None:
    """Pass on every connection to `listen_port` until the process is ended."""
    proxy = Proxy(target_port, delay_s)
    server = await asyncio.get_running_loop().create_server(proxy.accept, HOST, listen_port, backlog=1024)
    on_ready()
    await server.serve_forever()


def precise_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop that keeps time to some µs: epoll counts in whole ms, and rounds up."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


def main() -> None:
    """Run one proxy; it says READY once it listens."""
    listen_port, target_port, delay_ms = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    with asyncio.Runner(loop_factory=precise_loop) as runner:
        runner.run(serve(listen_port, target_port, delay_ms / 1000, _say_ready))


def _say_ready() -> None:
    sys.stdout.write(f"{READY}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

"""The receiver as it runs in production: its processes, over real HTTP."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Self

import pytest
from werkzeug.test import Client

from cli.dev.servers import HOST, RedisServer, free_port
from tests.support.deliveries import FORGERY, PATH, genuine, signed
from tests.support.payloads import svix_id
from tests.support.processes import clerk_sync
from tests.support.queue import RqView
from tests.support.receiver_with_short_limits import LIMITS
from tests.support.service_process import Line, ServiceProcess
from tests.support.settings import SECRET, UNREACHABLE_DATABASE_URL, GivenServer, MakeSettings
from tests.support.stack import environment
from tests.support.together import together
from tests.support.waiting import wait_until
from web import body_timeout
from web.app import create_app
from web.body_timeout import BodyTimeout
from web.connections import Limits

ROOT = Path(__file__).parents[2]
SLOW_CLIENTS = 100
DEADLINE_S = 20
OWN_MB = 25  # a process that imports everything itself has 100 MB of its own

only_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere no late connection is closed")


class Answer(NamedTuple):
    status: int
    json: object
    headers: http.client.HTTPMessage


class ReceiverProcess(ServiceProcess):
    """`clerk-sync web` in a process of its own, with short limits; it answers once it is started."""

    def __init__(
        self, redis_url: str, directory: Path, port: int, *, host: str = "0.0.0.0", client: str = HOST
    ) -> None:
        env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "CLERK_WEBHOOK_SIGNING_SECRET": SECRET,
            "DATABASE_URL": UNREACHABLE_DATABASE_URL,
            "REDIS_URL": redis_url,
            "PORT": str(port),
            "HOST": host,
            "WEB_WORKERS": "2",
            "LOG_FORMAT": "json",
        }
        command = [sys.executable, "-m", "tests.support.receiver_with_short_limits"]
        super().__init__(f"receiver-{time.monotonic_ns()}", command, env, directory)
        self.port = port
        self.address = client

    def start(self) -> Self:
        """Start it, and wait until it answers."""
        super().start()
        wait_until(self._answers, DEADLINE_S, self.text)
        return self

    def _answers(self) -> bool:
        assert self.running, self.text()
        with suppress(OSError, http.client.HTTPException):
            return self.request("GET", "/health/live").status == 200
        return False

    def children(self) -> set[int]:
        """Return the process ids of the serving processes."""
        listed = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True
        ).stdout
        rows = [line.split() for line in listed.splitlines()]
        return {int(pid) for pid, ppid, stat in rows if int(ppid) == self.pid and not stat.startswith("Z")}

    def connect(self) -> socket.socket:
        """Open a connection."""
        return socket.create_connection((HOST, self.port), DEADLINE_S)

    def request(
        self, method: str, path: str, content: object = None, headers: dict[str, str] | None = None
    ) -> Answer:
        """Send a request on a connection of its own."""
        connection = http.client.HTTPConnection(self.address, self.port, timeout=DEADLINE_S)
        try:
            connection.request(method, path, content, headers or {})  # type: ignore[arg-type]  # str, bytes, iterable
            return _read(connection.getresponse())
        finally:
            connection.close()

    def deliver(self, content: bytes | None = None, id_: str | None = None) -> Answer:
        """Send a genuine delivery."""
        content = genuine() if content is None else content
        return self.request("POST", PATH, content, signed(content, id_=id_))

    def deliveries(self) -> list[Line]:
        """Return what it has logged since it said that it starts: a line for each delivery, and no other."""
        started, *lines = map(json.loads, self.text().splitlines())
        assert (started["event"], started["port"]) == ("receiver started", self.port)
        return lines


def statuses(receiver: ReceiverProcess) -> list[str]:
    """Return what the log says of each delivery."""
    return [str(line["status"]) for line in receiver.deliveries()]


def _read(response: http.client.HTTPResponse) -> Answer:
    text = response.read()
    return Answer(response.status, json.loads(text) if text else None, response.headers)


@pytest.fixture(scope="module")
def shared(
    redis_server: RedisServer | GivenServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ReceiverProcess]:
    """A running receiver for tests that do not end it, on a database of Redis that other tests empty."""
    with ReceiverProcess(redis_server.url, tmp_path_factory.mktemp("web"), free_port()) as receiver:
        yield receiver


@pytest.fixture
def receiver(redis_url: str, tmp_path: Path) -> Iterator[ReceiverProcess]:
    """A running receiver of the test's own."""
    with ReceiverProcess(redis_url, tmp_path, free_port()) as running:
        yield running


def request_of(content: bytes, id_: str | None = None, *, length: int | None = None) -> tuple[bytes, bytes]:
    """Return head and body of a genuine delivery."""
    fields = {
        **signed(content, id_=id_),
        "host": "localhost",
        "content-length": str(len(content) if length is None else length),
    }
    lines = [f"POST {PATH} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items()), "", ""]
    return "\r\n".join(lines).encode(), content


def first_line(connection: socket.socket) -> bytes:
    return connection.recv(65536).split(b"\r\n")[0]


def test_deliveries_are_taken_on_one_connection_after_another(shared: ReceiverProcess) -> None:
    ids = [svix_id() for _ in range(20)]
    connection = http.client.HTTPConnection(HOST, shared.port, timeout=DEADLINE_S)
    for id_ in ids:
        connection.request("POST", PATH, genuine(), signed(id_=id_))
        answer = _read(connection.getresponse())
        assert (answer.status, answer.json) == (202, {"status": "queued"})
    connection.close()
    assert {str(shared.deliver(id_=id_).json) for id_ in ids} == {"{'status': 'duplicate'}"}


def test_a_chunked_delivery_is_taken(shared: ReceiverProcess) -> None:
    content = genuine()
    answer = shared.request("POST", PATH, iter([content[:100], content[100:]]), signed(content))
    assert (answer.status, answer.json) == (202, {"status": "queued"})


@pytest.mark.parametrize(
    ("header", "wrong"),
    [
        ("svix-id", b""),
        ("svix-id", b"a b"),
        ("svix-timestamp", b"1700000000"),
        ("svix-signature", b"v1,short"),
    ],
)
def test_what_headers_alone_show_is_refused_before_the_body_comes(
    header: str, wrong: bytes, shared: ReceiverProcess
) -> None:
    head, _ = request_of(genuine())
    with shared.connect() as connection:
        connection.sendall(
            re.sub(rf"(?mi)^{header}: .*?\r$".encode(), f"{header}: ".encode() + wrong + b"\r", head)
        )
        assert first_line(connection) == b"HTTP/1.1 400 Bad Request"


def test_a_length_is_read_whatever_its_leading_zeros(shared: ReceiverProcess) -> None:
    head, content = request_of(genuine())
    with shared.connect() as connection:
        connection.sendall(head.replace(b"content-length: ", b"content-length: " + b"0" * 5000) + content)
        assert first_line(connection) == b"HTTP/1.1 202 Accepted"


def test_a_body_that_is_too_large_is_refused_before_it_comes(shared: ReceiverProcess) -> None:
    head, _ = request_of(genuine(), length=2 * 1024 * 1024)
    with shared.connect() as connection:
        connection.sendall(head)
        assert first_line(connection) == b"HTTP/1.1 413 Payload Too Large"
    assert shared.deliver().status == 202


def test_a_chunked_body_that_is_too_large_is_refused_before_it_ends(shared: ReceiverProcess) -> None:
    head, _ = request_of(genuine())
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with shared.connect() as connection:
        connection.sendall(head.replace(b"content-length: ", b"transfer-encoding: chunked\r\nx-length: "))
        connection.sendall(chunk * 17)
        assert first_line(connection) == b"HTTP/1.1 413 Payload Too Large"
    assert shared.deliver().status == 202


def test_large_bodies_that_are_announced_and_do_not_come_keep_no_large_one_out(
    shared: ReceiverProcess,
) -> None:
    announced, content = request_of(genuine(), length=1024 * 1024)
    large = genuine() + b" " * 20_000
    with ExitStack() as stack:
        for _ in range(16):
            stack.enter_context(shared.connect()).sendall(announced + content[:100])
        assert [shared.deliver(large).status for _ in range(20)] == [202] * 20


def test_a_large_body_is_taken_in_parts_of_any_size(shared: ReceiverProcess) -> None:
    head, content = request_of(genuine() + b" " * 100_000)
    with shared.connect() as connection:
        connection.sendall(head)
        for part in (content[:1], content[1:8192], content[8192:50_001], content[50_001:]):
            connection.sendall(part)
            time.sleep(0.05)
        assert first_line(connection) == b"HTTP/1.1 202 Accepted"


def test_a_client_that_asks_first_is_asked_to_go_on(shared: ReceiverProcess) -> None:
    head, content = request_of(genuine())
    with shared.connect() as connection:
        connection.sendall(head.replace(b"\r\n\r\n", b"\r\nexpect: 100-continue\r\n\r\n"))
        assert first_line(connection) == b"HTTP/1.1 100 Continue"
        connection.sendall(content)
        assert first_line(connection) == b"HTTP/1.1 202 Accepted"


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"[" * 50_000 + b"]" * 50_000, 202),
        (b"[" * 900 + b"]" * 900, 202),
        (b'{"type":"user.created","data":' + b"9" * 6000 + b"}", 202),
        (b"\xff", 400),
    ],
    ids=["50,000 deep", "900 deep", "6,000 digits", "not UTF-8"],
)
def test_json_that_is_hard_to_read_ends_no_process(
    shared: ReceiverProcess, content: bytes, status: int
) -> None:
    before = shared.children()
    assert [shared.deliver(content).status for _ in range(8)] == [status] * 8
    assert shared.children() == before


POST = f"POST {PATH} HTTP/1.1\r\nHost: x\r\n".encode()
ODD_REQUESTS = {
    "percent without hex": b"GET /%zz%1 HTTP/1.1\r\nHost: x\r\n\r\n",
    "percent, not UTF-8": b"GET /%ff%fe%00 HTTP/1.1\r\nHost: x\r\n\r\n",
    "path, not ASCII": b"GET /\xfc HTTP/1.1\r\nHost: x\r\n\r\n",
    "path with NUL": b"GET /\x00 HTTP/1.1\r\nHost: x\r\n\r\n",
    "path of 70,000": b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "length negative": POST + b"Content-Length: -1\r\n\r\n",
    "length no number": POST + b"Content-Length: abc\r\n\r\n",
    "length with sign": POST + b"Content-Length: +5\r\n\r\nabcde",
    "length beyond 64 bits": POST + b"Content-Length: 99999999999999999999999\r\n\r\n",
    "length of 63 bits": POST + b"Content-Length: 9223372036854775807\r\n\r\n",
    "two lengths": POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "length and chunked": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "unknown encoding": POST + b"Transfer-Encoding: gzip\r\n\r\n",
    "chunked not last": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n",
    "chunk no number": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n",
    "unknown expectation": POST + b"Expect: 200-maybe\r\nContent-Length: 2\r\n\r\n{}",
    "no body": POST + b"\r\n",
    "HEAD": f"HEAD {PATH} HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
    "CONNECT": b"CONNECT a:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    "unknown method": b"BREW / HTTP/1.1\r\nHost: x\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "bad host": b"GET / HTTP/1.1\r\nHost: :::[\r\n\r\n",
    "host, not ASCII": b"GET / HTTP/1.1\r\nHost: xn--\xfc\r\n\r\n",
    "host with a bad port": b"GET / HTTP/1.1\r\nHost: x:99999999\r\n\r\n",
    "header with NUL": POST + b"svix-id: a\x00b\r\nContent-Length: 0\r\n\r\n",
    "headers, not ASCII": POST
    + b"svix-id: \xe9\r\nsvix-timestamp: \xb2\r\nsvix-signature: v1,\xff\r\nContent-Length: 0\r\n\r\n",
    "header of 1 MB": POST + b"X: " + b"a" * 1_000_000 + b"\r\n\r\n",
    "500 headers": POST + b"X: a\r\n" * 500 + b"Content-Length: 0\r\n\r\n",
    "HTTP/1.0": b"GET / HTTP/1.0\r\n\r\n",
    "HTTP/0.9": b"GET /\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": bytes.fromhex("160301020001fc0303") + b"a" * 50,
    "absolute URL": b"GET http://u:p@evil/health/live HTTP/1.1\r\nHost: x\r\n\r\n",
    "bad absolute URL": b"GET http://[::1/ HTTP/1.1\r\nHost: x\r\n\r\n",
    "WebSocket": POST.replace(b"POST", b"GET") + b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    "bad form": POST + b"Content-Type: multipart/form-data; boundary=\xff\r\nContent-Length: 3\r\n\r\nabc",
    "bad cookie": b"GET / HTTP/1.1\r\nHost: x\r\nCookie: session=\xff;;=\r\n\r\n",
    "junk": b"\xff\xfe\r\n\r\n",
}


def test_odd_requests_are_answered_below_500_and_end_no_process(shared: ReceiverProcess) -> None:
    before = shared.children()
    statuses = {name: _status(shared, raw) for name, raw in ODD_REQUESTS.items()}
    assert {name: status for name, status in statuses.items() if status >= 500} == {}
    assert shared.children() == before
    assert shared.deliver().status == 202


def _status(receiver: ReceiverProcess, raw: bytes) -> int:
    """Return the status of the answer; 0 when the connection is closed without one."""
    with receiver.connect() as connection, suppress(ConnectionError):
        connection.sendall(raw)
        line = first_line(connection)
        return int(line.split()[1]) if line else 0
    return 0


def test_a_client_that_leaves_half_way_is_harmless_and_no_forger(
    receiver: ReceiverProcess,
) -> None:
    head, content = request_of(genuine())
    for raw in (head[:50], head, head + content[:100]):
        with receiver.connect() as connection:
            connection.sendall(raw)
    assert receiver.deliver().status == 202
    wait_until(lambda: len(receiver.deliveries()) == 3, DEADLINE_S)
    assert sorted(statuses(receiver)) == ["incomplete", "incomplete", "queued"]


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_hundred_clients_that_send_a_byte_a_second_block_no_delivery(
    shared: ReceiverProcess, part: str
) -> None:
    head, content = request_of(genuine())
    raw, begin = head + content, len(head) if part == "body" else 1
    with slow_clients(shared, raw, begin):
        times = [time_of_delivery(shared) for _ in range(20)]
    assert sorted(times)[14] < 2  # the machine may be late with some


def time_of_delivery(receiver: ReceiverProcess) -> float:
    started = time.monotonic()
    assert receiver.deliver().status == 202
    return time.monotonic() - started


@only_linux
def test_a_body_that_does_not_end_is_cut_off_and_one_that_comes_slowly_is_taken(
    receiver: ReceiverProcess,
) -> None:
    whole = b"".join(request_of(genuine()))
    head, content = request_of(genuine())
    chunked = head.replace(b"content-length: ", b"transfer-encoding: chunked\r\nx-length: ")
    beginnings = [head, head + content[:100], chunked, chunked + b"40\r\n" + content[:64], whole + head]
    with ExitStack() as stack:
        endless = [stack.enter_context(receiver.connect()) for _ in beginnings]
        for connection, beginning in zip(endless, beginnings, strict=True):
            connection.sendall(beginning)
        time.sleep(LIMITS.body_timeout_s * 0.6)
        assert send_slowly(receiver, seconds=LIMITS.body_timeout_s * 0.5) == b"HTTP/1.1 202 Accepted"
        assert b"202 Accepted" in endless[-1].recv(65536)
        assert [at_its_end(connection, DEADLINE_S) for connection in endless] == [True] * len(endless)
    wait_until(lambda: statuses(receiver).count("incomplete") == len(beginnings), DEADLINE_S)
    assert set(statuses(receiver)) == {"queued", "incomplete"}


def send_slowly(receiver: ReceiverProcess, *, seconds: float) -> bytes:
    head, content = request_of(genuine())
    with receiver.connect() as connection:
        connection.sendall(head)
        for start in range(0, len(content), 1 + len(content) // 20):
            time.sleep(seconds / 20)
            connection.sendall(content[start : start + 1 + len(content) // 20])
        return first_line(connection)


def at_its_end(connection: socket.socket, within_s: float = 0) -> bool:
    connection.settimeout(within_s)
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True
    except (BlockingIOError, TimeoutError):
        return False


@only_linux
@pytest.mark.parametrize("part", ["head", "body"])
def test_more_unfinished_requests_than_it_has_connections_hold_it_up_for_seconds_at_most(
    receiver: ReceiverProcess, part: str
) -> None:
    head, content = request_of(genuine())
    begin = len(head) + 1 if part == "body" else 1
    before = open_files(receiver)
    with slow_clients(receiver, head + content, begin, 2 * LIMITS.connections + 176):
        started = time.monotonic()
        assert receiver.deliver().status == 202
        assert time.monotonic() - started < LIMITS.body_timeout_s + 8
    started = time.monotonic()
    assert [receiver.deliver().status for _ in range(20)] == [202] * 20
    assert time.monotonic() - started < 20
    wait_until(lambda: open_files(receiver) < before + 20, DEADLINE_S)
    refused = statuses(receiver).count("incomplete")
    assert (20 <= refused <= 40) is (part == "body")  # of each process the first ones have a line


@only_linux
def test_a_crowd_that_does_nothing_makes_room_and_a_few_may_idle(receiver: ReceiverProcess) -> None:
    with ExitStack() as stack:
        few = [stack.enter_context(receiver.connect()) for _ in range(10)]
        time.sleep(LIMITS.body_timeout_s + 2)
        assert not any(at_its_end(connection) for connection in few)
        crowd = [stack.enter_context(receiver.connect()) for _ in range(2 * LIMITS.connections)]
        wait_until(lambda: all(at_its_end(connection) for connection in few), DEADLINE_S)
        wait_until(
            lambda: sum(map(at_its_end, crowd)) > LIMITS.connections * (1 - LIMITS.scarce_from), DEADLINE_S
        )


def open_files(receiver: ReceiverProcess) -> int:
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in receiver.children())


@contextmanager
def slow_clients(
    receiver: ReceiverProcess, raw: bytes, begin: int, number: int = SLOW_CLIENTS
) -> Iterator[None]:
    stop = threading.Event()

    def drip(connections: list[socket.socket]) -> None:
        sent = begin
        while not stop.wait(1):
            for connection in connections:
                with suppress(ConnectionError):  # cut off
                    connection.sendall(raw[sent : sent + 1])
            sent += 1

    with ExitStack() as stack:
        connections = [stack.enter_context(receiver.connect()) for _ in range(number)]
        for connection in connections:
            connection.sendall(raw[:begin])
        thread = threading.Thread(target=drip, args=(connections,))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join(DEADLINE_S)


def test_a_redis_that_hangs_holds_no_caller_for_long(tmp_path: Path) -> None:
    with socket.create_server((HOST, 0), backlog=200) as silent:
        url = f"redis://{HOST}:{silent.getsockname()[1]}/0"
        with ReceiverProcess(url, tmp_path, free_port()) as waiting:
            answers: list[tuple[int, float]] = []

            def deliver() -> None:
                started = time.monotonic()
                status = waiting.deliver().status
                answers.append((status, time.monotonic() - started))

            together([deliver] * 40, 60)
    assert {status for status, _ in answers} == {503}
    assert len(answers) == 40
    assert max(seconds for _, seconds in answers) < 5


def test_a_process_that_is_killed_is_replaced(shared: ReceiverProcess) -> None:
    before = shared.children()
    killed = min(before)
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: len(shared.children() - {killed}) == 2, DEADLINE_S)
    for _ in range(20):
        assert shared.deliver().status == 202


def test_sigterm_finishes_what_is_in_hand(receiver: ReceiverProcess, rq: RqView) -> None:
    id_ = svix_id()
    head, content = request_of(genuine(), id_)
    with receiver.connect() as connection:
        connection.sendall(head + content[:100])
        assert receiver.deliver().status == 202
        os.kill(receiver.living_pid, signal.SIGTERM)
        time.sleep(0.5)
        connection.sendall(content[100:])
        assert first_line(connection) == b"HTTP/1.1 202 Accepted"
    assert receiver.await_end(DEADLINE_S) == 0
    assert rq.places(id_) == ["queue"]


def test_sigterm_under_load_loses_nothing_that_was_accepted(receiver: ReceiverProcess, rq: RqView) -> None:
    accepted: list[str] = []

    def deliver_until_it_is_gone() -> None:
        with suppress(OSError, http.client.HTTPException):
            while True:
                id_ = svix_id()
                if receiver.deliver(id_=id_).status == 202:
                    accepted.append(id_)

    def stop_it() -> None:
        wait_until(lambda: len(accepted) > 100, DEADLINE_S)
        os.kill(receiver.living_pid, signal.SIGTERM)

    together([stop_it, *[deliver_until_it_is_gone] * 8], 60)
    assert receiver.await_end(DEADLINE_S) == 0
    assert set(accepted) <= set(rq.queue.get_job_ids())


def test_sigterm_does_not_wait_for_clients_that_never_end(receiver: ReceiverProcess) -> None:
    head, _ = request_of(genuine())
    with receiver.connect() as in_head, receiver.connect() as in_body, receiver.connect():
        in_head.sendall(head[:50])
        in_body.sendall(head)
        assert receiver.deliver().status == 202
        started = time.monotonic()
        assert receiver.stop(within=DEADLINE_S) == 0
        assert time.monotonic() - started < 10


def test_processes_whose_parent_was_killed_end(receiver: ReceiverProcess) -> None:
    children = receiver.children()
    receiver.stop(signal.SIGKILL)
    wait_until(lambda: not any(_alive(pid) for pid in children), DEADLINE_S)


def _alive(pid: int) -> bool:
    ran = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return ran.stdout.strip() not in ("", "Z")


def test_a_port_that_is_taken_ends_the_command_with_one_line(
    shared: ReceiverProcess, make_settings: MakeSettings, tmp_path: Path
) -> None:
    settings = make_settings(
        database_url=UNREACHABLE_DATABASE_URL, database_url_unpooled=None, port=shared.port
    )
    second = ServiceProcess("second", clerk_sync("web"), environment(settings), tmp_path).start()
    assert second.await_end(DEADLINE_S) == 1
    assert second.text() == f"clerk-sync: cannot listen on port {shared.port}: Address already in use\n"
    assert shared.deliver().status == 202


def test_the_log_has_a_line_for_each_delivery_and_no_other(receiver: ReceiverProcess) -> None:
    id_ = svix_id()
    receiver.deliver(id_=id_)
    forged = receiver.request("POST", PATH, genuine(), {**signed(), "svix-signature": "v1,q7Zx"})
    assert (forged.status, forged.json) == (400, FORGERY)
    receiver.request("GET", "/q7Zx?q7Zx")
    receiver.stop()
    queued, refused = receiver.deliveries()
    assert (queued["event"], queued["status"], queued["svix_id"]) == ("delivery", "queued", id_)
    assert (refused["event"], refused["status"], refused["reason"]) == ("delivery", "forged", "malformed")
    assert "q7Zx" not in receiver.text()


@only_linux
def test_processes_share_what_is_loaded_with_their_parent(receiver: ReceiverProcess) -> None:
    receiver.deliver()
    loaded_mb = memory_mb(receiver.living_pid, "Rss")
    for child in receiver.children():
        assert memory_mb(child, "Rss") > loaded_mb / 2
        assert memory_mb(child, "Private_Dirty") < OWN_MB


def memory_mb(pid: int, kind: str) -> float:
    """Source: proc(5), smaps_rollup."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{kind}:"))


@pytest.mark.parametrize("host", ["::1", "::"])
def test_it_listens_on_the_address_that_host_names(host: str, redis_url: str, tmp_path: Path) -> None:
    with ReceiverProcess(redis_url, tmp_path, free_port(), host=host, client="::1") as receiver:
        assert receiver.deliver().status == 202


def test_a_system_that_cannot_look_at_connections_serves_and_closes_none(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_timeout, "SUPPORTED", False)
    app = BodyTimeout(create_app(make_settings()), 8000, Limits())
    app.watch()
    assert "connections" not in {thread.name for thread in threading.enumerate()}
    with Client(app).post(PATH, data=b"{}", environ_overrides={"REMOTE_ADDR": HOST}) as answer:
        assert answer.status_code == 400

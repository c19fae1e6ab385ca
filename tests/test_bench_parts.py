"""The parts of `make bench` that every figure depends on: the delay proxy, the load client, the tables."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cli.dev.servers import HOST, free_port
from tests.bench import table
from tests.bench.figures import ComparedCase, Figures
from tests.bench.load import LoadReport, Spec, percentile
from tests.bench.load_process import ROOT, load_process
from tests.bench.plan import Setting
from tests.support.proxy import READY
from tests.support.recorder import Recorder
from tests.support.settings import SECRET
from web.signature import svix_webhook

DELAY_MS = 20.0
QUICK_MS = 2 * DELAY_MS + 15  # a way there and back while the machine is not late
ANSWER_S = 0.02


@contextmanager
def far_away(target_port: int) -> Iterator[int]:
    """A proxy before the target; yields its port."""
    port = free_port()
    argv = [sys.executable, "-m", "tests.support.proxy", str(port), str(target_port), str(DELAY_MS)]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    try:
        assert process.stdout.readline() == f"{READY}\n"
        yield port
    finally:
        process.terminate()
        process.wait(20)
        process.stdout.close()


@contextmanager
def server(serve: Callable[[socket.socket], object]) -> Iterator[int]:
    """A TCP server for one connection; yields its port."""
    with socket.create_server((HOST, 0)) as listener:
        listener.settimeout(20)

        def accept() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(20)
                serve(connection)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            thread.join(20)


def connect(port: int) -> socket.socket:
    connection = socket.create_connection((HOST, port), 20)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def echo(connection: socket.socket) -> None:
    while data := connection.recv(65536):
        connection.sendall(data)


def receive(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        data = connection.recv(1024 * 1024)
        assert data, "closed early"
        received += data
    return received


def deliver(port: int, **spec: Any) -> LoadReport:
    spec = {"port": port, "secret": SECRET, "seed": 7, "deliveries": 400, "seconds": 5.0, **spec}
    with load_process(Spec(**spec)) as client:
        return client.report()


def test_the_proxy_adds_its_delay_each_way_and_no_more_than_the_machine_is_late() -> None:
    with server(echo) as target, far_away(target) as port, connect(port) as connection:
        trips: list[float] = []
        while len(trips) < 15 or (min(trips) >= QUICK_MS and len(trips) < 300):
            began = time.monotonic()
            connection.sendall(b"ping")
            receive(connection, 4)
            trips.append((time.monotonic() - began) * 1000)
    assert 2 * DELAY_MS <= min(trips) < QUICK_MS
    assert trips[0] >= 4 * DELAY_MS, "the first waits for the handshake too"


def test_the_proxy_keeps_the_order_of_many_small_messages_and_delays_them_together() -> None:
    sent = b"".join(b"%07d\n" % i for i in range(2_000))
    with server(echo) as target, far_away(target) as port, connect(port) as connection:
        began = time.monotonic()
        for start in range(0, len(sent), 8):
            connection.sendall(sent[start : start + 8])
        assert receive(connection, len(sent)) == sent
    assert time.monotonic() - began < 2_000 * DELAY_MS / 1000 / 2


def test_the_proxy_does_not_narrow_the_line() -> None:
    size = 20 * 1024 * 1024

    def pour(connection: socket.socket) -> None:
        connection.sendall(b"x" * size)

    with server(pour) as target, far_away(target) as port, connect(port) as connection:
        began = time.monotonic()
        assert len(receive(connection, size)) == size
        assert connection.recv(1) == b"", "the end comes through"
    assert time.monotonic() - began < 10


def test_a_connection_through_the_proxy_ends_when_nothing_listens_behind_it() -> None:
    with far_away(free_port()) as port, connect(port) as connection:
        assert connection.recv(1) == b""


def test_every_delivery_is_signed_and_has_an_id_of_its_own() -> None:
    with Recorder(answer_s=ANSWER_S).running() as receiver:
        report = deliver(receiver.server_port, deliveries=40)
    assert (report.answered, report.failed) == (40, 0)
    for request in receiver.requests:
        svix_webhook()(SECRET).verify(request.body, request.headers)
    ids = {request.headers["svix-id"] for request in receiver.requests}
    assert len(ids) == len(receiver.requests) == 40


def test_a_closed_loop_has_one_delivery_on_each_connection_and_measures_the_answer() -> None:
    with Recorder(answer_s=ANSWER_S).running() as receiver:
        report = deliver(receiver.server_port, connections=4, seconds=1.2)
    assert report.connected == len({r.client for r in receiver.requests}) == 4
    assert report.p50_ms >= ANSWER_S * 1000
    assert report.rate <= 4 / ANSWER_S
    assert 0.2 < report.rate * report.p50_ms / 1000 / 4 < 1.5


def test_an_open_loop_keeps_its_rate_whatever_an_answer_takes() -> None:
    with Recorder(answer_s=ANSWER_S).running() as receiver:
        report = deliver(receiver.server_port, connections=40, rate=100, seconds=0.5)
    assert (report.answered, report.gave_up) == (50, False)
    arrived = sorted(r.at for r in receiver.requests)
    assert 0.29 < arrived[-1] - arrived[0] < 3
    assert len(report.sent_at) == 50


def test_an_open_loop_counts_from_when_a_delivery_was_due_and_gives_up_when_it_is_late() -> None:
    with Recorder(answer_s=ANSWER_S).running() as receiver:
        report = deliver(receiver.server_port, connections=1, rate=200, seconds=2.0, give_up_s=0.5)
    assert report.gave_up
    assert report.answered < 100
    assert report.p99_ms > 300


def test_the_client_opens_a_new_connection_when_the_server_has_closed_the_last_one() -> None:
    with Recorder(protocol="HTTP/1.0").running() as receiver:
        report = deliver(receiver.server_port, connections=2, deliveries=20)
    assert (report.answered, report.failed, report.connected) == (20, 0, 20)


def test_what_is_refused_is_counted_as_failed() -> None:
    with Recorder(status=503).running() as receiver:
        report = deliver(receiver.server_port, deliveries=5)
    assert (report.answered, report.failed) == (0, 5)
    assert deliver(free_port(), deliveries=5).failed == 5


def test_percentiles_are_values_that_were_measured() -> None:
    values = [float(i) for i in range(1, 101)]
    assert (percentile(values, 50), percentile(values, 99), percentile([7.0], 99)) == (50, 99, 7)


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    figures = Figures()
    ours, theirs = (ComparedCase("drain", subject, Setting.LOCAL) for subject in ("ours", "theirs"))
    for mine, other in ((300, 100), (50, 10), (400, 100)):
        figures.add(ours, {"events/s": mine})
        figures.add(theirs, {"events/s": other})
    assert figures.ratio(ours, theirs, "events/s") == 4


def test_the_tables_go_between_the_markers_of_a_file_and_nowhere_else(tmp_path: Path) -> None:
    figures = Figures()
    figures.add(ComparedCase("drain", "ours", Setting.LOCAL), {"events/s": 2400.0})
    figures.check("ours : theirs", Setting.LOCAL, 3.1, at_least=3)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    table.write(page, {"machine": "two cores"}, figures)
    text = page.read_text()
    assert text.startswith(f"before\n{table.BEGIN}\n")
    assert text.endswith(f"{table.END}\nafter\n")
    assert "old" not in text
    assert "| ours : theirs | local | 3.10 x | ≥ 3.00 x | yes |" in text
    assert "| ours | local | 2,400 |" in text
    assert json.loads(table.to_json({}, figures))["checks"][0]["reached"] is True

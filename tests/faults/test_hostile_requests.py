"""Malformed and hostile requests: each is answered below 500 or not at all, and none delays a genuine one."""

import time
from contextlib import ExitStack

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.faults.forgeries import check, flood
from tests.faults.raw_requests import ANSWER_S, answer_to, connect, genuine_request, taken_in
from tests.faults.service import Service
from tests.support.deliveries import PATH, genuine, signed
from tests.support.hypothesis_settings import no_deadline

EXAMPLES = 300
DRIPPING = 200
FLOODING_S = 4

names = st.sampled_from(
    [
        "svix-id",
        "svix-timestamp",
        "svix-signature",
        "Svix-Id",
        "webhook-id",
        "content-length",
        "transfer-encoding",
        "content-type",
        "content-encoding",
        "expect",
        "connection",
        "host",
        "x-forwarded-for",
        "authorization",
        "cookie",
    ]
) | st.text("!#$%&'*+-.^_`|~azAZ09", min_size=1, max_size=12)
texts = st.sampled_from(
    [
        b"msg_1",
        b"msg_" + b"a" * 300,
        b"../../etc",
        b"{{7*7}}",
        b"%00",
        b"0",
        b"-1",
        b"99999999999999999999",
        b"1e9",
        b"v1,",
        b"v1,,",
        b"v1 v1,=",
        b"v1a,AAAA v1,\xff",
        b"v1," + b"A" * 6_000,
        b"chunked",
        b"gzip, chunked",
        b"100-continue",
        b"close",
        b"upgrade",
        b"multipart/form-data; boundary=x",
        b"application/json; charset=utf-16",
        b"\xff\xfe",
        b"",
    ]
) | st.binary(max_size=40).map(lambda raw: raw.replace(b"\r", b"").replace(b"\n", b""))


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    """Draw a request, mostly with the headers of a genuine one, some of them missing and others added."""
    content = draw(st.binary(max_size=60) | st.just(genuine()))
    fields: list[tuple[str, bytes]] = []
    if draw(st.booleans()):
        headers = signed(content)
        kept = draw(st.just(sorted(headers)) | st.lists(st.sampled_from(sorted(headers)), unique=True))
        fields += [(name, headers[name].encode()) for name in kept]
    if draw(st.booleans()):
        fields.append(("content-length", str(len(content)).encode()))
    fields += draw(st.lists(st.tuples(names, texts), max_size=6))
    method = draw(st.sampled_from(["POST", "POST", "POST", "GET", "PUT", "HEAD", "TRACE", "post"]))
    path = draw(
        st.sampled_from([PATH, PATH, PATH + "?a=%00", PATH + "/", "/health", "/metrics", "/%2e%2e/", "*"])
    )
    version = draw(st.sampled_from(["HTTP/1.1", "HTTP/1.1", "HTTP/1.0", "HTTP/3.0", ""]))
    head = b"".join(b"%b: %b\r\n" % (name.encode(), value) for name, value in fields)
    return f"{method} {path} {version}\r\nHost: x\r\n".encode() + head + b"\r\n" + content


def test_no_request_is_answered_5xx_late_or_ends_a_process(service: Service) -> None:
    (receiver,) = service.receivers
    processes = receiver.family()

    @settings(no_deadline, max_examples=EXAMPLES)
    @given(requests())
    def look(raw: bytes) -> None:
        began = time.monotonic()
        status = answer_to(service, raw)
        assert status < 500, raw
        assert time.monotonic() - began < ANSWER_S, raw

    look()
    assert receiver.family() == processes
    assert answer_to(service, genuine_request()) == 202


def test_headers_of_any_size_are_refused_without_being_kept(service: Service) -> None:
    (receiver,) = service.receivers
    before = receiver.memory_mb()
    for size in (10_000, 100_000, 10_000_000):
        line = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nsvix-id: {'a' * size}\r\n"
        assert answer_to(service, f"{line}content-length: 0\r\n\r\n".encode()) in {0, 400, 431}
    assert receiver.memory_mb() - before < 20
    assert answer_to(service, genuine_request()) == 202


def test_two_hundred_connections_that_drip_delay_no_delivery(service: Service) -> None:
    whole = genuine_request()
    cuts = (1, whole.index(b"\r\n\r\n") + 40)
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(service)) for _ in range(DRIPPING)]
        for i, connection in enumerate(connections):
            connection.sendall(whole[: cuts[i % 2]])
        for step in range(5):
            for i, connection in enumerate(connections):
                connection.sendall(whole[cuts[i % 2] + step :][:1])
            assert max(taken_in(service) for _ in range(10)) < ANSWER_S
            time.sleep(0.2)


def test_as_many_forged_requests_as_it_can_answer_do_not_stop_genuine_ones(service: Service) -> None:
    check(flood(service, FLOODING_S))

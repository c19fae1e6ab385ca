"""What the receiver answers to a delivery, and what it then has put on the queue."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any

import pytest
from flask.testing import FlaskClient
from redis import Redis
from structlog.testing import capture_logs
from werkzeug.test import TestResponse

from tests.support.deliveries import FORGERY, PATH, MakeClient, genuine, signed
from tests.support.payloads import ANN, body, session, svix_id, user, user_event
from tests.support.queue import RqView
from tests.support.settings import SECRET
from worker.clerk.payloads import HANDLED_TYPES
from worker.monitoring.metrics import SignatureReason
from worker.queue.consumer import Failed, ReservedJobs

OTHER_SECRET = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"


def deliver(client: FlaskClient, content: bytes | None = None, **attempt: Any) -> TestResponse:
    content = genuine() if content is None else content
    return client.post(PATH, data=content, headers=signed(content, **attempt))


def fail(redis: Redis, id_: str) -> None:
    consumer = ReservedJobs(redis, "a-worker")
    (taken,) = consumer.settle_and_take([], 1) or []
    assert taken.id == id_
    consumer.settle_and_take([Failed(taken, "unreadable", "", retryable=False)], 0)


@pytest.mark.parametrize("type_", HANDLED_TYPES)
def test_a_genuine_event_is_queued_as_it_came(client: FlaskClient, rq: RqView, type_: str) -> None:
    data = session() if type_.startswith("session.") else user()
    content, id_ = body(user_event(type_, data)), svix_id()
    before_ms = time.time() * 1000 - 1
    answer = deliver(client, content, id_=id_)
    assert (answer.status_code, answer.json) == (202, {"status": "queued"})
    job = rq.job(id_)
    assert job.args == [content.decode()]
    assert job.description == f"{type_} {ANN}"
    assert job.created_at is not None
    assert before_ms <= job.created_at.timestamp() * 1000 <= time.time() * 1000
    assert rq.places(id_) == ["queue"]


def test_a_body_is_signed_and_kept_to_the_byte(client: FlaskClient, rq: RqView) -> None:
    content = (
        '{ "type":"user.created",\r\n\t"data": {"id":"user_1", "first_name":"Zoë \\u0000 \\ud800 🎈"} }\n'
    )
    id_ = svix_id()
    assert deliver(client, content.encode(), id_=id_).status_code == 202
    assert rq.job(id_).args == [content]


def test_the_same_delivery_again_is_a_duplicate(client: FlaskClient, rq: RqView) -> None:
    id_ = svix_id()
    deliver(client, id_=id_, age_s=200)
    answer = deliver(client, id_=id_)
    assert (answer.status_code, answer.json) == (200, {"status": "duplicate"})
    assert rq.places(id_) == ["queue"]


def test_a_delivery_whose_job_failed_is_queued_anew(client: FlaskClient, rq: RqView, redis: Redis) -> None:
    id_ = svix_id()
    deliver(client, id_=id_)
    fail(redis, id_)
    assert rq.places(id_) == ["failed"]
    answer = deliver(client, id_=id_)
    assert (answer.status_code, answer.json) == (202, {"status": "requeued"})
    assert rq.places(id_) == ["queue"]


@pytest.mark.parametrize(
    "type_", ["email.created", "organization.created", "", "user.created ", "x" * 5000, "\ud800\n"]
)
def test_a_type_that_is_not_handled_is_ignored(client: FlaskClient, redis: Redis, type_: str) -> None:
    answer = deliver(client, body({"type": type_, "data": {"id": "ema_1"}, "object": "event"}))
    assert (answer.status_code, answer.json) == (200, {"status": "ignored"})
    assert redis.dbsize() == 0


def test_any_of_several_secrets_may_have_signed(make_client: MakeClient) -> None:
    client = make_client(clerk_webhook_signing_secret=f"{OTHER_SECRET}, {SECRET}")
    assert deliver(client).status_code == 202
    assert deliver(client, secret=OTHER_SECRET).status_code == 202


@pytest.mark.parametrize(
    ("headers", "reason"),
    [
        ({"svix-signature": ""}, SignatureReason.MISSING),
        ({"svix-id": "msg.another"}, SignatureReason.MALFORMED),
        ({"svix-timestamp": "now"}, SignatureReason.MALFORMED),
        ({"svix-signature": "v1,\xfc"}, SignatureReason.MALFORMED),
        ({"svix-id": "msg_another"}, SignatureReason.MISMATCH),
        ({"svix-timestamp": "1700000000"}, SignatureReason.STALE),
    ],
    ids=repr,
)
def test_every_forgery_is_refused_in_the_same_words(
    client: FlaskClient, redis: Redis, headers: dict[str, str], reason: SignatureReason
) -> None:
    content = genuine()
    with capture_logs() as lines:
        answer = client.post(PATH, data=content, headers={**signed(content), **headers})
    assert (answer.status_code, answer.json) == (400, FORGERY)
    assert [line["reason"] for line in lines] == [reason]
    assert redis.dbsize() == 0


def test_a_signed_body_without_json_is_refused(client: FlaskClient, redis: Redis) -> None:
    id_ = svix_id()
    with capture_logs() as lines:
        answer = deliver(client, b"{'type': 'user.created'}", id_=id_)
    assert (answer.status_code, answer.json) == (400, {"error": "the body is not JSON"})
    assert redis.dbsize() == 0
    assert (lines[0]["status"], lines[0]["svix_id"]) == ("not_json", id_)


@pytest.mark.parametrize(
    ("event", "description"),
    [
        ([], "unreadable"),
        ({"type": 7, "data": {"id": ANN}}, "unreadable"),
        ({"type": "user.updated", "data": {"id": "zoë@example.com"}}, "user.updated"),
    ],
)
def test_unknown_json_is_queued(client: FlaskClient, rq: RqView, event: object, description: str) -> None:
    id_ = svix_id()
    answer = deliver(client, body(event), id_=id_)
    assert (answer.status_code, answer.json) == (202, {"status": "queued"})
    assert rq.job(id_).description == description


def test_events_of_another_instance_are_ignored_with_a_warning(make_client: MakeClient, redis: Redis) -> None:
    client = make_client(clerk_instance_id="ins_ours")
    with capture_logs() as lines:
        answer = deliver(client, body(user_event(instance_id="ins_theirs")))
    assert (answer.status_code, answer.json) == (200, {"status": "ignored"})
    assert redis.dbsize() == 0
    assert (lines[0]["log_level"], lines[0]["foreign_instance"]) == ("warning", "ins_theirs")


@pytest.mark.parametrize("instance_id", ["ins_ours", None, 5, ""])
def test_events_of_our_instance_or_none_are_queued(make_client: MakeClient, instance_id: object) -> None:
    client = make_client(clerk_instance_id="ins_ours")
    status = deliver(client, body(user_event(instance_id=instance_id))).status_code
    assert status == (200 if instance_id == "" else 202)


def test_a_body_of_the_greatest_size_is_taken_and_one_byte_more_is_not(make_client: MakeClient) -> None:
    client = make_client(max_body_bytes=4096)
    content = genuine().ljust(4096)
    assert deliver(client, content).status_code == 202
    answer = deliver(client, content + b" ")
    assert (answer.status_code, answer.json) == (413, {"error": "the body is too large"})


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW"])
def test_only_post_is_allowed(client: FlaskClient, method: str) -> None:
    answer = client.open(PATH, method=method)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")
    assert answer.mimetype == "application/json"
    assert method == "HEAD" or answer.json == {"error": "Method Not Allowed"}


@pytest.mark.parametrize("path", ["/", "/webhooks", f"{PATH}/", f"/{PATH}", "/static/x", "/%ff", "/%00"])
def test_an_unknown_path_is_404_in_json(client: FlaskClient, path: str) -> None:
    answer = client.post(path, data=genuine(), headers=signed())
    assert (answer.status_code, answer.json) == (404, {"error": "Not Found"})


@pytest.mark.parametrize(
    "reply",
    [None, b"-READONLY You can't write against a read only replica.\r\n", b":7\r\n", b"\x00"],
    ids=repr,
)
def test_any_error_of_redis_asks_clerk_to_deliver_again(make_client: MakeClient, reply: bytes | None) -> None:
    with redis_that_answers(reply) as url:
        assert_asked_again(make_client(redis_url=url))


def test_without_redis_clerk_is_asked_to_deliver_again(make_client: MakeClient) -> None:
    assert_asked_again(make_client(redis_url="redis://127.0.0.1:1/0"))


def assert_asked_again(client: FlaskClient) -> None:
    started = time.monotonic()
    answer = deliver(client)
    assert time.monotonic() - started < 5
    assert answer.status_code == 503
    assert answer.is_json
    assert 0 < int(answer.headers["Retry-After"]) <= 60


@contextmanager
def redis_that_answers(reply: bytes | None) -> Iterator[str]:
    """Give the URL of a server that answers everything with `reply`, or nothing."""

    class ReplyHandler(BaseRequestHandler):
        def handle(self) -> None:
            while self.request.recv(65536):
                if reply is not None:
                    self.request.sendall(reply)

    with ThreadingTCPServer(("127.0.0.1", 0), ReplyHandler) as server:
        server.daemon_threads, server.block_on_close = True, False  # clients keep their connections
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield f"redis://127.0.0.1:{server.server_address[1]}/0"
        server.shutdown()
        thread.join(10)


def test_a_delivery_leaves_one_line_with_ids_and_nothing_else(make_client: MakeClient) -> None:
    client, id_ = make_client(), svix_id()
    with capture_logs() as lines:
        deliver(client, id_=id_)
    (line,) = lines
    assert line.pop("ms") > 0
    assert line == {
        "event": "delivery",
        "log_level": "info",
        "status": "queued",
        "svix_id": id_,
        "type": "user.created",
        "clerk_id": ANN,
    }


def test_a_fault_is_logged_with_the_svix_id_of_the_delivery(make_client: MakeClient) -> None:
    id_ = svix_id()
    with redis_that_answers(b":7\r\n") as url, capture_logs() as lines:
        deliver(make_client(redis_url=url), id_=id_)
    assert [(line["event"], line["svix_id"]) for line in lines] == [
        ("unexpected error", id_),
        ("delivery", id_),
    ]

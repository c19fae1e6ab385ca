"""`POST /webhooks/clerk`: verify → enqueue → answer.

    queued      202  Redis has confirmed the job
    duplicate   200  the same svix-id again
    requeued    202  the same svix-id again, and its job had failed
    ignored     200  a type that is not handled, or another instance's event
    forged      400  the same words whatever is wrong with the signature
    not_json    400
    too_large   413
    incomplete  408  the body took too long to come, or 400: the client left before it was all there
    unavailable 503  Redis cannot take it: Clerk delivers again

Each delivery leaves one line in the log, with ids and the type but nothing personal.
"""

import re
import time
from collections.abc import Sequence
from functools import partial

import structlog
from flask import Blueprint, Response, g, request
from flask.typing import ResponseReturnValue
from werkzeug.exceptions import ClientDisconnected, RequestEntityTooLarge, RequestTimeout

from config import Settings
from db.times import now_ms
from web.signature import HEADERS, Forged, verify
from worker.clerk.decoding import decode
from worker.clerk.errors import NotJson
from worker.clerk.payloads import CLERK_ID, Summary, handled_types, summarize
from worker.monitoring.metrics import DELIVERIES, ENQUEUE_SECONDS, FOREIGN, REJECTED_SIGNATURES, Metrics
from worker.queue.producer import Delivery, DeliveryQueue
from worker.redis_client import QueueUnavailable

PATH = "/webhooks/clerk"
RETRY_AFTER_S = 5  # Svix's own first interval.
EVENT_TYPE = re.compile(r"[A-Za-z0-9_.]{1,64}")
HTTP_STATUS = {"queued": 202, "duplicate": 200, "requeued": 202, "ignored": 200}

_log = structlog.get_logger("web.webhook")


def blueprint(settings: Settings, queue: DeliveryQueue, metrics: Metrics) -> Blueprint:
    """Return the receiver, which puts genuine deliveries on `queue`."""
    keys = settings.signing_keys
    types = handled_types(settings)
    receiver = Blueprint("webhook", __name__)

    @receiver.post(PATH, provide_automatic_options=False)
    def receive() -> Response:
        """Verify a delivery, put it on the queue, and answer once it is safe there."""
        body = _read_body(settings.max_body_bytes)
        svix_id = _verify(body, keys)
        summary = _summarize(body, types)
        if summary.handled is False or _is_foreign(summary, settings.clerk_instance_id):
            return _answer("ignored")
        delivery = Delivery(svix_id, body.decode(), _describe(summary), now_ms())
        with metrics.timed(ENQUEUE_SECONDS):
            answer = queue.enqueue(delivery)
        return _answer(answer.value)

    receiver.before_request(_begin_line)
    receiver.after_request(_write_line)
    receiver.after_request(partial(_count, metrics))  # done first: Flask goes through them backwards
    receiver.register_error_handler(Forged, _refuse_forgery)
    receiver.register_error_handler(NotJson, _refuse_what_is_not_json)
    receiver.register_error_handler(RequestEntityTooLarge, _refuse_what_is_too_large)
    receiver.register_error_handler(RequestTimeout, _refuse_what_is_too_slow)
    receiver.register_error_handler(ClientDisconnected, _refuse_what_is_cut_off)
    receiver.register_error_handler(QueueUnavailable, _ask_to_deliver_again)
    return receiver


def _read_body(limit: int) -> bytes:
    # Werkzeug refuses by Content-Length, but cuts a chunked body off at its limit without a word: hence the
    # one byte more.
    request.max_content_length = limit + 1
    body = request.get_data(cache=False)
    if len(body) > limit:
        raise RequestEntityTooLarge
    if len(body) < (request.content_length or 0):
        raise ClientDisconnected  # Nor does it say so when the client leaves half way.
    return body


def _verify(body: bytes, keys: Sequence[bytes]) -> str:
    headers = {name: request.headers.get(name, "") for name in HEADERS}
    svix_id = verify(body, headers, keys, time.time())
    _note(svix_id=svix_id)
    return svix_id


def genuine_id() -> str | None:
    """Return the svix-id of the delivery that this request brings, once it is verified."""
    line: dict[str, str | None] = g.get("line", {})
    return line.get("svix_id")


def _summarize(body: bytes, types: tuple[str, ...]) -> Summary:
    summary = summarize(decode(body), types)
    _note(type=_if_shaped(EVENT_TYPE, summary.type), clerk_id=summary.clerk_id)
    return summary


def _is_foreign(summary: Summary, instance_id: str | None) -> bool:
    if instance_id is None or summary.instance_id in (None, instance_id):
        return False
    _note(level="warning", foreign_instance=_if_shaped(CLERK_ID, summary.instance_id))
    return True


def _describe(summary: Summary) -> str:
    if summary.type is None:
        return "unreadable"
    return f"{summary.type} {summary.clerk_id}" if summary.clerk_id else summary.type


def _if_shaped(shape: re.Pattern[str], text: str | None) -> str | None:
    # What Clerk sends in odd shapes may be anything, somebody's name too: the log does not get it.
    return text if text is not None and shape.fullmatch(text) else None


def _answer(status: str) -> Response:
    _note(status=status)
    body = f'{{"status":"{status}"}}\n'
    return Response(body, HTTP_STATUS[status], content_type="application/json")


def _refuse_forgery(error: Forged) -> ResponseReturnValue:
    _note(level="warning", status="forged", reason=error.reason.value)
    return {"error": "the signature is missing or not valid"}, 400


def _refuse_what_is_not_json(_error: NotJson) -> ResponseReturnValue:
    _note(level="warning", status="not_json")
    return {"error": "the body is not JSON"}, 400


def _refuse_what_is_too_large(_error: RequestEntityTooLarge) -> ResponseReturnValue:
    _note(level="warning", status="too_large")
    return {"error": "the body is too large"}, 413


def _refuse_what_is_too_slow(_error: RequestTimeout) -> ResponseReturnValue:
    _note(level="warning", status="incomplete", reason="too slow")
    return {"error": "the body took too long"}, 408


def _refuse_what_is_cut_off(_error: ClientDisconnected) -> ResponseReturnValue:
    _note(level="warning", status="incomplete", reason="cut off")
    return {"error": "the body is not complete"}, 400


def _ask_to_deliver_again(error: QueueUnavailable) -> ResponseReturnValue:
    _note(level="error", status="unavailable", reason=str(error))
    return {"error": "the queue cannot take it now"}, 503, {"Retry-After": str(RETRY_AFTER_S)}


def _begin_line() -> None:
    g.started = time.perf_counter()
    g.line = {"status": "error"}


def _note(**facts: str | None) -> None:
    g.line.update(facts)


def _count(metrics: Metrics, response: Response) -> Response:
    metrics.count(DELIVERIES, g.line.get("type"), g.line["status"])
    if g.line["status"] == "forged":
        metrics.count(REJECTED_SIGNATURES, g.line["reason"])
    if "foreign_instance" in g.line:
        metrics.count(FOREIGN)
    return response


def _write_line(response: Response) -> Response:
    level = g.line.pop("level", "error" if g.line["status"] == "error" else "info")
    write = getattr(_log, level)
    write("delivery", **g.line, ms=round((time.perf_counter() - g.started) * 1000, 2))
    return response

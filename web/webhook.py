"""`POST /webhooks/clerk`: check the headers → read the body → verify → enqueue → answer.

REPLIES explains each answer. Each delivery writes one line to the log, with ids and the type but nothing
personal; unverified requests write only the first lines of a minute.
"""

import json
import re
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import structlog
from flask import Response, request

from config import Settings
from db.merge.change import CLERK_ID, is_foreign
from web.body import BodyReader, Incomplete, NoRoom, TooLarge
from web.line_limit import LineLimit
from web.signature import Forged, Verifier, read_headers
from worker import log
from worker.clerk.decoding import decode_text
from worker.clerk.errors import NotJson
from worker.clerk.payloads import handled_types, summarize
from worker.monitoring import metrics as m
from worker.monitoring.metrics import DeliveryAnswer
from worker.queue.description import describe
from worker.queue.producer import Delivery, DeliveryQueue
from worker.redis_client import QueueUnavailable

PATH = "/webhooks/clerk"
RETRY_AFTER_S = 5  # Svix's own first interval.
EVENT_TYPE = re.compile(r"[A-Za-z0-9_.]{1,64}")

Facts = dict[str, Any]  # what is known of a delivery, for its line in the log and for the counters
_log = structlog.get_logger("web.webhook")


class Reply(NamedTuple):
    """How an answer is sent: its HTTP status, the text of an error, and the level of its log line."""

    status: int
    error: str | None = None
    level: str = "info"


NOT_NOW = Reply(503, "the delivery cannot be taken now", "error")  # Clerk delivers again
REPLIES: Mapping[DeliveryAnswer, Reply] = {
    DeliveryAnswer.QUEUED: Reply(202),  # Redis has confirmed the job
    DeliveryAnswer.DUPLICATE: Reply(200),  # the same svix-id again
    DeliveryAnswer.REQUEUED: Reply(202),  # the same svix-id again, and its job had failed
    DeliveryAnswer.IGNORED: Reply(200),  # a type that is not handled, or another instance's event
    # The same words whatever is wrong with the signature.
    DeliveryAnswer.FORGED: Reply(400, "the signature is missing or not valid", "warning"),
    DeliveryAnswer.NOT_JSON: Reply(400, "the body is not JSON", "warning"),
    DeliveryAnswer.TOO_LARGE: Reply(413, "the body is too large", "warning"),
    # The body took too long, or the client disconnected before it was complete.
    DeliveryAnswer.INCOMPLETE: Reply(408, "the body did not arrive completely in time", "warning"),
    DeliveryAnswer.NO_ROOM: NOT_NOW,  # the memory for large bodies is occupied
    DeliveryAnswer.UNAVAILABLE: NOT_NOW,  # Redis cannot store the job
    DeliveryAnswer.ERROR: NOT_NOW,
}

REFUSALS: Mapping[type[Exception], DeliveryAnswer] = {
    Forged: DeliveryAnswer.FORGED,
    NotJson: DeliveryAnswer.NOT_JSON,
    TooLarge: DeliveryAnswer.TOO_LARGE,
    Incomplete: DeliveryAnswer.INCOMPLETE,
    NoRoom: DeliveryAnswer.NO_ROOM,
    QueueUnavailable: DeliveryAnswer.UNAVAILABLE,
}


class Receiver:
    """Takes deliveries, in many threads: puts genuine ones on `queue`."""

    def __init__(self, settings: Settings, queue: DeliveryQueue, metrics: m.Metrics) -> None:
        secrets = settings.clerk_webhook_signing_secret
        self._verifier = Verifier(secret.get_secret_value() for secret in secrets)
        self._bodies = BodyReader(settings.max_body_bytes)
        self._types = handled_types(settings)
        self._instance_id = settings.clerk_instance_id
        self._queue = queue
        self._metrics = metrics
        self._unverified_lines = LineLimit()
        self._responses = {answer: _response(answer) for answer in DeliveryAnswer}

    def receive(self) -> Response:
        """Take the delivery, or refuse it; count it, write its line, and answer once it is safe."""
        began = time.perf_counter()
        facts: Facts = {}
        try:
            answer = self._take(facts)
        except tuple(REFUSALS) as refusal:
            answer = REFUSALS[type(refusal)]
            facts["reason"] = str(refusal)
        except Exception as error:
            answer = DeliveryAnswer.ERROR
            _log.error("unexpected error", error=log.fault(error), svix_id=facts.get("svix_id"))
        self._record(answer, facts, began)
        return self._responses[answer]

    def _take(self, facts: Facts) -> DeliveryAnswer:
        received_s = time.time()
        environ = request.environ
        headers = read_headers(environ, received_s)
        with self._bodies.body(environ) as body:
            text = self._verifier.verify(headers, body)
            svix_id = facts["svix_id"] = headers["svix-id"]
            summary = summarize(decode_text(text), self._types)
            facts["type"] = _if_shaped(EVENT_TYPE, summary.type)
            facts["clerk_id"] = summary.clerk_id
            if summary.is_ignored:
                return DeliveryAnswer.IGNORED
            if is_foreign(summary.instance_id, self._instance_id):
                facts["foreign_instance"] = _if_shaped(CLERK_ID, summary.instance_id)
                return DeliveryAnswer.IGNORED
            delivery = Delivery(svix_id, text, describe(summary), int(received_s * 1000))
            began = time.perf_counter()
            try:
                return DeliveryAnswer(self._queue.enqueue(delivery).value)
            finally:
                self._metrics.observe(m.ENQUEUE_SECONDS, time.perf_counter() - began)

    def _record(self, answer: DeliveryAnswer, facts: Facts, began: float) -> None:
        self._metrics.count(m.DELIVERIES, facts.get("type"), answer.value)
        if answer is DeliveryAnswer.FORGED:
            self._metrics.count(m.REJECTED_SIGNATURES, facts["reason"])
        if "foreign_instance" in facts:
            self._metrics.count(m.FOREIGN)
        if "svix_id" not in facts and not self._unverified_lines.allows():
            return
        level = "warning" if "foreign_instance" in facts else REPLIES[answer].level
        ms = round((time.perf_counter() - began) * 1000, 2)
        getattr(_log, level)("delivery", status=answer.value, **facts, ms=ms)


def _response(answer: DeliveryAnswer) -> Response:
    reply = REPLIES[answer]
    body = {"error": reply.error} if reply.error else {"status": answer.value}
    headers = {"Retry-After": str(RETRY_AFTER_S)} if reply.status == 503 else {}
    return Response(
        json.dumps(body, separators=(",", ":")) + "\n", reply.status, headers, content_type="application/json"
    )


def _if_shaped(shape: re.Pattern[str], text: str | None) -> str | None:
    # Text of another shape may contain personal data, so it is not logged.
    return text if text is not None and shape.fullmatch(text) else None

"""A worker's log lines and counters: one line per transaction, one per failed job."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import structlog

from db.connection.engine import PoolState
from db.merge.incoming import Outcome, ReceivedChange
from db.times import now_ms
from worker.clerk.decoding import decode_text
from worker.clerk.errors import NotJson
from worker.clerk.payloads import ALL_TYPES, summarize
from worker.monitoring import metrics as m
from worker.queue.consumer import Deferred, Failed, TakenJob
from worker.queue.rq_format import ForeignJobError, decode_call
from worker.threads import chunks

log = structlog.get_logger("worker")

# About 7 kB in JSON. Docker and Kubernetes cut lines after 16 kB, Heroku after 10 kB.
EVENTS_A_LINE = 50


class BatchInstrumentation:
    """Counts and logs one worker's work."""

    def __init__(self, metrics: m.Metrics) -> None:
        self._metrics = metrics

    def record_transaction(
        self, batch: Sequence[ReceivedChange], outcomes: Sequence[Outcome], seconds: float
    ) -> None:
        """Count and log a transaction that applied a batch. If it failed (no outcomes), count only the time.

        A line has up to EVENTS_A_LINE events. A line per event would take more than twice the time
        (tests/bench/instrumentation.py).
        """
        self._metrics.observe(m.APPLY_SECONDS, seconds)
        if not outcomes:
            return
        facts = {"of": len(batch), "ms": round(seconds * 1000, 1)}
        events: list[dict[str, Any]] = [
            {"svix_id": i.svix_id, "type": i.type, "clerk_id": i.subject, "outcome": outcome.value}
            for i, outcome in zip(batch, outcomes, strict=True)
        ]
        for part in chunks(events, EVENTS_A_LINE):
            sums = Counter(event["outcome"] for event in part)
            log.info("batch", jobs=len(part), **facts, **sums, events=part)
        for (type_, outcome), count in Counter(zip((i.type for i in batch), outcomes, strict=True)).items():
            self._metrics.count(m.EVENTS, type_, outcome.value, by=count)
        now = now_ms()
        self._metrics.set_last_applied(now / 1000)
        new = [i for i in batch if not i.is_repeated]
        self._metrics.observe(m.DELIVERY_LAG, *(_lag_s(now, i.received_at) for i in new))
        self._metrics.observe(m.EVENT_LAG, *(_lag_s(now, i.event_at) for i in new if i.event_at is not None))

    def failed(self, failed: Failed) -> None:
        """Log and count a failed job."""
        type_, clerk_id = _subject(failed.job)
        self._metrics.count(m.RETRIES if failed.has_retry else m.FAILURES, type_)
        facts = {"svix_id": failed.job.id, "type": type_, "clerk_id": clerk_id, "reason": failed.reason}
        log.error("job failed", **facts, is_tried_again=failed.has_retry)

    def deferred(self, deferred: Deferred) -> None:
        """Log that a job waits for a lock, only the first time."""
        if not deferred.job.has_waited:
            log.warning("job waits for a lock", svix_id=deferred.job.id, reason=deferred.reason)

    def record_pool(self, pool: PoolState) -> None:
        """Count the pool's events since the last call."""
        self._metrics.count_up_to(m.POOL_TIMEOUTS, pool.timeouts)
        self._metrics.count_up_to(m.CONNECTIONS_LOST, pool.invalidated)


def _subject(job: TakenJob) -> tuple[str | None, str | None]:
    """Return a delivery's type and Clerk id; None for a type that is not handled, or a missing id."""
    try:
        summary = summarize(decode_text(decode_call(job.data)), ALL_TYPES)
    except (NotJson, ForeignJobError):
        return None, None
    return (None, None) if summary.is_ignored else (summary.type, summary.clerk_id)


def _lag_s(now_ms: int, then_ms: int) -> float:
    return max(0, now_ms - then_ms) / 1000

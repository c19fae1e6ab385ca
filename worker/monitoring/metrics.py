"""The counters of all processes: counted in memory, and added to totals in Redis every few seconds.

The totals include all web processes and workers on all machines, also ended ones. Every web process shows
them (`worker.monitoring.prometheus`); workers need no port.
"""

import json
import threading
import uuid
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import NamedTuple

from redis import Redis

from db.merge.incoming import Outcome
from db.times import now_ms
from worker.clerk.payloads import ALL_TYPES
from worker.monitoring import recent
from worker.queue import scripts
from worker.queue.producer import WATCHING_SINCE_KEY, EnqueueResult


class DeliveryAnswer(StrEnum):
    """The receiver's answers to a delivery: a label here, and a word in the answer and in the log."""

    QUEUED = EnqueueResult.QUEUED.value
    DUPLICATE = EnqueueResult.DUPLICATE.value
    REQUEUED = EnqueueResult.REQUEUED.value
    IGNORED = "ignored"
    FORGED = "forged"
    NOT_JSON = "not_json"
    TOO_LARGE = "too_large"
    INCOMPLETE = "incomplete"
    NO_ROOM = "no_room"
    UNAVAILABLE = "unavailable"
    ERROR = "error"


class SignatureReason(StrEnum):
    """Why a delivery is refused as forged: for the log and the counters, never for the sender."""

    MISSING = "missing"
    MALFORMED = "malformed"
    STALE = "stale"
    MISMATCH = "mismatch"


TOTALS_KEY = "clerk-sync:metrics"
FLUSH_EVERY_S = 2.0
OTHER = "other"
SUM = "sum"
INFINITY = "+Inf"

TYPES = (*ALL_TYPES, OTHER)
ANSWERS = tuple(DeliveryAnswer)
VERIFIED = frozenset(ANSWERS) - {
    DeliveryAnswer.FORGED,
    DeliveryAnswer.TOO_LARGE,
    DeliveryAnswer.INCOMPLETE,
    DeliveryAnswer.NO_ROOM,
    DeliveryAnswer.ERROR,
}
OUTCOMES = tuple(outcome.value for outcome in Outcome)

FAST_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
SLOW_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
LAGS_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200, 86400)
SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500)


class Counter(NamedTuple):
    """A number that only grows. A label's value that is not listed counts as `other`."""

    name: str
    help: str
    labels: Mapping[str, Sequence[str]] = {}


class Histogram(NamedTuple):
    """The distribution of values; `buckets` are upper bounds."""

    name: str
    help: str
    buckets: Sequence[float]

    def bound(self, value: float) -> str:
        """Return the upper bound of the bucket that `value` falls into, as Prometheus writes it."""
        index = bisect_left(self.buckets, value)
        return str(self.buckets[index]) if index < len(self.buckets) else INFINITY


DELIVERIES = Counter(
    "clerk_sync_deliveries_total", "Deliveries by type and answer.", {"type": TYPES, "answer": ANSWERS}
)
REJECTED_SIGNATURES = Counter(
    "clerk_sync_rejected_signatures_total",
    "Deliveries refused because of their signature, by reason.",
    {"reason": tuple(SignatureReason)},
)
FOREIGN = Counter(
    "clerk_sync_foreign_deliveries_total",
    "Deliveries of another Clerk instance than CLERK_INSTANCE_ID, which are ignored.",
)
ENQUEUE_SECONDS = Histogram("clerk_sync_enqueue_seconds", "Time to put a delivery on the queue.", FAST_S)
EVENTS = Counter(
    "clerk_sync_events_applied_total",
    "Events applied to the tables, by type and outcome.",
    {"type": TYPES, "outcome": OUTCOMES},
)
BATCH_SIZE = Histogram("clerk_sync_batch_size", "Events in a batch.", SIZES)
APPLY_SECONDS = Histogram("clerk_sync_apply_seconds", "Time of a transaction that applies a batch.", SLOW_S)
EVENT_LAG = Histogram(
    "clerk_sync_event_lag_seconds", "Time from the event at Clerk to its row being written.", LAGS_S
)
DELIVERY_LAG = Histogram(
    "clerk_sync_delivery_lag_seconds", "Time from a delivery being received to its row being written.", LAGS_S
)
RETRIES = Counter("clerk_sync_retries_total", "Jobs scheduled for a retry, by type.", {"type": TYPES})
FAILURES = Counter("clerk_sync_jobs_failed_total", "Jobs that failed for good, by type.", {"type": TYPES})
POOL_TIMEOUTS = Counter(
    "clerk_sync_pool_timeouts_total", "Times that no database connection was free within DB_POOL_TIMEOUT."
)
CONNECTIONS_LOST = Counter("clerk_sync_connections_lost_total", "Database connections found broken.")
LAST_APPLIED = "clerk_sync_last_applied_timestamp_seconds"

COUNTERS = (
    DELIVERIES,
    REJECTED_SIGNATURES,
    FOREIGN,
    EVENTS,
    RETRIES,
    FAILURES,
    POOL_TIMEOUTS,
    CONNECTIONS_LOST,
)
HISTOGRAMS = (ENQUEUE_SECONDS, BATCH_SIZE, APPLY_SECONDS, EVENT_LAG, DELIVERY_LAG)

Field = tuple[str, ...]


class Metrics:
    """What one process has counted and not yet added to the totals. May be used by many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: defaultdict[Field, float] = defaultdict(float)
        self._applied_at_s = 0.0
        self._known_totals: dict[Field, float] = {}
        self._flushing = threading.Lock()
        self._process = uuid.uuid4().hex
        self._delta: list[str | float] = []
        self._recent: Mapping[str, float] = {}
        self._number = 0

    def count(self, counter: Counter, *labels: str | None, by: float = 1) -> None:
        """Add `by` to a counter; `labels` are the values of its labels, in order."""
        values = zip(labels, counter.labels.values(), strict=True)
        field = (counter.name, *(value if value and value in known else OTHER for value, known in values))
        with self._lock:
            self._counts[field] += by

    def count_up_to(self, counter: Counter, total: float) -> None:
        """Raise a counter without labels to a total that this process counts elsewhere."""
        field = (counter.name,)
        with self._lock:
            self._counts[field] += total - self._known_totals.get(field, 0)
            self._known_totals[field] = total

    def observe(self, histogram: Histogram, *values: float) -> None:
        """Add values to a histogram."""
        with self._lock:
            for value in values:
                self._counts[histogram.name, histogram.bound(value)] += 1
            self._counts[histogram.name, SUM] += sum(values)

    def set_last_applied(self, at_s: float) -> None:
        """Record when an event was applied, in s since the epoch."""
        with self._lock:
            self._applied_at_s = max(at_s, self._applied_at_s)

    def flush(self, redis: Redis) -> None:
        """Add the counts to the totals in Redis. Sends nothing if nothing was counted.

        A delta that Redis did not confirm is sent again unchanged, and Redis adds each delta only once. So no
        count is lost when this raises RedisError. The numbers of the deltas also show a Redis that has lost
        what it had confirmed.
        """
        with self._flushing:
            if not self._delta:
                self._delta = self._pack()
            if self._delta:
                keys = (TOTALS_KEY, f"{TOTALS_KEY}:{self._process}", WATCHING_SINCE_KEY)
                number, *counts = self._delta
                redis.eval(scripts.load("add_counts"), len(keys), *keys, number, now_ms(), *counts)
                recent.add(redis, self._recent)
                self._delta = []

    def _pack(self) -> list[str | float]:
        with self._lock:
            counts, self._counts = self._counts, defaultdict(float)
            applied_at_s, self._applied_at_s = self._applied_at_s, 0.0
        changed = {field: value for field, value in counts.items() if value}
        latest = {(LAST_APPLIED,): applied_at_s} if applied_at_s else {}
        if not (changed or latest):
            return []
        self._recent = _recent(changed)
        self._number += 1
        delta: list[str | float] = [self._number, len(changed)]
        for field, value in (*changed.items(), *latest.items()):
            delta += (json.dumps(field), value)
        return delta


def _recent(changed: Mapping[Field, float]) -> Mapping[str, float]:
    """Return the counts that show whether genuine deliveries are refused or ignored."""
    counts: defaultdict[str, float] = defaultdict(float)
    for (name, *labels), value in changed.items():
        if name == DELIVERIES.name and labels[1] in VERIFIED:
            counts[recent.GENUINE] += value
        elif name == REJECTED_SIGNATURES.name and labels[0] in recent.KINDS:
            counts[labels[0]] += value
        elif name == FOREIGN.name:
            counts[recent.FOREIGN] += value
    return counts

"""The metrics in Prometheus's format: the totals in Redis, and the current gauges.

Only Redis is asked: regular queries would keep a database that can be suspended (Neon) awake.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from itertools import product
from types import SimpleNamespace
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.core import GaugeMetricFamily as Gauge
from redis import Redis
from redis.exceptions import ResponseError

from config import Settings
from worker.monitoring.metrics import (
    COUNTERS,
    HISTOGRAMS,
    INFINITY,
    LAST_APPLIED,
    SUM,
    TOTALS_KEY,
    Counter,
    Field,
    Histogram,
    Metrics,
)
from worker.monitoring.probes import Facts, Probe, ProbeResult, ask
from worker.monitoring.redis_stats import DEPENDENCIES, redis_facts
from worker.monitoring.warnings import ALARMS, alarms
from worker.redis_client import fail_fast_redis
from worker.sync import last_run

Totals = Mapping[Field, float]

POOL = {
    "size": "Database connections that a worker keeps open.",
    "in_use": "Database connections of a worker in use.",
    "overflow": "Database connections of a worker beyond its pool's size.",
}


class MetricsEndpoint:
    """Renders the metrics, within the time limit of health. Made once per web process."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._redis = fail_fast_redis(settings)
        self._metrics = metrics
        self._settings = settings
        self._probe = Probe("metrics", self._facts)

    def render(self) -> bytes:
        """Return the metrics in Prometheus's text format; without Redis, only that it does not answer."""
        answer = ask(self._probe)["metrics"]
        families = [*_families(answer)]
        last, every_s = answer.facts.get("reconciliation"), self._settings.reconcile_every
        if last is not None and every_s is not None:
            families += _reconciliation(last_run.summary(last, every_s, datetime.now(UTC)))
        registry: Any = SimpleNamespace(collect=lambda: families)  # all that generate_latest uses of one
        return generate_latest(registry)

    def _facts(self) -> Facts:
        with suppress(ResponseError):  # Redis refuses writes: the counts wait, and the rest is shown
            self._metrics.flush(self._redis)
        facts = redis_facts(self._redis)
        found = alarms({**facts, "settings": self._settings, "reconciliation_summary": None})
        return {**facts, "causes": [*facts["causes"], *found], "totals": _totals(self._redis)}


def _totals(redis: Redis) -> Totals:
    raw: Any = redis.hgetall(TOTALS_KEY)
    totals: dict[Field, float] = {}
    for field, value in raw.items():
        with suppress(ValueError, TypeError):  # a field of another program
            totals[tuple(json.loads(field))] = float(value)
    return totals


def _families(answer: ProbeResult) -> Iterator[Metric]:
    is_up = answer.error is None
    yield Gauge("clerk_sync_redis_up", "Whether Redis answers; without it nothing else is known.", int(is_up))
    if is_up:
        yield from _measured(answer.facts)
        totals = answer.facts["totals"]
        yield from (_counter(counter, totals) for counter in COUNTERS)
        yield from (_histogram(histogram, totals) for histogram in HISTOGRAMS)
        yield Gauge(LAST_APPLIED, "When an event was last applied.", totals.get((LAST_APPLIED,)))


def _counter(counter: Counter, totals: Totals) -> Metric:
    # A counter that was never raised is 0, not absent: of a new series Prometheus misses the first step.
    family = CounterMetricFamily(counter.name, counter.help, labels=list(counter.labels))
    values: dict[Field, float] = dict.fromkeys(product(*counter.labels.values()), 0)
    values |= {field[1:]: value for field, value in totals.items() if field[0] == counter.name}
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


def _histogram(histogram: Histogram, totals: Totals) -> Metric:
    found = {field[1]: value for field, value in totals.items() if field[0] == histogram.name}
    total = found.pop(SUM, 0.0)
    bounds = [*map(str, histogram.buckets), INFINITY]
    # A version with other buckets may have counted too: a count belongs to its own bound and all above.
    buckets = [(bound, sum(n for le, n in found.items() if float(le) <= float(bound))) for bound in bounds]
    family = HistogramMetricFamily(histogram.name, histogram.help)
    family.add_metric([], buckets, total)
    return family


def _measured(facts: Facts) -> Iterator[Metric]:
    queue, workers = facts["queue"], facts["workers"]
    yield Gauge(
        "clerk_sync_redis_takes_writes",
        "Whether Redis accepts writes; if not, deliveries are refused.",
        int(facts["refusal"] is None),
    )
    yield Gauge("clerk_sync_queue_depth", "Deliveries waiting in the queue.", queue["depth"])
    yield Gauge(
        "clerk_sync_queue_oldest_age_seconds",
        "Age of the oldest waiting delivery; 0 if none waits.",
        queue["oldest_age_s"] or 0,
    )
    yield Gauge("clerk_sync_started_jobs", "Jobs reserved by workers.", queue["started"])
    yield Gauge("clerk_sync_scheduled_jobs", "Jobs waiting for their next retry.", queue["scheduled"])
    yield Gauge(
        "clerk_sync_failed_jobs", "Failed jobs that are not replayed or discarded yet.", queue["failed"]
    )
    yield Gauge("clerk_sync_workers_alive", "Workers with a heartbeat.", workers["alive"])
    yield Gauge("clerk_sync_receivers_alive", "Web processes with a heartbeat.", facts["receivers"]["alive"])
    yield Gauge(
        "clerk_sync_batch_in_hand_seconds",
        "Longest time that a worker has been processing its batch; 0 if none has one.",
        max((worker["in_hand_s"] or 0 for worker in workers["list"]), default=0),
    )
    yield Gauge(
        "clerk_sync_lock_wait_seconds",
        "Longest time that a delivery has waited for a row locked by another transaction; 0 if none waits.",
        facts["lock_waits"].longest_s,
    )
    yield _labelled(
        "clerk_sync_degraded",
        "Why /health is degraded; what only the database shows, for five minutes after /health or status.",
        "cause",
        {cause: cause in facts["causes"] for cause in ALARMS},
    )
    yield _labelled(
        "clerk_sync_workers_waiting",
        "Workers that wait for a dependency, by dependency.",
        "dependency",
        {what: sum(worker["waiting_for"] == what for worker in workers["list"]) for what in DEPENDENCIES},
    )
    pools = {worker["name"]: worker["pool"] for worker in workers["list"] if worker["pool"]}
    for key, help_ in POOL.items():
        yield _labelled(
            f"clerk_sync_pool_{key}", help_, "worker", {name: pool[key] for name, pool in pools.items()}
        )
    yield Gauge(
        "clerk_sync_last_received_timestamp_seconds",
        "When a delivery was last received.",
        _timestamp(facts["last_received_at"]),
    )
    yield Gauge(
        "clerk_sync_watching_since_timestamp_seconds",
        "First request for health, status or metrics: silence counts from it if nothing was received.",
        _timestamp(facts["watching_since"]),
    )


def _timestamp(moment: str | None) -> float | None:
    return datetime.fromisoformat(moment).timestamp() if moment else None


def _reconciliation(last: Mapping[str, Any]) -> Iterator[Metric]:
    yield Gauge(
        "clerk_sync_reconcile_interval_seconds",
        "Interval of the scheduled reconciliation: RECONCILE_EVERY.",
        last["every_s"],
    )
    yield Gauge(
        "clerk_sync_reconcile_timestamp_seconds",
        "When the last reconciliation ended.",
        _timestamp(last["finished_at"]),
    )
    yield Gauge("clerk_sync_reconcile_seconds", "Duration of the last reconciliation.", last["seconds"])
    results = {result.value: result is last["result"] for result in last_run.Result}
    yield _labelled("clerk_sync_reconcile_result", "How the last reconciliation ended.", "result", results)
    if last["synced"] is not None:
        help_ = "Users that the last reconciliation synced, by how."
        yield _labelled("clerk_sync_reconcile_synced", help_, "how", last["synced"])
    if last["drift"] is not None:
        help_ = "Users who still differ after the last reconciliation, by kind."
        yield _labelled("clerk_sync_reconcile_drift", help_, "kind", last["drift"])


def _labelled(name: str, help_: str, label: str, values: Mapping[str, float]) -> Metric:
    family = Gauge(name, help_, labels=[label])
    for of, value in values.items():
        family.add_metric([of], value)
    return family

from collections.abc import Iterator, Sequence

import pytest
from prometheus_client.parser import text_string_to_metric_families

import config
from db.merge.change import UserChange
from db.merge.incoming import Outcome, ReceivedChange
from db.times import now_ms
from tests.support.settings import NO_DATABASE, MakeSettings
from worker.monitoring.metrics import Metrics
from worker.monitoring.prometheus import MetricsEndpoint
from worker.queue.consumer import TakenJob
from worker.runner.instrumentation import BatchInstrumentation

HOUR_MS = 3_600_000


@pytest.fixture
def settings(make_settings: MakeSettings) -> config.Settings:
    return make_settings(**NO_DATABASE)


@pytest.fixture
def counts() -> Metrics:
    return Metrics()


@pytest.fixture
def endpoint(settings: config.Settings, counts: Metrics) -> Iterator[MetricsEndpoint]:
    made = MetricsEndpoint(settings, counts)
    yield made
    made.close()


def test_a_job_that_had_failed_before_counts_as_applied_and_in_no_lag(
    counts: Metrics, endpoint: MetricsEndpoint
) -> None:
    now = now_ms()
    jobs = [_job("fresh", {}), _job("replayed", {"attempts": 2, "reason": "a reason"})]
    batch = [_incoming("fresh", now - 50), _incoming("replayed", now - 5 * HOUR_MS)]
    assert BatchInstrumentation(counts).instrument(_apply, jobs)(batch) == [Outcome.APPLIED] * 2
    shown = {
        sample.name: sample.value
        for family in text_string_to_metric_families(endpoint.render().decode())
        for sample in family.samples
        if sample.labels in ({}, {"type": "user.updated", "outcome": "applied"})
    }
    assert shown["clerk_sync_events_applied_total"] == 2
    for lag in ("clerk_sync_delivery_lag_seconds", "clerk_sync_event_lag_seconds"):
        assert shown[f"{lag}_count"] == 1
        assert shown[f"{lag}_sum"] < 60


def _job(id_: str, meta: dict[str, object]) -> TakenJob:
    return TakenJob(id_, b"", "", 3, (10,), meta)


def _incoming(id_: str, at: int) -> ReceivedChange:
    return ReceivedChange(UserChange("user_one"), id_, "user.updated", at, at)


def _apply(batch: Sequence[ReceivedChange]) -> list[Outcome]:
    return [Outcome.APPLIED] * len(batch)

from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

import config
from db.merge.change import UserChange
from db.merge.incoming import Outcome, ReceivedChange
from db.times import now_ms
from tests.support.settings import NO_DATABASE, MakeSettings
from worker.monitoring.metrics import Metrics
from worker.monitoring.prometheus import MetricsEndpoint
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
    batch = [_incoming("fresh", now - 50), _incoming("replayed", now - 5 * HOUR_MS, is_repeated=True)]
    BatchInstrumentation(counts).record_transaction(batch, [Outcome.APPLIED] * 2, 0.01)
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


def _incoming(id_: str, at: int, *, is_repeated: bool = False) -> ReceivedChange:
    return ReceivedChange(UserChange("user_one"), id_, "user.updated", at, at, is_repeated=is_repeated)

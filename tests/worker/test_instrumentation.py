import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

import config
from db.merge.change import UserChange
from db.merge.incoming import Outcome, ReceivedChange
from db.times import now_ms
from tests.support.settings import NO_DATABASE, MakeSettings
from worker.monitoring.metrics import Metrics
from worker.monitoring.prometheus import MetricsEndpoint
from worker.runner.instrumentation import EVENTS_A_LINE, BatchInstrumentation

HOUR_MS = 3_600_000


@pytest.fixture
def settings(make_settings: MakeSettings) -> config.Settings:
    return make_settings(**NO_DATABASE)


@pytest.fixture
def counts() -> Metrics:
    return Metrics()


@pytest.fixture
def endpoint(settings: config.Settings, counts: Metrics) -> MetricsEndpoint:
    return MetricsEndpoint(settings, counts)


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


@pytest.mark.parametrize("count", [1, EVENTS_A_LINE, 400])
def test_no_line_of_a_batch_is_longer_than_platforms_take(counts: Metrics, count: int) -> None:
    ids = [f"msg_{i:027}" for i in range(count)]
    batch = [_incoming(id_, now_ms()) for id_ in ids]
    outcomes = [Outcome.STALE, *[Outcome.APPLIED] * (count - 1)]
    with capture_logs() as lines:
        BatchInstrumentation(counts).record_transaction(batch, outcomes, 0.01)
    assert [event["svix_id"] for line in lines for event in line["events"]] == ids
    assert [line["jobs"] for line in lines] == [len(line["events"]) for line in lines]
    assert {line["of"] for line in lines} == {count}
    assert sum(line.get("applied", 0) for line in lines) == count - 1
    assert sum(line.get("stale", 0) for line in lines) == 1
    assert max(len(orjson.dumps(line)) for line in lines) < 9_000, "Heroku cuts lines of over 10,000 bytes"


def _incoming(id_: str, at: int, *, is_repeated: bool = False) -> ReceivedChange:
    return ReceivedChange(UserChange(f"user_{1:027}"), id_, "user.updated", at, at, is_repeated=is_repeated)

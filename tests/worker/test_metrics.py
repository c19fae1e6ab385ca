import json
import time
from pathlib import Path

import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from structlog.testing import capture_logs

import config
from cli.dev.servers import RedisServer, free_port
from db.merge.change import UserChange
from db.merge.incoming import Outcome, ReceivedChange
from db.times import now_ms
from tests.support.failed_jobs import fail
from tests.support.queue import delivery, put
from tests.support.settings import NO_DATABASE, MakeSettings
from tests.support.together import together
from worker.monitoring import metrics as m
from worker.monitoring import recent
from worker.monitoring.metrics import Metrics
from worker.monitoring.prometheus import MetricsEndpoint
from worker.monitoring.redis_stats import CAUSES_KEY
from worker.queue.producer import DeliveryQueue
from worker.queue.rq_format import SUSPENDED_KEY
from worker.redis_client import fail_fast_redis
from worker.runner.instrumentation import EVENTS_A_LINE, BatchInstrumentation

HOUR_MS = 3_600_000

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def settings(make_settings: MakeSettings) -> config.Settings:
    return make_settings(**NO_DATABASE)


@pytest.fixture
def endpoint(settings: config.Settings) -> MetricsEndpoint:
    return MetricsEndpoint(settings, Metrics())


def samples(endpoint: MetricsEndpoint) -> Samples:
    families = text_string_to_metric_families(endpoint.render().decode())
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(endpoint: MetricsEndpoint, name: str, **labels: str) -> float | None:
    return samples(endpoint).get((name, frozenset(labels.items())))


def test_what_several_processes_count_is_added_up(endpoint: MetricsEndpoint, redis: Redis) -> None:
    for _ in range(3):
        process = Metrics()
        process.count(m.DELIVERIES, "user.created", "queued")
        process.count(m.DELIVERIES, "user.created", "queued", by=2)
        process.flush(redis)
        process.flush(redis)
    labels = {"type": "user.created", "answer": "queued"}
    assert value(endpoint, "clerk_sync_deliveries_total", **labels) == 9


def test_what_is_counted_in_many_threads_at_once_is_all_there(
    endpoint: MetricsEndpoint, redis: Redis
) -> None:
    process = Metrics()

    def count() -> None:
        for i in range(500):
            process.count(m.RETRIES, "user.created")
            process.observe(m.BATCH_SIZE, 3)
            if i % 100 == 0:
                process.flush(redis)

    together([count] * 8)
    process.flush(redis)
    assert value(endpoint, "clerk_sync_retries_total", type="user.created") == 4000
    assert value(endpoint, "clerk_sync_batch_size_sum") == 12000


def test_a_histogram_is_cumulative_and_has_its_bounds(endpoint: MetricsEndpoint, redis: Redis) -> None:
    process = Metrics()
    process.observe(m.BATCH_SIZE, 1, 2, 3, 100, 501)
    process.flush(redis)
    found = {
        le: value(endpoint, "clerk_sync_batch_size_bucket", le=le) for le in ("1", "2", "5", "100", "500")
    }
    assert found == {"1": 1, "2": 2, "5": 3, "100": 4, "500": 4}
    assert value(endpoint, "clerk_sync_batch_size_bucket", le="+Inf") == 5
    assert value(endpoint, "clerk_sync_batch_size_count") == 5
    assert value(endpoint, "clerk_sync_batch_size_sum") == 607


def test_buckets_of_another_version_are_counted_into_ours(endpoint: MetricsEndpoint, redis: Redis) -> None:
    other = m.Histogram(m.BATCH_SIZE.name, "", (3, 7))
    process = Metrics()
    process.observe(other, 2, 6, 1000)
    process.flush(redis)
    assert value(endpoint, "clerk_sync_batch_size_bucket", le="2") == 0
    assert value(endpoint, "clerk_sync_batch_size_bucket", le="5") == 1
    assert value(endpoint, "clerk_sync_batch_size_bucket", le="10") == 2
    assert value(endpoint, "clerk_sync_batch_size_count") == 3


def test_what_has_not_happened_is_shown_as_zero(endpoint: MetricsEndpoint) -> None:
    assert value(endpoint, "clerk_sync_jobs_failed_total", type="user.created") == 0
    assert value(endpoint, "clerk_sync_rejected_signatures_total", reason="mismatch") == 0
    assert value(endpoint, "clerk_sync_pool_timeouts_total") == 0
    assert value(endpoint, "clerk_sync_apply_seconds_count") == 0
    assert value(endpoint, "clerk_sync_last_applied_timestamp_seconds") is None


def test_no_value_of_a_label_comes_from_outside(endpoint: MetricsEndpoint, redis: Redis) -> None:
    process = Metrics()
    before = len(samples(endpoint))
    for i in range(100):
        process.count(m.DELIVERIES, f"made.up{i}", "queued")
        process.count(m.DELIVERIES, None, f"made up {i}")
    process.flush(redis)
    assert len(samples(endpoint)) == before + 1, "the answer `other`, which none of ours is"
    assert value(endpoint, "clerk_sync_deliveries_total", type="other", answer="queued") == 100
    assert value(endpoint, "clerk_sync_deliveries_total", type="other", answer="other") == 100
    assert redis.hlen(m.TOTALS_KEY) == 2


def test_a_total_that_a_process_keeps_itself_is_counted_once(endpoint: MetricsEndpoint, redis: Redis) -> None:
    for totals in ((1, 1, 4), (0, 2)):
        process = Metrics()
        for total in totals:
            process.count_up_to(m.POOL_TIMEOUTS, total)
            process.flush(redis)
    assert value(endpoint, "clerk_sync_pool_timeouts_total") == 6


def test_the_latest_moment_is_kept_whichever_comes_last(endpoint: MetricsEndpoint, redis: Redis) -> None:
    for at in (1_700_000_000.5, 1_800_000_000.25, 1_750_000_000):
        process = Metrics()
        process.set_last_applied(at)
        process.set_last_applied(at - 1)
        process.flush(redis)
    assert value(endpoint, "clerk_sync_last_applied_timestamp_seconds") == 1_800_000_000.25


class LostAnswers:
    """A Redis whose answers are lost: it executes every command, and no answer arrives."""

    def __init__(self, redis: Redis, times: int) -> None:
        self._redis = redis
        self._times = times

    def eval(self, *arguments: object) -> object:
        answer: object = self._redis.eval(*arguments)  # type: ignore[arg-type] # handed through as they are
        self._times -= 1
        if self._times >= 0:
            raise RedisConnectionError
        return answer


def test_counts_whose_arrival_was_not_confirmed_are_not_added_twice(
    endpoint: MetricsEndpoint, redis: Redis
) -> None:
    process = Metrics()
    process.count(m.RETRIES, "user.created")
    flaky = LostAnswers(redis, times=2)
    for _ in range(2):
        with pytest.raises(RedisConnectionError):
            process.flush(flaky)  # type: ignore[arg-type] # behaves like one
        process.count(m.RETRIES, "user.created")
    process.flush(flaky)  # type: ignore[arg-type]
    process.flush(redis)
    assert value(endpoint, "clerk_sync_retries_total", type="user.created") == 3


def test_counts_wait_for_a_redis_that_is_away(make_settings: MakeSettings, server_directory: Path) -> None:
    server = RedisServer(server_directory, free_port(), durable=False)
    settings = make_settings(redis_url=server.url, **NO_DATABASE)
    process = Metrics()
    endpoint = MetricsEndpoint(settings, process)
    for _ in range(5):
        process.count(m.RETRIES, "user.created")
        text = endpoint.render().decode()
        assert "clerk_sync_redis_up 0.0" in text
        assert [line for line in text.splitlines() if not line.startswith("#")] == ["clerk_sync_redis_up 0.0"]
    server.start()
    try:
        assert value(endpoint, "clerk_sync_redis_up") == 1
        assert value(endpoint, "clerk_sync_retries_total", type="user.created") == 5
    finally:
        server.stop()


@pytest.mark.parametrize("damage", [("CONFIG", "SET", "maxmemory", "1"), ("REPLICAOF", "127.0.0.1", "1")])
def test_a_redis_that_takes_no_writes_is_still_read(
    make_settings: MakeSettings, own_redis: RedisServer, damage: tuple[str, ...]
) -> None:
    process = Metrics()
    endpoint = MetricsEndpoint(make_settings(redis_url=own_redis.url, **NO_DATABASE), process)
    with Redis.from_url(own_redis.url) as redis:
        put(redis, delivery())
        assert value(endpoint, "clerk_sync_redis_takes_writes") == 1
        process.count(m.RETRIES, "user.created")
        redis.execute_command(*damage)
        assert value(endpoint, "clerk_sync_redis_up") == 1
        assert value(endpoint, "clerk_sync_redis_takes_writes") == 0
        assert value(endpoint, "clerk_sync_queue_depth") == 1
        assert value(endpoint, "clerk_sync_retries_total", type="user.created") == 0
        redis.execute_command("CONFIG", "SET", "maxmemory", "0")
        redis.execute_command("REPLICAOF", "NO", "ONE")
        assert value(endpoint, "clerk_sync_redis_takes_writes") == 1
        assert value(endpoint, "clerk_sync_retries_total", type="user.created") == 1, "the count has waited"


def test_since_when_health_is_watched_is_kept(endpoint: MetricsEndpoint) -> None:
    assert value(endpoint, "clerk_sync_last_received_timestamp_seconds") is None
    first = value(endpoint, "clerk_sync_watching_since_timestamp_seconds")
    time.sleep(0.02)
    kept = value(endpoint, "clerk_sync_watching_since_timestamp_seconds")
    assert first is not None
    assert kept == pytest.approx(first, abs=0.01)


def test_what_waits_and_what_has_failed_is_measured(
    endpoint: MetricsEndpoint, redis: Redis, queue: DeliveryQueue
) -> None:
    fail(redis)
    queue.enqueue(delivery())
    assert value(endpoint, "clerk_sync_queue_depth") == 1
    assert value(endpoint, "clerk_sync_failed_jobs") == 1
    assert value(endpoint, "clerk_sync_scheduled_jobs") == 0
    assert value(endpoint, "clerk_sync_workers_alive") == 0
    assert (value(endpoint, "clerk_sync_queue_oldest_age_seconds") or 0) > 0
    assert (value(endpoint, "clerk_sync_last_received_timestamp_seconds") or 0) > 1.7e9


def test_flushing_nothing_asks_redis_nothing(make_settings: MakeSettings) -> None:
    nowhere = fail_fast_redis(make_settings(redis_url="redis://127.0.0.1:1/0", **NO_DATABASE))
    Metrics().flush(nowhere)


def test_what_redis_shows_to_degrade_is_shown_at_once_and_the_rest_as_of_the_last_report(
    endpoint: MetricsEndpoint, redis: Redis
) -> None:
    def degraded(cause: str) -> float | None:
        return value(endpoint, "clerk_sync_degraded", cause=cause)

    assert (degraded("signatures"), degraded("suspended"), degraded("clock")) == (0, 0, 0)
    recent.add(redis, {recent.MISMATCH: 9})
    redis.set(SUSPENDED_KEY, 1)
    redis.set(CAUSES_KEY, json.dumps(["clock"]))
    assert (degraded("signatures"), degraded("suspended"), degraded("clock")) == (1, 1, 1)
    redis.delete(SUSPENDED_KEY, *redis.keys(f"{recent.KEY_PREFIX}*"))
    assert (degraded("signatures"), degraded("suspended"), degraded("clock")) == (0, 0, 1)


# What a batch leaves


def test_a_job_that_had_failed_before_counts_as_applied_and_in_no_lag(
    settings: config.Settings,
) -> None:
    counts, now = Metrics(), now_ms()
    batch = [_incoming("fresh", now - 50), _incoming("replayed", now - 5 * HOUR_MS, is_repeated=True)]
    BatchInstrumentation(counts).record_transaction(batch, [Outcome.APPLIED] * 2, 0.01)
    endpoint = MetricsEndpoint(settings, counts)
    assert value(endpoint, "clerk_sync_events_applied_total", type="user.updated", outcome="applied") == 2
    for lag in ("clerk_sync_delivery_lag_seconds", "clerk_sync_event_lag_seconds"):
        assert value(endpoint, f"{lag}_count") == 1
        assert (value(endpoint, f"{lag}_sum") or 60) < 60


@pytest.mark.parametrize("count", [1, EVENTS_A_LINE, 400])
def test_no_line_of_a_batch_is_longer_than_platforms_take(count: int) -> None:
    ids = [f"msg_{i:027}" for i in range(count)]
    batch = [_incoming(id_, now_ms()) for id_ in ids]
    outcomes = [Outcome.STALE, *[Outcome.APPLIED] * (count - 1)]
    with capture_logs() as lines:
        BatchInstrumentation(Metrics()).record_transaction(batch, outcomes, 0.01)
    assert [event["svix_id"] for line in lines for event in line["events"]] == ids
    assert [line["jobs"] for line in lines] == [len(line["events"]) for line in lines]
    assert {line["of"] for line in lines} == {count}
    assert sum(line.get("applied", 0) for line in lines) == count - 1
    assert sum(line.get("stale", 0) for line in lines) == 1
    assert max(len(orjson.dumps(line)) for line in lines) < 9_000, "Heroku cuts lines of over 10,000 bytes"


def _incoming(id_: str, at: int, *, is_repeated: bool = False) -> ReceivedChange:
    return ReceivedChange(UserChange(f"user_{1:027}"), id_, "user.updated", at, at, is_repeated=is_repeated)

"""The last reconciliation as health, metrics and the terminal show it."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from tests.support.service import add_service
from tests.support.settings import MakeSettings
from worker.monitoring.health import Status
from worker.monitoring.metrics import Metrics
from worker.monitoring.prometheus import MetricsEndpoint
from worker.sync.last_run import KEY, KINDS, keep, load

Report = Callable[..., dict[str, Any]]
HOUR_S = 3600.0


@pytest.fixture
def report(make_settings: MakeSettings, redis: Redis) -> Report:
    """Return what health says, with a worker alive."""
    add_service(redis)

    def ask(**overrides: Any) -> dict[str, Any]:
        settings = make_settings(clerk_secret_key="sk_live_key", **{"reconcile_every": "1h", **overrides})
        status = Status(settings)
        try:
            return status.report()
        finally:
            status.close()

    return ask


@pytest.fixture
def shown(make_settings: MakeSettings) -> Callable[[], dict[str, float]]:
    """Return what `/metrics` says of reconciliations."""
    settings = make_settings(clerk_secret_key="sk_live_key", reconcile_every="1h")
    endpoint = MetricsEndpoint(settings, Metrics())

    def ask() -> dict[str, float]:
        families = text_string_to_metric_families(endpoint.render().decode())
        return {
            " ".join(
                [sample.name.removeprefix("clerk_sync_reconcile_"), *sample.labels.values()]
            ): sample.value
            for family in families
            for sample in family.samples
            if sample.name.startswith("clerk_sync_reconcile_")
        }

    return ask


def reconciled(
    redis: Redis,
    *,
    ago_s: float = 60,
    error: str | None = None,
    refusal: str | None = None,
    backfill: dict[str, int] | None = None,
    **drift: int,
) -> None:
    """Let the last reconciliation have ended so long ago, with this result."""
    ended = datetime.now(UTC) - timedelta(seconds=ago_s)
    found = {"listed": 9, "local": 9, **dict.fromkeys(KINDS, 0), **drift, "refusal": refusal}
    keep(
        redis,
        {
            "started_at": (ended - timedelta(seconds=12.5)).isoformat(),
            "finished_at": ended.isoformat(),
            "error": error,
            "backfill": backfill,
            "drift": None if error else found,
        },
    )


def test_a_reconciliation_that_went_well_is_shown(report: Report, redis: Redis) -> None:
    reconciled(redis)
    health = report()
    assert (health["status"], health["warnings"]) == ("ok", [w for w in health["warnings"] if "append" in w])
    reconciliation = health["reconciliation"]
    assert (reconciliation["result"], reconciliation["seconds"], reconciliation["differing"]) == (
        "ok",
        12.5,
        0,
    )
    assert (reconciliation["every_s"], reconciliation["reason"], reconciliation["overdue"]) == (
        HOUR_S,
        None,
        False,
    )
    assert reconciliation["synced"] is None


def test_what_a_reconciliation_fetched_is_shown_also_when_no_user_differs(
    report: Report, redis: Redis, shown: Callable[[], dict[str, float]]
) -> None:
    reconciled(redis, backfill={"seen": 40, "created": 3, "updated": 7, "unchanged": 30}, merged=20)
    health = report()["reconciliation"]
    assert (health["differing"], health["synced"]) == (0, {"created": 3, "updated": 7, "merged": 20})
    found = shown()
    assert (found["synced created"], found["synced updated"], found["synced merged"]) == (3, 7, 20)


def test_what_was_fetched_before_a_failure_is_shown(
    report: Report, redis: Redis, shown: Callable[[], dict[str, float]]
) -> None:
    reconciled(redis, error="it failed", backfill={"seen": 40, "created": 3, "updated": 7, "unchanged": 30})
    assert report()["reconciliation"]["synced"] == {"created": 3, "updated": 7, "merged": 0}
    assert shown()["synced updated"] == 7


def test_drift_is_a_warning_and_no_trouble_of_the_service(report: Report, redis: Redis) -> None:
    reconciled(redis, stale=2, ghost=1)
    health = report()
    assert health["status"] == "ok"
    assert health["reconciliation"]["drift"] == {**dict.fromkeys(KINDS, 0), "stale": 2, "ghost": 1}
    assert any("3 users differ" in warning for warning in health["warnings"])


def test_a_listing_that_proves_nothing_is_a_warning(report: Report, redis: Redis) -> None:
    reconciled(redis, refusal="the listing was cut short")
    health = report()
    assert (health["status"], health["reconciliation"]["result"]) == ("ok", "refused")
    assert any("cut short" in warning for warning in health["warnings"])


def test_a_reconciliation_that_failed_degrades(report: Report, redis: Redis) -> None:
    reconciled(redis, error="Clerk's API refuses the key (401): check CLERK_SECRET_KEY")
    health = report()
    assert (health["status"], health["reconciliation"]["result"]) == ("degraded", "failed")
    assert any("refuses the key" in warning for warning in health["warnings"])


@pytest.mark.parametrize(("hours", "status"), [(1.5, "ok"), (2.9, "ok"), (3.1, "degraded")])
def test_a_reconciliation_that_is_overdue_by_more_than_two_intervals_degrades(
    report: Report, redis: Redis, hours: float, status: str
) -> None:
    reconciled(redis, ago_s=hours * HOUR_S)
    health = report()
    assert (health["status"], health["reconciliation"]["overdue"]) == (status, status == "degraded")


def test_before_the_first_reconciliation_nothing_is_wrong(report: Report) -> None:
    health = report()
    assert health["status"] == "ok"
    assert health["reconciliation"]["finished_at"] is None
    assert health["reconciliation"]["result"] is None


def test_without_an_interval_nothing_is_said_of_reconciliations(
    report: Report, redis: Redis, make_settings: MakeSettings
) -> None:
    reconciled(redis, error="it failed")
    health = report(reconcile_every=None)
    assert health["status"] == "ok"
    assert "reconciliation" not in health
    endpoint = MetricsEndpoint(make_settings(), Metrics())
    assert b"clerk_sync_reconcile" not in endpoint.render()


@pytest.mark.parametrize("kept", ["", "[]", "{}", '{"finished_at": 3}', '{"drift": 1}', "\0", "nonsense"])
def test_what_another_program_wrote_there_is_no_reconciliation(
    report: Report, redis: Redis, kept: str
) -> None:
    redis.set(KEY, kept)
    assert load(redis) is None
    health = report()
    assert (health["status"], health["reconciliation"]["result"]) == ("ok", None)


def test_the_figures_of_the_last_reconciliation_are_shown(
    shown: Callable[[], dict[str, float]], redis: Redis
) -> None:
    assert shown() == {}
    reconciled(redis, missing=4)
    found = shown()
    assert abs(found.pop("timestamp_seconds") - datetime.now(UTC).timestamp() + 60) < 30
    assert found == {
        "interval_seconds": HOUR_S,
        "seconds": 12.5,
        "result ok": 1,
        "result refused": 0,
        "result failed": 0,
        **{f"drift {kind}": 4 if kind == "missing" else 0 for kind in KINDS},
    }


def test_after_a_failure_no_drift_is_shown(shown: Callable[[], dict[str, float]], redis: Redis) -> None:
    reconciled(redis, error="it failed")
    found = shown()
    assert (found["result failed"], found["result ok"]) == (1, 0)
    assert not any(name.startswith("drift") for name in found)

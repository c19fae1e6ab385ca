"""The last reconciliation as health, metrics and the terminal show it."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from tests.support.service import AskHealth, add_service
from tests.support.settings import MakeSettings
from worker.monitoring.metrics import Metrics
from worker.monitoring.prometheus import MetricsEndpoint
from worker.sync.last_run import KEY, KINDS, keep, load

Health = Callable[[], dict[str, Any]]
Shown = Callable[[], dict[str, float]]
HOUR_S = 3600.0
EVERY_HOUR = {"clerk_secret_key": "sk_live_key", "reconcile_every": "1h"}


@pytest.fixture
def health(report: AskHealth, redis: Redis) -> Health:
    """Return what health says of a service that reconciles every hour."""
    add_service(redis)
    return lambda: report(**EVERY_HOUR)


@pytest.fixture
def shown(make_settings: MakeSettings) -> Shown:
    """Return what `/metrics` says of reconciliations."""
    endpoint = MetricsEndpoint(make_settings(**EVERY_HOUR), Metrics())
    prefix = "clerk_sync_reconcile_"

    def ask() -> dict[str, float]:
        families = text_string_to_metric_families(endpoint.render().decode())
        return {
            " ".join([sample.name.removeprefix(prefix), *sample.labels.values()]): sample.value
            for family in families
            for sample in family.samples
            if sample.name.startswith(prefix)
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


def test_a_reconciliation_that_went_well_is_shown(health: Health, redis: Redis) -> None:
    reconciled(redis)
    found = health()
    assert (found["status"], [it for it in found["warnings"] if "append" not in it]) == ("ok", [])
    facts = ("result", "seconds", "differing", "every_s", "reason", "overdue", "synced")
    assert [found["reconciliation"][name] for name in facts] == ["ok", 12.5, 0, HOUR_S, None, False, None]


def test_what_a_reconciliation_fetched_is_shown_also_when_no_user_differs(
    health: Health, redis: Redis, shown: Shown
) -> None:
    reconciled(redis, backfill={"seen": 40, "created": 3, "updated": 7, "unchanged": 30}, merged=20)
    last = health()["reconciliation"]
    assert (last["differing"], last["synced"]) == (0, {"created": 3, "updated": 7, "merged": 20})
    found = shown()
    assert (found["synced created"], found["synced updated"], found["synced merged"]) == (3, 7, 20)


def test_after_a_failure_what_was_fetched_is_shown_and_no_drift(
    health: Health, redis: Redis, shown: Shown
) -> None:
    reconciled(redis, error="it failed", backfill={"seen": 40, "created": 3, "updated": 7, "unchanged": 30})
    assert health()["reconciliation"]["synced"] == {"created": 3, "updated": 7, "merged": 0}
    found = shown()
    assert (found["result failed"], found["result ok"], found["synced updated"]) == (1, 0, 7)
    assert not any(name.startswith("drift") for name in found)


TROUBLES: list[tuple[dict[str, Any], str, str, str]] = [
    ({"stale": 2, "ghost": 1}, "ok", "ok", "3 users differ"),
    ({"refusal": "the listing was cut short"}, "ok", "refused", "cut short"),
    ({"error": "Clerk's API refuses the key (401)"}, "degraded", "failed", "refuses the key"),
]


@pytest.mark.parametrize(("ended", "status", "result", "warning"), TROUBLES)
def test_only_a_failure_degrades_and_drift_or_a_refusal_is_a_warning(
    health: Health, redis: Redis, *, ended: dict[str, Any], status: str, result: str, warning: str
) -> None:
    reconciled(redis, **ended)
    found = health()
    assert (found["status"], found["reconciliation"]["result"]) == (status, result)
    assert any(warning in it for it in found["warnings"])
    if "stale" in ended:
        assert found["reconciliation"]["drift"] == dict.fromkeys(KINDS, 0) | ended


@pytest.mark.parametrize(("hours", "status"), [(1.5, "ok"), (2.9, "ok"), (3.1, "degraded")])
def test_a_reconciliation_that_is_overdue_by_more_than_two_intervals_degrades(
    health: Health, redis: Redis, hours: float, status: str
) -> None:
    reconciled(redis, ago_s=hours * HOUR_S)
    found = health()
    assert (found["status"], found["reconciliation"]["overdue"]) == (status, status == "degraded")


def test_before_the_first_reconciliation_nothing_is_wrong(health: Health) -> None:
    found = health()
    assert (found["status"], found["reconciliation"]["finished_at"]) == ("ok", None)
    assert found["reconciliation"]["result"] is None


@pytest.mark.usefixtures("health")
def test_without_an_interval_nothing_is_said_of_reconciliations(
    report: AskHealth, redis: Redis, make_settings: MakeSettings
) -> None:
    reconciled(redis, error="it failed")
    found = report()
    assert found["status"] == "ok"
    assert "reconciliation" not in found
    endpoint = MetricsEndpoint(make_settings(), Metrics())
    assert b"clerk_sync_reconcile" not in endpoint.render()


@pytest.mark.parametrize("kept", ["", "[]", "{}", '{"finished_at": 3}', '{"drift": 1}', "\0", "nonsense"])
def test_what_another_program_wrote_there_is_no_reconciliation(
    health: Health, redis: Redis, kept: str
) -> None:
    redis.set(KEY, kept)
    assert load(redis) is None
    found = health()
    assert (found["status"], found["reconciliation"]["result"]) == ("ok", None)


def test_the_figures_of_the_last_reconciliation_are_shown(shown: Shown, redis: Redis) -> None:
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

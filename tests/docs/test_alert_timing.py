"""When each alert rule fires: with its own patience, over two targets that show the same, by promtool."""

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ALERTS = Path(__file__).parents[2] / "docs" / "alerts.yml"
TARGETS = ("web-1", "web-2")
ALWAYS = {
    "redis_up": "1x200",
    "redis_takes_writes": "1x200",
    "workers_alive": "1x200",
    "receivers_alive": "1x200",
    "last_received_timestamp_seconds": "0+60x200",  # a delivery each minute
    "watching_since_timestamp_seconds": "0x200",
}

pytestmark = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")


class AlertCase(NamedTuple):
    """Series that replace or join ALWAYS (None: not there), and which minute finds what firing."""

    series: dict[str, str | None]
    firing: dict[int, set[str]]


CASES = {
    "all is well": AlertCase({}, {1: set(), 180: set()}),
    "no target scraped": AlertCase(dict.fromkeys(ALWAYS), {4: set(), 6: {"ClerkSyncNotScraped"}}),
    "Redis away for less than its patience": AlertCase(
        {"redis_up": "1x5 0 1x100"}, {minute: set() for minute in range(4, 9)}
    ),
    "Redis away": AlertCase({"redis_up": "1x5 0x100"}, {6: set(), 7: {"ClerkSyncRedisDown"}}),
    "Redis takes no writes": AlertCase(
        {"redis_takes_writes": "1x5 0x100"}, {6: set(), 7: {"ClerkSyncRedisRefusesWrites"}}
    ),
    "no delivery for an hour": AlertCase(
        {"last_received_timestamp_seconds": "0x200"}, {65: set(), 66: {"ClerkSyncSilence"}}
    ),
    "no delivery ever": AlertCase(
        {"last_received_timestamp_seconds": None}, {65: set(), 66: {"ClerkSyncSilence"}}
    ),
    "a first delivery after a day": AlertCase(
        {"watching_since_timestamp_seconds": "-86400x200"}, {10: set(), 100: set()}
    ),
    "no worker": AlertCase({"workers_alive": "1x5 0x100"}, {7: set(), 8: {"ClerkSyncNoWorker"}}),
    "workers wait": AlertCase(
        {
            'workers_waiting{dependency="database"}': "0x5 2x100",
            'workers_waiting{dependency="Redis"}': "0x200",
        },
        {7: set(), 8: {"ClerkSyncWorkersWait"}},
    ),
    "lag": AlertCase({"queue_oldest_age_seconds": "0x5 61x100"}, {7: set(), 8: {"ClerkSyncLag"}}),
    "lag at its limit": AlertCase({"queue_oldest_age_seconds": "60x200"}, {100: set()}),
    "slow for three minutes": AlertCase(
        {
            'delivery_lag_seconds_bucket{le="60"}': "0x200",
            'delivery_lag_seconds_bucket{le="300"}': "0x5 100x195",
            'delivery_lag_seconds_bucket{le="+Inf"}': "0x5 100x195",
        },
        {8: set(), 12: {"ClerkSyncSlow"}, 20: set()},
    ),
    "pool time-outs": AlertCase(
        {"pool_timeouts_total": "0x5 3x195"}, {6: {"ClerkSyncPoolExhausted"}, 20: set()}
    ),
    "refused deliveries": AlertCase(
        {'deliveries_total{type="user.created",answer="unavailable"}': "0x5 1x195"},
        {4: set(), 7: {"ClerkSyncDeliveriesRefused"}, 20: set()},
    ),
    "signatures": AlertCase(
        {'degraded{cause="signatures"}': "0x5 1x9 0x100"},
        {5: set(), 6: {"ClerkSyncSignaturesRejected"}, 20: set()},
    ),
    "no receiver": AlertCase({"receivers_alive": "1x5 0x100"}, {7: set(), 8: {"ClerkSyncNoReceiver"}}),
    "a batch in hand": AlertCase(
        {"batch_in_hand_seconds": "0x5 31x100"}, {5: set(), 6: {"ClerkSyncBatchStuck"}}
    ),
    "a locked row": AlertCase({"lock_wait_seconds": "0x5 31x100"}, {5: set(), 6: {"ClerkSyncRowLocked"}}),
    "another instance": AlertCase(
        {"foreign_deliveries_total": "0x5 1x195"}, {7: {"ClerkSyncForeignInstance"}, 30: set()}
    ),
    "Redis without its data": AlertCase(
        {'degraded{cause="redis_lost_data"}': "0x5 1x9 0x100"},
        {5: set(), 7: {"ClerkSyncRedisLostData"}, 20: set()},
    ),
    **{
        cause: AlertCase({f'degraded{{cause="{cause}"}}': "0x5 1x100"}, {5: set(), 7: {f"ClerkSync{alert}"}})
        for cause, alert in {
            "two_databases": "TwoDatabases",
            "second_instance": "SecondInstance",
            "suspended": "Suspended",
            "retries": "RefusedAgain",
            "clock": "Clock",
        }.items()
    },
    "failed jobs": AlertCase({"failed_jobs": "0x5 1x195"}, {6: set(), 7: {"ClerkSyncFailedJobs"}}),
    "a reconciliation fails": AlertCase(
        {'reconcile_result{result="failed"}': "0x5 1x195"}, {10: set(), 11: {"ClerkSyncReconciliationFails"}}
    ),
    "a reconciliation is overdue": AlertCase(
        {"reconcile_timestamp_seconds": "0x200", "reconcile_interval_seconds": "600x200"},
        {35: set(), 36: {"ClerkSyncReconciliationFails"}},
    ),
    "a reconciliation is refused": AlertCase(
        {'reconcile_result{result="refused"}': "0x5 1x195"}, {10: set(), 11: {"ClerkSyncDrift"}}
    ),
    "drift": AlertCase(
        {'reconcile_drift{kind="missing"}': "0x5 1x195", 'reconcile_drift{kind="ghost"}': "0x200"},
        {10: set(), 11: {"ClerkSyncDrift"}},
    ),
}


@pytest.fixture(scope="module")
def rules() -> dict[str, str]:
    """The severity of each rule by its name."""
    loaded = yaml.safe_load(ALERTS.read_text())["groups"][0]["rules"]
    return {rule["alert"]: rule["labels"]["severity"] for rule in loaded}


def test_an_alert_fires_after_its_time_once_for_all_targets(rules: dict[str, str], tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.yml" for name in CASES}
    for name, case in CASES.items():
        files[name].write_text(yaml.safe_dump(_unit_test(case, rules)))
    ran = subprocess.run(
        ["promtool", "test", "rules", *files.values()],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_rule_has_its_case(rules: dict[str, str]) -> None:
    assert set().union(*(names for case in CASES.values() for names in case.firing.values())) == rules.keys()


def _unit_test(case: AlertCase, rules: dict[str, str]) -> dict[str, object]:
    """Return what promtool is to look at; series of counters and gauges are named without their prefix."""
    series = {name: values for name, values in {**ALWAYS, **case.series}.items() if values is not None}
    look_up = [
        {
            "expr": 'count by (alertname, severity) (ALERTS{alertstate="firing"})',
            "eval_time": f"{minute}m",
            "exp_samples": [
                {"labels": f'{{alertname="{name}", severity="{rules[name]}"}}', "value": 1}
                for name in sorted(names)
            ],
        }
        for minute, names in case.firing.items()
    ]
    return {
        "rule_files": [str(ALERTS)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [
                    {"series": _labelled(name, target), "values": values}
                    for name, values in series.items()
                    for target in TARGETS
                ],
                "promql_expr_test": look_up,
            }
        ],
    }


def _labelled(name: str, target: str) -> str:
    bare, _, labels = name.rstrip("}").partition("{")
    return f'clerk_sync_{bare}{{instance="{target}"{"," if labels else ""}{labels}}}'

"""The alert rules and the dashboard, against what `/metrics` really shows."""

import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from db.connection.engine import PoolState
from tests.support.markdown import anchors
from tests.support.settings import MakeSettings
from worker.monitoring.metrics import Metrics
from worker.monitoring.prometheus import MetricsEndpoint
from worker.queue.rq_format import WORKER_PREFIX, WORKER_REPORT, WORKERS_KEY
from worker.redis_client import worker_redis
from worker.sync import last_run

DOCS = Path(__file__).parents[2] / "docs"
ALERTS = DOCS / "alerts.yml"
NAME = re.compile(r"\bclerk_sync_[a-z_]+")
MATCHER = re.compile(r'\b(\w+)=~?"([^"]*)"')
GROUPED = re.compile(r"\bby \(([^)]*)\)")


def rules() -> list[dict[str, Any]]:
    [group] = yaml.safe_load(ALERTS.read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((DOCS / "grafana-dashboard.json").read_text())["panels"]
    return found


def expressions() -> list[str]:
    return [rule["expr"] for rule in rules()] + [t["expr"] for panel in panels() for t in panel["targets"]]


@pytest.fixture
def shown(make_settings: MakeSettings) -> dict[str, list[dict[str, str]]]:
    """The names and labels that `/metrics` shows, once everything has happened."""
    settings = make_settings(
        database_url=None, database_url_unpooled=None, clerk_secret_key="sk_test_key", reconcile_every="1h"
    )
    redis = worker_redis(settings)
    redis.sadd(WORKERS_KEY, f"{WORKER_PREFIX}one")
    report = {"waiting_for": None, "pool": PoolState(5, 1, 0, 0, 0)._asdict()}
    redis.hset(f"{WORKER_PREFIX}one", mapping={WORKER_REPORT: json.dumps(report), "state": "idle"})
    counts = Metrics()
    counts.set_last_applied(1.0)
    redis.set("clerk-sync:last-received", 1)
    drift = {**dict.fromkeys(last_run.KINDS, 0), "merged": 0, "refusal": None}
    backfill = dict.fromkeys(("created", "updated"), 0)
    moments = dict.fromkeys(("started_at", "finished_at"), "2026-01-01T10:00:00+00:00")
    last_run.keep(redis, {**moments, "error": None, "backfill": backfill, "drift": drift})
    endpoint = MetricsEndpoint(settings, counts)
    found: dict[str, list[dict[str, str]]] = {}
    for family in text_string_to_metric_families(endpoint.render().decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    redis.close()
    return found


def test_every_metric_of_rules_and_dashboard_is_shown(
    shown: dict[str, list[dict[str, str]]],
) -> None:
    named = {name for expression in expressions() for name in NAME.findall(expression)}
    assert named - set(shown) == set()


def test_every_label_that_is_asked_for_is_there(shown: dict[str, list[dict[str, str]]]) -> None:
    labels: dict[str, set[str]] = {}
    for sample in itertools.chain.from_iterable(shown.values()):
        for label, value in sample.items():
            labels.setdefault(label, set()).add(value)
    for expression in expressions():
        for label, pattern in MATCHER.findall(expression):
            assert all(value in labels[label] for value in pattern.split("|")), expression
        for group in GROUPED.findall(expression):
            assert {name.strip() for name in group.split(",")} <= set(labels), expression


def test_every_metric_is_on_the_dashboard_or_in_a_rule(shown: dict[str, list[dict[str, str]]]) -> None:
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in shown}
    used = " ".join(expressions())
    assert [name for name in sorted(families) if name not in used] == []


def test_no_expression_adds_up_what_every_target_shows_alike() -> None:
    for expression in expressions():
        outermost = expression.partition("(")[0]
        assert "sum" not in outermost or "max by" in expression, expression


def test_every_rule_says_what_to_do_and_points_into_the_run_book() -> None:
    operations = (DOCS / "operations.md").read_text()
    for rule in rules():
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"]
        assert rule["labels"]["severity"] in {"critical", "warning"}
        path, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert path == "docs/operations.md"
        assert anchor in anchors(operations), rule["alert"]
        assert f"`{rule['alert']}`" in operations


def test_the_panels_of_the_dashboard_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in panels()}) == len(panels())


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_prometheus_takes_the_rules() -> None:
    ran = subprocess.run(["promtool", "check", "rules", ALERTS], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr

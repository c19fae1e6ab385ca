"""`status`: what /health says, for a terminal."""

import sys
from typing import Any

import click

from cli.output import show_json, show_table
from config import load
from worker.monitoring.health import Status


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON, the same as /health.")
def status(as_json: bool) -> None:
    """Show whether all is well. Exit status 1 when a check fails."""
    asked = Status(load("redis_url", "database_url"))
    report = asked.report()
    asked.close()
    if as_json:
        show_json(report)
    else:
        _show(report)
    sys.exit(1 if report["status"] == "failing" else 0)


def _show(report: dict[str, Any]) -> None:
    checks = report["checks"].items()
    show_table(
        f"Status: {report['status']}",
        ("check", "answer", "ms"),
        [(name, "ok" if check["ok"] else check["error"], check["ms"]) for name, check in checks],
    )
    for warning in report["warnings"]:
        click.echo(f"Warning: {warning}")
    queue = [(name, _known(value)) for name, value in report["queue"].items()]
    last = [(name, _known(report[name])) for name in ("last_received_at", "last_applied_at")]
    show_table("Queue", ("what", "value"), [*queue, *last])
    if report.get("repair"):
        show_table("Last repair", ("what", "value"), _repair(report["repair"]))
    show_table(
        f"Workers alive: {_known(report['workers']['alive'])}"
        f" (last seen {_known(report['workers']['last_seen_at'])})",
        ("name", "state", "last seen", "waiting for", "connections"),
        [
            (w["name"], w["state"], w["last_seen_at"], w["waiting_for"], _connections(w["pool"]))
            for w in report["workers"]["list"]
        ],
    )


def _repair(repair: dict[str, Any]) -> list[tuple[str, object]]:
    told = [(name, _known(repair[name])) for name in ("finished_at", "seconds", "result", "reason")]
    return [*told, *_sum("synced", repair["synced"]), *_sum("differing", repair["drift"])]


def _sum(what: str, parts: dict[str, int] | None) -> list[tuple[str, object]]:
    """Return the sum, and after it whatever of its parts is not 0."""
    if parts is None:
        return [(what, _known(None))]
    return [(what, sum(parts.values())), *((name, count) for name, count in parts.items() if count)]


def _connections(pool: dict[str, int] | None) -> str | None:
    return None if pool is None else f"{pool['in_use']} of {pool['size']} in use, {pool['overflow']} beyond"


def _known(value: object) -> object:
    return "-" if value is None else value

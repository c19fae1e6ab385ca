"""`status`: the report of /health, for a terminal."""

import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import click

from cli.output import show_entry, show_json
from config import load
from worker.monitoring.health import Status
from worker.monitoring.words import ago, counted, span

NAME_LENGTH = 8  # of a worker's name; `--json` shows the whole name


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print the JSON object of /health.")
def status(as_json: bool) -> None:
    """Show the state of the service.

    It lists checks, warnings, the queue, receivers and workers, as /health does. The exit status is 1 if a
    check fails.
    """
    asked = Status(load("redis_url", "database_url"))
    report = asked.report()
    asked.close()
    if as_json:
        show_json(report)
    else:
        for label, text in _entries(report, datetime.now(UTC)):
            show_entry(label, text)
    sys.exit(1 if report["status"] == "failing" else 0)


def _entries(report: dict[str, Any], now: datetime) -> Iterator[tuple[str, str]]:
    yield "Status", report["status"]
    for name, check in report["checks"].items():
        yield f"  {name}", f"ok ({check['ms']} ms)" if check["ok"] else check["error"]
    for warning in report["warnings"]:
        yield "Warning", warning
    yield "Queue", _queue(report["queue"])
    if report["lock_waits"]["since"]:
        yield "", f"{report['lock_waits']['jobs']} of them for a locked row"
    yield "Last received", _when(report["last_received_at"], now, report["queue"]["depth"] is not None)
    yield "Last applied", _when(report["last_applied_at"], now, report["checks"]["schema"]["ok"])
    if report.get("reconciliation"):
        yield "Reconciled", _reconciliation(report["reconciliation"], now)
    yield "Receivers", _alive(report["receivers"], now)
    yield "Workers", _alive(report["workers"], now)
    for worker in report["workers"]["list"]:
        yield f"  {worker['name'][:NAME_LENGTH]}", _worker(worker, now)


def _queue(queue: dict[str, Any]) -> str:
    if queue["depth"] is None:
        return "not known"
    oldest = f", the oldest delivery is {span(queue['oldest_age_s'])} old" if queue["oldest_age_s"] else ""
    return (
        f"{queue['depth']:,} waiting, {queue['reserved']:,} reserved by workers,"
        f" {queue['scheduled']:,} scheduled, {queue['failed']:,} failed{oldest}"
    )


def _when(moment: str | None, now: datetime, is_known: bool) -> str:
    return ago(moment, now) if is_known else "not known"


def _alive(found: dict[str, Any], now: datetime) -> str:
    if found["alive"] is None:
        return "not known"
    return f"{found['alive']} alive, last seen {ago(found['last_seen_at'], now)}"


def _worker(worker: dict[str, Any], now: datetime) -> str:
    doing = worker["state"]
    if worker["waiting_for"]:
        doing = f"waiting for {worker['waiting_for']}{': ' + worker['reason'] if worker['reason'] else ''}"
    pool = worker["pool"]
    used = f", {pool['in_use']} of {counted(pool['size'], 'connection')} in use" if pool else ""
    beyond = f" and {pool['overflow']} beyond" if pool and pool["overflow"] else ""
    return f"{doing}; seen {ago(worker['last_seen_at'], now)}{used}{beyond}"


def _reconciliation(last: dict[str, Any], now: datetime) -> str:
    """Return the last scheduled reconciliation in one line."""
    if last["finished_at"] is None:
        return "none yet"
    reason = f": {last['reason']}" if last["reason"] else ""
    parts = [f"{last['result']}{reason}, ended {ago(last['finished_at'], now)}"]
    parts += [f"took {span(last['seconds'])}", *_sum("synced", last["synced"])]
    return ", ".join([*parts, *_sum("differing", last["drift"])])


def _sum(what: str, parts: dict[str, int] | None) -> list[str]:
    """Return the sum, and in brackets each of its parts that is not 0."""
    if parts is None:
        return []
    each = ", ".join(f"{count:,} {name}" for name, count in parts.items() if count)
    return [f"{sum(parts.values()):,} {what}{f' ({each})' if each else ''}"]

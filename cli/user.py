"""`user`: shows everything stored about one user on one screen."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import click

from cli.clerk import context_from_environment
from cli.output import event_block, exact, show_entry, show_json
from config import load
from db.connection.engine import Database
from db.merge.change import CLERK_ID
from db.times import to_datetime
from worker.monitoring.user_report import UserReport, user_report
from worker.monitoring.words import ago, counted
from worker.redis_client import fail_fast_redis

JOBS_SHOWN = 20
SHOWN = ("clerk_id", "claimed_email", "deleted_at")  # shown in lines of their own


@click.command()
@click.argument("clerk_id", metavar="USER_ID")
@click.option("--clerk", "asks_clerk", is_flag=True, help="Also ask Clerk's API whether it has this user.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def user(clerk_id: str, asks_clerk: bool, as_json: bool) -> None:
    """Show everything stored about one user.

    That is the row, the address and who else claims it, versions, profile fields, memberships, the deletion,
    the newest deliveries, and the jobs that wait or failed.
    """
    if not CLERK_ID.fullmatch(clerk_id):
        raise click.BadParameter("not a Clerk user id", param_hint="USER_ID")
    settings = load("redis_url", "database_url")
    with Database(settings) as database, fail_fast_redis(settings) as redis:
        report = user_report(database, redis, clerk_id)
    in_clerk = _in_clerk(clerk_id) if asks_clerk else None
    if as_json:
        show_json({**report.as_json(), "clerk": in_clerk})
    else:
        _show(report, in_clerk, datetime.now(UTC))


def _in_clerk(clerk_id: str) -> dict[str, Any]:
    """Return whether Clerk has the user, and when the user was last changed there (ms)."""
    with context_from_environment() as context:
        found = [user for user in context.api.user(clerk_id).users if user.id == clerk_id]
    return {"exists": bool(found), "updated_at": found[0].updated_at if found else None}


def _show(report: UserReport, in_clerk: dict[str, Any] | None, now: datetime) -> None:
    click.echo(report.record.clerk_id)
    if report.is_empty:
        click.echo("Nothing is stored about this user.")
    for label, text in _entries(report, in_clerk, now):
        show_entry(label, text)
    if report.events:
        click.echo("\nNewest deliveries")
        for row in report.events:
            click.echo(event_block(row, now))


def _entries(report: UserReport, in_clerk: dict[str, Any] | None, now: datetime) -> Iterator[tuple[str, str]]:
    record = report.record
    sync = record.sync or {}
    yield "Row", _values(record.row, now) if record.row else "none"
    yield "Address", report.address
    if sync:
        yield "Claim", _claim(sync, record.claims, now)
        known = {name: value for name, value in sync.items() if name not in SHOWN and value is not None}
        yield "Versions", _values(known, now)
    if record.profile:
        yield "Profile", _values(record.profile, now)
    for membership in record.memberships:
        yield "Membership", _values(membership, now)
    deleted_at = sync.get("deleted_at")
    yield "Deleted", f"{ago(deleted_at, now)} ({exact(deleted_at)})" if deleted_at else "no"
    yield "Jobs", _jobs(report)
    if report.bodies_until > now:
        yield "In Redis", f"bodies of applied deliveries, until {exact(report.bodies_until)}"
    if in_clerk is not None:
        yield "Clerk", _clerk(in_clerk, now)


def _claim(sync: dict[str, Any], others: list[dict[str, Any]], now: datetime) -> str:
    address = sync["claimed_email"]
    if address is None:
        return "none"
    claims = ", ".join(_competing_claim(other, now) for other in others)
    return f"{address}; also claimed by {claims}" if others else f"{address}; claimed by no other user"


def _competing_claim(other: dict[str, Any], now: datetime) -> str:
    updated_at = other.get("claim_updated_at")
    return f"{other['clerk_id']} ({ago(to_datetime(updated_at), now)})" if updated_at else other["clerk_id"]


def _jobs(report: UserReport) -> str:
    if report.jobs is None:
        return f"not known: {report.jobs_error}"
    jobs = [f"{j.id} {j.state}{f': {j.reason}' if j.reason else ''}" for j in report.jobs.jobs[:JOBS_SHOWN]]
    more = len(report.jobs.jobs) - len(jobs)
    parts = [*jobs, *([f"and {counted(more, 'more')}"] if more > 0 else [])]
    if not report.jobs.is_complete:
        parts.append("the queue is too long to search all of it")
    return "; ".join(parts) or "none waiting or failed"


def _clerk(in_clerk: dict[str, Any], now: datetime) -> str:
    if not in_clerk["exists"]:
        return "has no such user"
    updated_at = in_clerk["updated_at"]
    return f"has this user, updated {ago(to_datetime(updated_at), now)}" if updated_at else "has this user"


def _values(row: dict[str, Any], now: datetime) -> str:
    return ", ".join(
        f"{name} {_value(name, value, now)}" for name, value in row.items() if name != "clerk_id"
    )


def _value(name: str, value: Any, now: datetime) -> str:
    if isinstance(value, datetime):
        return ago(value, now)
    if isinstance(value, int) and name.endswith("_at"):  # a version, in ms
        return ago(to_datetime(value), now)
    return "-" if value is None else str(value)

"""`reconcile`: where the tables and Clerk differ, and fixing it."""

import sys
from collections.abc import Iterator
from typing import Any

import click

from cli.clerk import UserBar, bridge_from_environment
from cli.output import show_json, show_table
from worker.sync.reconcile import Reconcile, Report
from worker.sync.reconcile_memberships import MemberReport

SHOWN = 100
LEFTOVERS = {"PROFILE_FIELDS": "profiles", "ORGANIZATION_SOURCE": "memberships"}
ELSEWHERE = (
    "{:,} users here are not in Clerk, and are or may be users of another Clerk instance: not deleted"
    " (docs/operations.md, Several Clerk instances)"
)


@click.command()
@click.option(
    "--fix", is_flag=True, help="Merge what Clerk shows, and delete users that Clerk does not have."
)
@click.option(
    "--allow-deletes",
    type=click.IntRange(0),
    metavar="N",
    help="Delete up to N users, end up to N memberships.",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON, with every user who differs.")
def reconcile(fix: bool, allow_deletes: int | None, as_json: bool) -> None:
    """Report which users differ between the tables and Clerk. Exit status 1 if any does.

    With --fix exit status 0 once all is fixed. More than 5 % of the users (RECONCILE_MAX_DELETE), and more
    than ten, are deleted only with --allow-deletes; none are when the listing is empty or was cut short. The
    same holds for memberships, with ORGANIZATION_SOURCE=membership. Rows that changed settings have left
    (USER_DELETION, PROFILE_FIELDS, ORGANIZATION_SOURCE) are removed as well.
    """
    left: list[str] = []
    with bridge_from_environment() as bridge:
        with UserBar("Comparing") as bar:
            task = Reconcile(bridge, allow_deletes=allow_deletes, on_progress=bar.show)
            report = task.report()
        is_fixed = fix and report.refusal is None
        if is_fixed:
            left = task.fix(report)
    if as_json:
        show_json(_to_json(report, left if is_fixed else None))
    else:
        _show(report, left, is_fixed=is_fixed)
    sys.exit(_status(report, left, is_fixed=is_fixed))


def _status(report: Report, left: list[str], *, is_fixed: bool) -> int:
    if report.refusal is not None:
        return 1
    return 1 if (left if is_fixed else report.differing) else 0


def _to_json(report: Report, left: list[str] | None) -> dict[str, Any]:
    """Return the report for JSON; `left` are those who differ still after fixing, None without it."""
    return {
        "listed": report.listed,
        "counted": report.counted,
        "local": report.local,
        "missing": report.missing,
        "stale": [user._asdict() for user in report.stale],
        "ghost": list(report.ghost),
        "claims": [user._asdict() for user in report.claims],
        "tombstone": report.tombstone,
        "invalid": report.invalid,
        "elsewhere": report.elsewhere,
        "leftovers": report.leftovers._asdict(),
        "refusal": report.refusal,
        **({"memberships": _memberships(report.memberships)} if report.memberships else {}),
        "fixed": left is not None,
        "left": left,
    }


def _memberships(found: MemberReport) -> dict[str, int]:
    ended = sum(len(change.memberships) for change in found.ended)
    return {"listed": found.listed, "local": found.local, "ended": ended}


def _show(report: Report, left: list[str], *, is_fixed: bool) -> None:
    rows = list(_rows(report))
    click.echo(f"{report.listed:,} users in Clerk, {report.local:,} here, {report.differing:,} differ")
    if report.memberships is not None:
        click.echo(
            "{listed:,} memberships in Clerk, {local:,} here".format(**_memberships(report.memberships))
        )
    if rows:
        show_table("Drift", ("what", "Clerk id", "how"), rows[:SHOWN])
    if len(rows) > SHOWN:
        click.echo(f"... and {len(rows) - SHOWN:,} more (--json shows them all)")
    if report.invalid:
        click.echo(f"{report.invalid:,} entries of Clerk's listing are no users", err=True)
    if report.elsewhere:
        click.echo(ELSEWHERE.format(report.elsewhere), err=True)
    if report.refusal is not None:
        click.echo(f"Nothing was changed: {report.refusal}", err=True)
    elif is_fixed:
        click.echo(f"Fixed, but {len(left):,} still differ" if left else "All fixed")
        for clerk_id in left[:SHOWN]:
            click.echo(f"still differs: {clerk_id}", err=True)


def _rows(report: Report) -> Iterator[tuple[str, str, str]]:
    for clerk_id in report.missing:
        yield "missing", clerk_id, "in Clerk, not here"
    for clerk_id, columns in report.stale:
        yield "stale", clerk_id, ", ".join(columns)
    for clerk_id in report.ghost:
        yield "ghost", clerk_id, "here, deleted in Clerk"
    for clerk_id, held_by in report.claims:
        yield "claim", clerk_id, f"the address is with {held_by}" if held_by else "no user has the address"
    for clerk_id in report.leftovers.users:
        yield "leftover", clerk_id, "deleted, and USER_DELETION=delete keeps no row"
    for setting, name in LEFTOVERS.items():
        if count := getattr(report.leftovers, name):
            yield "leftover", f"{count:,} rows", f"{setting} keeps them no longer"
    for clerk_id in report.tombstone:
        yield "tombstone", clerk_id, "deleted here for good, but still exists in Clerk"

"""`reconcile`: where the table and Clerk differ, and mending it."""

import sys
from collections.abc import Iterator
from typing import Any

import click

from cli.clerk import UserBar, bridge_from_environment
from cli.output import show_json, show_table
from worker.sync.reconcile import Reconcile, Report
from worker.sync.reconcile_memberships import MemberReport

SHOWN = 100
ELSEWHERE = (
    "{:,} users here are not in Clerk, and are or may be users of another Clerk instance: not deleted"
    " (docs/operations.md, Several Clerk instances)"
)


@click.command()
@click.option("--fix", is_flag=True, help="Mend it: merge what Clerk says, delete who is gone there.")
@click.option(
    "--allow-deletes",
    type=click.IntRange(0),
    metavar="N",
    help="Delete up to N users, end up to N memberships.",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON, with everybody who differs.")
def reconcile(fix: bool, allow_deletes: int | None, as_json: bool) -> None:
    """Report who differs between the table and Clerk. Exit status 1 when somebody does.

    With --fix exit status 0 once all is mended. More than 5 % of the users (RECONCILE_MAX_DELETE), or ten,
    are only deleted with --allow-deletes; nobody is when the listing is empty or was cut short. So it is with
    memberships, which count where ORGANIZATION_SOURCE=membership.
    """
    left: list[str] = []
    with bridge_from_environment() as bridge:
        with UserBar("Comparing") as bar:
            task = Reconcile(bridge, allow_deletes=allow_deletes, on_progress=bar.show)
            report = task.report()
        is_mended = fix and report.refusal is None
        if is_mended:
            left = task.fix(report)
    if as_json:
        show_json(_plain(report, left if is_mended else None))
    else:
        _show(report, left, is_mended=is_mended)
    sys.exit(_status(report, left, is_mended=is_mended))


def _status(report: Report, left: list[str], *, is_mended: bool) -> int:
    if report.refusal is not None:
        return 1
    return 1 if (left if is_mended else report.differing) else 0


def _plain(report: Report, left: list[str] | None) -> dict[str, Any]:
    """Return the report for JSON; `left` are those who differ still after mending, None without it."""
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
        "refusal": report.refusal,
        **({"memberships": _memberships(report.memberships)} if report.memberships else {}),
        "mended": left is not None,
        "left": left,
    }


def _memberships(found: MemberReport) -> dict[str, int]:
    ended = sum(len(change.memberships) for change in found.ended)
    return {"listed": found.listed, "local": found.local, "ended": ended}


def _show(report: Report, left: list[str], *, is_mended: bool) -> None:
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
    elif is_mended:
        click.echo(f"Mended, but {len(left):,} still differ" if left else "All mended")
        for clerk_id in left[:SHOWN]:
            click.echo(f"still differs: {clerk_id}", err=True)


def _rows(report: Report) -> Iterator[tuple[str, str, str]]:
    for clerk_id in report.missing:
        yield "missing", clerk_id, "in Clerk, not here"
    for clerk_id, columns in report.stale:
        yield "stale", clerk_id, ", ".join(columns)
    for clerk_id in report.ghost:
        yield "ghost", clerk_id, "here, gone in Clerk"
    for clerk_id, held_by in report.claims:
        yield "claim", clerk_id, f"the address is with {held_by}" if held_by else "nobody has the address"
    for clerk_id in report.tombstone:
        yield "tombstone", clerk_id, "deleted here, which is final, and not in Clerk"

"""`reconcile`: reports where the tables and Clerk differ, and fixes it."""

import sys
from collections.abc import Iterator
from typing import Any

import click

from cli.clerk import context_from_environment, progress_bar
from cli.output import show_entry, show_json
from worker.monitoring.words import counted, printable
from worker.sync.reconcile import Reconcile, Report
from worker.sync.reconcile_memberships import MemberReport

SHOWN = 100
LEFTOVERS = {"PROFILE_FIELDS": "profiles", "ORGANIZATION_SOURCE": "memberships"}
ROW_WIDTH = 43  # characters for a kind and a Clerk id
ELSEWHERE = (
    "{} here not in Clerk, but possibly of another Clerk instance: not deleted"
    " (docs/operations.md, Several Clerk instances)"
)


@click.command()
@click.option("--fix", is_flag=True, help="Merge what Clerk has, and delete users that Clerk does not have.")
@click.option(
    "--allow-deletes",
    type=click.IntRange(0),
    metavar="N",
    help="Allow --fix to delete up to N users, and to end up to N memberships.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object with every user who differs.")
def reconcile(fix: bool, allow_deletes: int | None, as_json: bool) -> None:
    """Report which users differ between the tables and Clerk.

    The exit status is 1 if any user differs; with --fix, if any still differs afterwards.

    --fix deletes more than ten users that are also more than 5 % of all (RECONCILE_MAX_DELETE) only with
    --allow-deletes. It deletes none if Clerk's listing is empty or was cut short. With
    ORGANIZATION_SOURCE=membership the same limits apply to the memberships that it ends. It also removes rows
    that a change of USER_DELETION, PROFILE_FIELDS or ORGANIZATION_SOURCE has left behind.
    """
    left: list[str] = []
    with context_from_environment() as context:
        with progress_bar("Comparing") as show:
            task = Reconcile(context, allow_deletes=allow_deletes, on_progress=show)
            report = task.report()
        is_fixed = fix and report.refusal is None
        if is_fixed:
            left = task.fix(report)
    if as_json:
        show_json(_to_json(report, left if is_fixed else None))
    else:
        _show(report, left, is_fixed=is_fixed)
    differs = left if is_fixed else report.differing
    sys.exit(1 if differs or report.refusal is not None else 0)


def _to_json(report: Report, left: list[str] | None) -> dict[str, Any]:
    """Return the report for JSON; `left` are the ids that still differ after --fix, None without it."""
    found = report._asdict() | {
        "stale": [user._asdict() for user in report.stale],
        "ghost": list(report.ghost),
        "claims": [user._asdict() for user in report.claims],
        "leftovers": report.leftovers._asdict(),
        "fixed": left is not None,
        "left": left,
    }
    members = found.pop("memberships")
    return found | ({"memberships": _memberships(members)} if members else {})


def _memberships(found: MemberReport) -> dict[str, int]:
    ended = sum(len(change.memberships) for change in found.ended)
    return {"listed": found.listed, "local": found.local, "ended": ended}


def _show(report: Report, left: list[str], *, is_fixed: bool) -> None:
    """Print every difference, then warnings, and the summary last."""
    rows = list(_rows(report))
    for kind, clerk_id, how in rows[:SHOWN]:
        show_entry(printable(f"{kind:<9}  {clerk_id}"), how, ROW_WIDTH)
    if len(rows) > SHOWN:
        click.echo(f"… and {len(rows) - SHOWN:,} more (--json shows them all)")
    if report.invalid:
        entries = counted(report.invalid, "entry", "entries")
        click.echo(f"{entries} of Clerk's listing could not be read", err=True)
    if report.elsewhere:
        are = "user is" if report.elsewhere == 1 else "users are"
        click.echo(ELSEWHERE.format(f"{report.elsewhere:,} {are}"), err=True)
    for clerk_id in left[:SHOWN]:
        click.echo(f"still differs: {printable(clerk_id)}", err=True)
    click.echo(
        f"{counted(report.listed, 'user')} in Clerk, {report.local:,} here, {_differ(report.differing)}"
    )
    if report.memberships is not None:
        counts = _memberships(report.memberships)
        click.echo(f"{counted(counts['listed'], 'membership')} in Clerk, {counts['local']:,} here")
    if report.refusal is not None:
        click.echo(f"Nothing was changed: {report.refusal}", err=True)
    elif is_fixed:
        click.echo(f"Fixed, but {_differ(len(left))} still" if left else "All fixed")


def _differ(number: int) -> str:
    return f"{number:,} differs" if number == 1 else f"{number:,} differ"


def _rows(report: Report) -> Iterator[tuple[str, str, str]]:
    for clerk_id in report.missing:
        yield "missing", clerk_id, "in Clerk, not here"
    for clerk_id, columns in report.stale:
        yield "stale", clerk_id, ", ".join(columns)
    for clerk_id in report.ghost:
        yield "ghost", clerk_id, "here, deleted in Clerk"
    for clerk_id, held_by in report.claims:
        yield "claim", clerk_id, f"{held_by} has the address" if held_by else "no user has the address"
    for clerk_id in report.leftovers.users:
        yield "leftover", clerk_id, "deleted user; USER_DELETION=delete keeps no row"
    for setting, name in LEFTOVERS.items():
        if count := getattr(report.leftovers, name):
            yield "leftover", counted(count, "row"), f"{setting} no longer keeps {name}"
    for clerk_id in report.tombstone:
        yield "tombstone", clerk_id, "deleted here for good, but still exists in Clerk"

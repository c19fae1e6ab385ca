"""`pull`: one user, now."""

import sys

import click

from cli.clerk import bridge_from_environment
from worker.clerk.payloads import CLERK_ID
from worker.sync.pull import Pulled, PullOutcome
from worker.sync.pull import pull as pull_user


@click.command()
@click.argument("clerk_id", metavar="USER_ID")
def pull(clerk_id: str) -> None:
    """Read one user of Clerk into the table. Whom Clerk does not know is deleted here, for good."""
    if not CLERK_ID.fullmatch(clerk_id):
        raise click.BadParameter("that is no Clerk id", param_hint="USER_ID")
    with bridge_from_environment() as bridge:
        pulled = pull_user(bridge, clerk_id, confirmed=True)
    click.echo(_sentence(clerk_id, pulled))
    sys.exit(1 if pulled == Pulled(PullOutcome.FOUND) else 0)


def _sentence(clerk_id: str, pulled: Pulled) -> str:
    if pulled.outcome is PullOutcome.DELETED:
        return f"{clerk_id} is gone in Clerk, and now here"
    if pulled.user is None:
        return f"{clerk_id} is in Clerk, but was deleted here, which is final"
    return f"{clerk_id} is here as it is in Clerk"

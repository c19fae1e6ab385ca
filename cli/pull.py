"""`pull`: reads one user from Clerk's API."""

import re
import sys

import click

from cli.clerk import context_from_environment
from db.merge.change import CLERK_ID
from worker.sync.pull import Pulled, PullOutcome
from worker.sync.pull import pull as pull_user

CLERKS_SHAPE = re.compile("user_[A-Za-z0-9_]+")


@click.command()
@click.argument("clerk_id", metavar="USER_ID")
@click.option("--yes", is_flag=True, help="Accept an id that does not start with user_.")
def pull(clerk_id: str, yes: bool) -> None:
    """Read one user from Clerk's API into the tables.

    If Clerk has no such user, the local user is deleted for good.
    """
    if not CLERK_ID.fullmatch(clerk_id):
        raise click.BadParameter("not a Clerk user id", param_hint="USER_ID")
    if not (yes or CLERKS_SHAPE.fullmatch(clerk_id)):
        raise click.UsageError(
            f"{clerk_id} is not shaped like user_…, and a typo would mark it as deleted for good:"
            " add --yes if it is right"
        )
    with context_from_environment() as context:
        pulled = pull_user(context, clerk_id, confirmed=True)
    click.echo(_sentence(clerk_id, pulled))
    sys.exit(0 if pulled.user is not None or pulled.outcome is PullOutcome.DELETED else 1)


def _sentence(clerk_id: str, pulled: Pulled) -> str:
    if pulled.outcome is PullOutcome.DELETED:
        return f"Clerk has no user {clerk_id}; it is now marked as deleted here"
    if pulled.outcome is PullOutcome.ELSEWHERE:
        return f"Clerk has no user {clerk_id}, who may belong to another Clerk instance: nothing changed"
    if pulled.user is None:
        return f"{clerk_id} was deleted here for good, but still exists in Clerk"
    return f"{clerk_id} is now the same here as in Clerk"

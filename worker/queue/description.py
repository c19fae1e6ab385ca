"""A job's description in Redis: the delivery's type and Clerk id, so that listings read no bodies."""

from db.merge.change import CLERK_ID
from worker.clerk.payloads import ALL_TYPES, Summary

UNREADABLE = "unreadable"


def describe(summary: Summary) -> str:
    """Return the description of a delivery's job."""
    return " ".join(part for part in (summary.type or UNREADABLE, summary.clerk_id) if part)


def subject(description: object) -> tuple[str | None, str | None]:
    """Return the type and the Clerk id in a description from Redis; None if `describe` did not write them.

    A job that another program queued has its call and arguments as the description, which is ignored.
    """
    text = description.decode(errors="replace") if isinstance(description, bytes) else ""
    type_, _, clerk_id = text.partition(" ")
    if type_ not in ALL_TYPES or (clerk_id and not CLERK_ID.fullmatch(clerk_id)):
        return None, None
    return type_, clerk_id or None

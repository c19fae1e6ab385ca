"""A job's description in Redis: the type of the delivery and its Clerk id. To list jobs no body is read."""

from db.merge.change import CLERK_ID
from worker.clerk.payloads import ALL_TYPES, Summary

UNREADABLE = "unreadable"


def describe(summary: Summary) -> str:
    """Return the description of the job of a delivery."""
    return " ".join(part for part in (summary.type or UNREADABLE, summary.clerk_id) if part)


def subject(description: object) -> tuple[str | None, str | None]:
    """Return the type and the Clerk id in a description as Redis has it; None where `describe` wrote none.

    The description of a job that others put there is its call, arguments and all: nothing is taken from it.
    """
    text = description.decode(errors="replace") if isinstance(description, bytes) else ""
    type_, _, clerk_id = text.partition(" ")
    if type_ not in ALL_TYPES or (clerk_id and not CLERK_ID.fullmatch(clerk_id)):
        return None, None
    return type_, clerk_id or None

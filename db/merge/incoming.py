"""A change as it comes to the tables, and what applying it did. Pure: no I/O."""

from enum import StrEnum
from typing import NamedTuple

from db.merge.change import Organization, UserChange


class Outcome(StrEnum):
    """What applying a change did."""

    APPLIED = "applied"  # it told something new
    STALE = "stale"  # it was known, or something newer was
    IGNORED = "ignored"  # it says nothing of the user, like a sign-in by staff


class ReceivedChange(NamedTuple):
    """A change, and the delivery that brought it; `svix_id` is None when no delivery did. Times in ms."""

    change: UserChange | Organization
    svix_id: str | None
    type: str
    event_at: int | None
    received_at: int

    @property
    def subject(self) -> str:
        """The Clerk id of whom the change is about."""
        return self.change.id if isinstance(self.change, Organization) else self.change.clerk_id

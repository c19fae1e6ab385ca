"""A change as it comes to the tables, and what applying it did. Pure: no I/O."""

from enum import StrEnum
from typing import NamedTuple

from db.merge.change import Organization, Source, UserChange, is_foreign


class Outcome(StrEnum):
    """What applying a change did."""

    APPLIED = "applied"  # it said something new
    STALE = "stale"  # it was known, or something newer was
    IGNORED = "ignored"  # it says nothing of the user, like a sign-in by staff


class ReceivedChange(NamedTuple):
    """A change and the delivery that carried it; `svix_id` is None when no delivery did. Times in ms.

    `instance_id` is the Clerk instance that says it, None when unknown. `is_repeated` says that the delivery
    was tried before: most of its lag is the time until now.
    """

    change: UserChange | Organization
    svix_id: str | None
    type: str
    event_at: int | None
    received_at: int
    instance_id: str | None = None
    is_repeated: bool = False

    def of_instance(self, instance_id: str | None) -> "ReceivedChange":
        """Return the change; one that says nothing if another instance than that one says it."""
        if not is_foreign(self.instance_id, instance_id):
            return self
        nothing = (
            Organization(self.subject) if isinstance(self.change, Organization) else UserChange(self.subject)
        )
        return self._replace(change=nothing, instance_id=None)

    @property
    def subject(self) -> str:
        """The Clerk id that the change is about."""
        return self.change.id if isinstance(self.change, Organization) else self.change.clerk_id

    @property
    def source(self) -> Source | None:
        """Which instance said it, and when."""
        if self.instance_id is None:
            return None
        return Source(self.received_at if self.event_at is None else self.event_at, self.instance_id)

"""A received change, and the outcome of applying it. Pure: no I/O."""

from enum import StrEnum
from typing import NamedTuple

from db.merge.change import Organization, Source, UserChange, is_foreign


class Outcome(StrEnum):
    """The outcome of applying a change."""

    APPLIED = "applied"  # it contained something new
    STALE = "stale"  # it was known, or something newer was
    IGNORED = "ignored"  # it says nothing about the user, such as a sign-in by staff


class ReceivedChange(NamedTuple):
    """A change and its delivery; `svix_id` is None if it came from no delivery. Times in ms.

    `instance_id` is the Clerk instance that reported it, None if unknown. `is_repeated`: the delivery was
    tried before, so its lag is not counted.
    """

    change: UserChange | Organization
    svix_id: str | None
    type: str
    event_at: int | None
    received_at: int
    instance_id: str | None = None
    is_repeated: bool = False

    def of_instance(self, instance_id: str | None) -> "ReceivedChange":
        """Return the change; an empty one if another instance than `instance_id` reported it."""
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
        """The instance that reported it, and when."""
        if self.instance_id is None:
            return None
        return Source(self.received_at if self.event_at is None else self.event_at, self.instance_id)

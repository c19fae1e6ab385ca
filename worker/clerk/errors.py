"""The errors of a delivery.

    EventError
    ├── NotJson          the body is not JSON: the receiver refuses it
    └── Unreadable       genuine, but it cannot be understood: the job fails

Neither is retryable: waiting never helps an event.
"""

from config import ServiceError


class EventError(ServiceError):
    """A delivery that cannot be used."""


class NotJson(EventError):
    """The body is not JSON in UTF-8."""


class Unreadable(EventError):
    """The event cannot be understood; the message says which part."""

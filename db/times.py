"""Whole milliseconds since the epoch, as Clerk counts, and PostgreSQL's timestamps."""

import time
from datetime import UTC, datetime, timedelta

# What PostgreSQL holds before and beyond these, infinity included, is read as these.
EARLIEST = datetime.min.replace(tzinfo=UTC)
LATEST = datetime(9999, 12, 31, 23, 59, 59, 999_000, UTC)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


def now_ms() -> int:
    """Return the current time in ms since the epoch."""
    return time.time_ns() // 1_000_000


def to_datetime(ms: int) -> datetime:
    """Return the datetime `ms` milliseconds after the epoch, exactly (a float would round it)."""
    return _EPOCH + ms * _MILLISECOND


def to_ms(moment: datetime) -> int:
    """Return the whole milliseconds since the epoch at `moment`."""
    return (moment - _EPOCH) // _MILLISECOND


def maybe_datetime(ms: int | None) -> datetime | None:
    """Return the datetime, None for None."""
    return None if ms is None else to_datetime(ms)


def maybe_ms(moment: datetime | None) -> int | None:
    """Return the milliseconds, None for None."""
    return None if moment is None else to_ms(moment)

"""A bar chart as numbers: where the bars of a small inline SVG are."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from db.ledger import Minute

MINUTES = 60
STEP = 10  # units of the drawing from one bar to the next
GAP = 2
HEIGHT = 100


class Bar(NamedTuple):
    """One minute; `x`, `y`, `width` and `height` are in units of the drawing."""

    x: int
    y: float
    width: int
    height: float
    start: datetime
    events: int
    lag_s: float | None


class Chart(NamedTuple):
    """Bars for the last hour, the oldest at the left, and the greatest number of events in a minute."""

    bars: list[Bar]
    most: int
    width: int = MINUTES * STEP
    height: int = HEIGHT


def chart(minutes: Sequence[Minute], now: datetime) -> Chart:
    """Return the chart of the 60 minutes up to `now`; the last of them is not over."""
    by_start = {minute.start: minute for minute in minutes}
    last = now.replace(second=0, microsecond=0)
    starts = [last - timedelta(minutes=MINUTES - 1 - i) for i in range(MINUTES)]
    most = max((by_start[start].events for start in starts if start in by_start), default=0)
    return Chart([_bar(i, start, by_start.get(start), most) for i, start in enumerate(starts)], most)


def _bar(i: int, start: datetime, minute: Minute | None, most: int) -> Bar:
    events = minute.events if minute else 0
    height = max(round(HEIGHT * events / most, 1), 1.5) if events else 0.0
    lag_s = minute.lag_s if minute else None
    return Bar(i * STEP, round(HEIGHT - height, 1), STEP - GAP, height, start, events, lag_s)

"""How numbers, times and text from elsewhere are written for people: "2 jobs", "3 min ago"."""

from datetime import UTC, datetime

UNITS = ((86400, "d"), (3600, "h"), (60, "min"))


def iso(moment: datetime) -> str:
    """Return a datetime in ISO 8601, in UTC and to the millisecond."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def iso_of(seconds: float | None) -> str | None:
    """Return the same for seconds since the epoch, None if they are outside the range of datetime."""
    try:
        return None if seconds is None else iso(datetime.fromtimestamp(seconds, UTC))
    except (ValueError, OverflowError):
        return None


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, in the singular or the plural."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def span(seconds: float | None) -> str:
    """Return a duration in the most suitable unit."""
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{max(0, seconds) * 1000:.0f} ms"
    for size, unit in UNITS:
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def ago(moment: str | datetime | None, now: datetime) -> str:
    """Return how long ago, or how far in the future, a time is."""
    if not moment:
        return "never"
    then = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
    seconds = (now - then).total_seconds()
    if seconds < 0:
        return f"in {span(-seconds)}" if seconds < -1 else "now"
    return f"{span(seconds)} ago" if seconds >= 1 else "now"


def printable(text: str) -> str:
    """Return text that came from elsewhere so that it can be sent and seen, and cannot steer a terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)

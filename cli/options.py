"""Options of several commands: a time, as a moment or as how long ago."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any

import click

UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
WHEN = "30m, 2h or 1d ago, or a time in UTC such as 2026-01-31T18:00"  # for the help
AGO = re.compile(r"([0-9]{1,6})([smhd])")


class TimeParam(click.ParamType[datetime]):
    """`30m`, `2h` or `1d` ago, or a moment in ISO 8601, in UTC unless it names another offset."""

    name = "when"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        """Return the moment."""
        try:
            if ago := AGO.fullmatch(value):
                return datetime.now(UTC) - timedelta(**{UNITS[ago[2]]: int(ago[1])})
            moment = datetime.fromisoformat(value)
        except (ValueError, OverflowError):
            self.fail(f"{value!r} is neither like 30m, 2h or 1d nor like 2026-01-31T18:00", param, ctx)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)

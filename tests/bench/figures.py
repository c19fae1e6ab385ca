"""The samples that were measured, and the ratios and goals computed from them."""

from collections.abc import Mapping
from statistics import median
from typing import NamedTuple

from tests.bench.plan import Setting


class ComparedCase(NamedTuple):
    """What was measured, and where."""

    part: str
    subject: str
    setting: Setting


class Check(NamedTuple):
    """A ratio or a figure, and its goal, if it has one."""

    text: str
    setting: Setting
    value: float
    unit: str
    goal: float | None = None
    at_most: bool = False

    @property
    def reached(self) -> bool | None:
        """Whether the goal is reached; None without one."""
        if self.goal is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal


class Figures:
    """Samples by case and measure ("events/s", "p99 ms", …), and checks. Filled round by round."""

    def __init__(self) -> None:
        self.samples: dict[ComparedCase, dict[str, list[float]]] = {}
        self.checks: list[Check] = []

    def add(self, case: ComparedCase, measures: Mapping[str, float]) -> None:
        """Add one round's sample of each measure."""
        known = self.samples.setdefault(case, {})
        for measure, value in measures.items():
            known.setdefault(measure, []).append(value)

    def median(self, case: ComparedCase, measure: str) -> float:
        return median(self.samples[case][measure])

    def ratio(self, ours: ComparedCase, theirs: ComparedCase, measure: str) -> float:
        """Return our figure divided by theirs.

        If both have the same number of rounds, that is the median of the rounds' ratios: a machine that was
        slow in one round was slow for both.
        """
        mine, other = self.samples[ours][measure], self.samples[theirs][measure]
        if len(mine) == len(other):
            return median(a / b for a, b in zip(mine, other, strict=True))
        return median(mine) / median(other)

    def compare(
        self,
        text: str,
        ours: ComparedCase,
        theirs: ComparedCase,
        measure: str,
        *,
        at_least: float | None = None,
    ) -> None:
        """Add a check of the ratio."""
        self.check(text, ours.setting, self.ratio(ours, theirs, measure), at_least=at_least)

    def check(
        self,
        text: str,
        setting: Setting,
        value: float,
        unit: str = "x",
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """Add a check; without `at_least` or `at_most` it has no goal."""
        goal = at_least if at_most is None else at_most
        self.checks.append(Check(text, setting, value, unit, goal, at_most is not None))

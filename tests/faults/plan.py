"""The plan of a chaos trial: which fault comes when, computed from the seed."""

from random import Random
from typing import NamedTuple

from tests.faults.damage import FAULTS, TRACKS


class FaultStep(NamedTuple):
    """A fault from `at_s` after the beginning, for `lasts_s`; `target` selects one process of several."""

    at_s: float
    fault: str
    lasts_s: float
    target: int

    def __str__(self) -> str:
        return f"{self.at_s:5.1f} s  {self.fault} ({self.lasts_s:.1f} s, number {self.target + 1})"


def plan(seed: int, seconds: float) -> list[FaultStep]:
    """Return the steps of a trial.

    The faults of one track come one after the other, in random order; the tracks run at the same time.
    """
    random = Random(f"plan {seed}")
    return sorted(step for track in TRACKS for step in _track(track, seconds, random))


def _track(track: str, seconds: float, random: Random) -> list[FaultStep]:
    deck = [name for name, fault in FAULTS.items() if fault.track == track]
    random.shuffle(deck)
    steps: list[FaultStep] = []
    at_s = random.uniform(1, 4)
    while at_s < seconds:
        name = deck[len(steps) % len(deck)]
        lasts_s = random.uniform(*FAULTS[name].lasts_s)
        steps.append(FaultStep(round(at_s, 1), name, round(lasts_s, 1), random.randrange(2)))
        at_s += lasts_s + random.uniform(2, 6)
    return steps

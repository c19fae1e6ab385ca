"""Random histories of many small worlds, orderly and wild; the same seed gives the same histories."""

from collections.abc import Iterator
from itertools import chain, count, islice
from random import Random
from typing import TypeVar

import hypothesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.support.histories import CLERK_IDS, START, Cast, World, any_event, happen, happen_to_organizations
from tests.support.payloads import Json
from tests.support.reference_model import SentEvent

LARGEST = 16
T = TypeVar("T")


def random_histories(seed: int, worlds: int, *, with_organizations: bool = False) -> list[list[SentEvent]]:
    """Return a history for each of the worlds, which share no user and no address."""
    return list(islice(_histories(seed, with_organizations), worlds))


def some_deliveries(seed: int, number: int) -> list[SentEvent]:
    """Return that many deliveries of random histories."""
    return list(islice(chain.from_iterable(_histories(seed, False)), number))


def _histories(seed: int, with_organizations: bool) -> Iterator[list[SentEvent]]:
    random = Random(seed)
    for number in count():
        yield _history(f"{seed}-{number}", random, with_organizations)


def _history(world: str, random: Random, with_organizations: bool) -> list[SentEvent]:
    cast = Cast(
        [f"user_{world}{clerk_id.removeprefix('user')}" for clerk_id in CLERK_IDS],
        [f"{name}.{world}@example.com" for name in ("ann", "Zoe", "o'brien")],
        [f"org_{world}-{name}" for name in "aB-"] if with_organizations else [],
    )
    events = _orderly(cast, random) if random.random() < 0.5 else _wild(cast, random)
    return [SentEvent(f"msg_{world}-{i}", event, START) for i, event in enumerate(events)]


def _orderly(cast: Cast, random: Random) -> list[Json]:
    world = World(cast.addresses)
    for _ in range(random.randint(4, LARGEST)):
        if cast.organization_ids and random.random() < 0.5:
            happen_to_organizations(world, cast, random)
        else:
            happen(world, cast, random)
    return world.emitted


def _wild(cast: Cast, random: Random) -> list[Json]:
    events = draw(st.lists(any_event(cast), min_size=4, max_size=LARGEST), random.getrandbits(32))
    for event in events:
        if not event["type"].startswith(("user.created", "user.updated", "session.")):
            # Without it the time of arrival counts, which the model does not know to the ms
            event.setdefault("timestamp", START)
    return events


def draw(strategy: st.SearchStrategy[T], seed: int) -> T:
    """Return one example of a strategy; the same seed gives the same example."""
    drawn: list[T] = []

    @hypothesis.seed(seed)
    @settings(
        max_examples=3,  # the first is always the simplest
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(value: T) -> None:
        drawn.append(value)

    collect()
    return drawn[-1]

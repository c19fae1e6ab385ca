"""One trial: random pasts are delivered while a plan breaks one thing after another; then all is compared.

There is no manual step: processes that end are started again, as a platform does.
"""

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from redis.exceptions import RedisError

import config
from tests.faults.damage import FAULTS, TRACKS, Scene
from tests.faults.plan import FaultStep, plan
from tests.faults.random_histories import random_histories
from tests.faults.servers import Servers
from tests.faults.service import Service, what_is_left
from tests.faults.svix import Svix
from tests.support import reference_model
from tests.support.database_trial import DAWDLE, Trial, expected_ledger
from tests.support.reference_model import Choices, ExpectedTables, SentEvent
from tests.support.waiting import wait_until

DELIVERIES_PER_S = 40
EVENTS_PER_WORLD = 9
TWICE = 0.15
STORMS_EVERY_S = 8  # half of all deliveries come at these moments, so that workers have much in hand
SETTLED_WITHIN_S = 150.0
FEW = 5
DEFAULT = Choices()
PROPER_ANSWERS = {"200", "202", "503"}


class Broken(NamedTuple):
    """A fault, and when it was over (s since the epoch)."""

    fault: str
    ended_at: float


class Recovery(NamedTuple):
    """How long after the end of a fault all was applied that had been accepted until then, in s."""

    fault: str
    took_s: float


class ChaosReport(NamedTuple):
    """What a trial has survived; `answers` counts statuses, and by its name what was no answer."""

    seed: int
    histories: int
    deliveries: int
    answers: Counter[str]
    slowest_answer_s: float
    restarts: int
    recoveries: list[Recovery]
    settled_in_s: float


def run(servers: Servers, seed: int, seconds: float, say: Callable[[str], object]) -> ChaosReport:
    """Go through the trial of that seed. Raises AssertionError for whatever differs in the end."""
    steps = plan(seed, seconds)
    say(f"seed {seed}, {seconds:.0f} s\n" + "\n".join(map(str, steps)))
    random = Random(seed)
    choices = Choices(
        random.choice(["delete", "anonymize"]),
        random.choice(["metadata", "none"]),
        random.choice(["metadata", "membership", "none"]),
    )
    histories = random_histories(
        seed,
        round(seconds * DELIVERIES_PER_S / EVENTS_PER_WORLD),
        with_organizations=choices.organization_source == "membership",
    )
    deliveries = [delivery for history in histories for delivery in history]
    settings = servers.fresh(**choices._asdict())
    with servers.connection() as connection:
        connection.execute(DAWDLE)
    with (
        tempfile.TemporaryDirectory(prefix="clerk-sync-") as directory,
        Service(settings, Path(directory), receivers=2, workers=2, kept=True) as service,
        Svix(service.ports, random) as svix,
    ):
        deliver(svix, deliveries, seconds, random)
        broken = follow(steps, servers, service)
        began = time.monotonic()
        await_settled(service, svix)
        settled_in_s = time.monotonic() - began
        assert service.ends() == {}, service.logs()
        assert {answer for answer in svix.answers if answer.isdigit()} <= PROPER_ANSWERS, svix.answers
        restarts = sum(process.starts - 1 for process in service.processes)
    compare(settings, deliveries, choices)
    return ChaosReport(
        seed,
        len(histories),
        len(deliveries),
        svix.answers,
        max(svix.answered_in),
        restarts,
        recoveries(servers, broken, svix.accepted_at),
        settled_in_s,
    )


def deliver(svix: Svix, deliveries: Sequence[SentEvent], seconds: float, random: Random) -> None:
    """Let half of the deliveries trickle in, and half come in storms."""
    order = random.sample(deliveries, len(deliveries))
    trickle, storms = order[::2], order[1::2]
    svix.send(trickle, over_s=seconds, twice=TWICE)
    number = max(1, round(seconds / STORMS_EVERY_S))
    for i in range(number):
        svix.send(storms[i::number], after_s=i * seconds / number, twice=TWICE)


def follow(steps: Sequence[FaultStep], servers: Servers, service: Service) -> list[Broken]:
    """Do what the plan says; each track in a thread of its own."""
    began = time.monotonic()
    broken: list[Broken] = []
    errors: list[BaseException] = []

    def follow_track(track: str) -> None:
        try:
            for step in (step for step in steps if FAULTS[step.fault].track == track):
                time.sleep(max(0.0, began + step.at_s - time.monotonic()))
                with FAULTS[step.fault].damage(Scene(servers, service, step.target)):
                    time.sleep(step.lasts_s)
                broken.append(Broken(step.fault, time.time()))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=follow_track, args=(track,)) for track in TRACKS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return broken


def await_settled(service: Service, svix: Svix, within_s: float = SETTLED_WITHIN_S) -> None:
    """Wait until everything is delivered, and no job is anywhere but finished."""

    def what_remains() -> dict[str, int]:
        undelivered = svix.undelivered  # first: what is delivered meanwhile is seen on the queue
        try:
            left = what_is_left(service.redis)
        except RedisError:
            left = {"unknown": 1}
        return {**left, "undelivered": undelivered} if undelivered else left

    wait_until(lambda: not what_remains(), within_s, lambda: f"{what_remains()}\n{service.logs()}")


def compare(settings: config.Settings, deliveries: Sequence[SentEvent], choices: Choices = DEFAULT) -> None:
    """Compare the tables with the model, and the ledger with what was delivered."""
    trial = Trial(settings)
    try:
        expected = reference_model.tables(deliveries, choices)
        found = differences(without_times(trial.tables()), without_times(expected))
        assert found == {}, (len(found), dict(islice(found.items(), FEW)))
        assert trial.ledger() == expected_ledger(deliveries), "the ledger"
    finally:
        trial.close()


def without_times(tables: ExpectedTables) -> ExpectedTables:
    """Leave out when each instance was seen: for some events that is the receiver's clock, unknown here."""
    return tables._replace(instances={key: (0, name) for key, (_, name) in tables.instances.items()})


def differences(found: ExpectedTables, expected: ExpectedTables) -> dict[Any, tuple[Any, Any]]:
    """Return what is found and what is expected, of each user or other thing where they are not the same."""
    differing: dict[Any, tuple[Any, Any]] = {}
    for part in ExpectedTables._fields:
        here, there = getattr(found, part), getattr(expected, part)
        for key in here.keys() | there.keys():
            if here.get(key) != there.get(key):
                differing[part, key] = (here.get(key), there.get(key))
    return differing


def recoveries(servers: Servers, broken: Iterable[Broken], accepted_at: dict[str, float]) -> list[Recovery]:
    """Return, for each fault, how long after its end the last was applied of all accepted until then.

    Where the next fault came before that, its time is in it too.
    """
    with servers.connection() as connection:
        rows = connection.execute("SELECT svix_id, extract(epoch FROM applied_at) FROM webhook_events")
        applied_at = {svix_id: float(at) for svix_id, at in rows}
    found = []
    for fault, ended_at in broken:
        waiting = [applied_at[svix_id] for svix_id, at in accepted_at.items() if at <= ended_at]
        found.append(Recovery(fault, max(0.0, max(waiting, default=ended_at) - ended_at)))
    return found

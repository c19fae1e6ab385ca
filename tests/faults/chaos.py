"""A chaos trial: random histories are delivered while a plan injects faults; then the tables are compared.

The only intervention is to restart ended processes, as a platform does.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
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
from tests.support.directories import open_directory
from tests.support.reference_model import Choices, ExpectedTables, SentEvent
from tests.support.waiting import wait_until

DELIVERIES_PER_S = 40
EVENTS_PER_WORLD = 9
TWICE = 0.15
STORMS_EVERY_S = 8  # half of all deliveries come in these bursts, so that workers hold many jobs
SETTLED_WITHIN_S = 150.0
FEW = 5
DEFAULT = Choices()
PROPER_ANSWERS = {"200", "202", "503"}


class Recovery(NamedTuple):
    """The time from the end of a fault until everything accepted before is applied, in s."""

    fault: str
    took_s: float


class ChaosReport(NamedTuple):
    """The results of a trial; `answers` counts statuses, and the names of errors without an answer."""

    histories: int
    deliveries: int
    answers: Counter[str]
    slowest_answer_s: float
    restarts: int
    recoveries: list[Recovery]
    settled_in_s: float


def run(servers: Servers, seed: int, seconds: float, say: Callable[[str], object]) -> ChaosReport:
    """Run the trial of that seed. Raises AssertionError for any difference at the end."""
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
        open_directory() as directory,
        Service(settings, directory, receivers=2, workers=2, kept=True) as service,
        Svix(service.ports, random) as svix,
    ):
        deliver(svix, deliveries, seconds, random)
        ended = follow(steps, servers, service)
        began = time.monotonic()
        await_settled(service, svix)
        settled_in_s = time.monotonic() - began
        assert service.ends() == {}, service.logs()
        assert {answer for answer in svix.answers if answer.isdigit()} <= PROPER_ANSWERS, svix.answers
        restarts = sum(process.starts - 1 for process in service.processes)
    compare(settings, deliveries, choices)
    return ChaosReport(
        len(histories),
        len(deliveries),
        svix.answers,
        max(svix.answered_in),
        restarts,
        recoveries(servers, ended, svix.accepted_at),
        settled_in_s,
    )


def deliver(svix: Svix, deliveries: Sequence[SentEvent], seconds: float, random: Random) -> None:
    """Spread half of the deliveries over the time, and send the other half in bursts."""
    order = random.sample(deliveries, len(deliveries))
    trickle, storms = order[::2], order[1::2]
    svix.send(trickle, over_s=seconds, twice=TWICE)
    number = max(1, round(seconds / STORMS_EVERY_S))
    for i in range(number):
        svix.send(storms[i::number], after_s=i * seconds / number, twice=TWICE)


def follow(steps: Sequence[FaultStep], servers: Servers, service: Service) -> list[tuple[str, float]]:
    """Inject the faults of a plan, each track in a thread; return when each ended (s since the epoch)."""
    began = time.monotonic()

    def follow_track(track: str) -> list[tuple[str, float]]:
        ended = []
        for step in (step for step in steps if FAULTS[step.fault].track == track):
            time.sleep(max(0.0, began + step.at_s - time.monotonic()))
            with FAULTS[step.fault].damage(Scene(servers, service, step.target)):
                time.sleep(step.lasts_s)
            ended.append((step.fault, time.time()))
        return ended

    with ThreadPoolExecutor(len(TRACKS)) as threads:
        return list(chain.from_iterable(threads.map(follow_track, TRACKS)))


def await_settled(service: Service, svix: Svix, within_s: float = SETTLED_WITHIN_S) -> None:
    """Wait until everything is delivered and every job is finished."""

    def what_remains() -> dict[str, int]:
        undelivered = svix.undelivered  # first, so that a delivery accepted now is seen on the queue
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
    """Drop the times of the instances: for some events they come from the receiver's clock."""
    return tables._replace(instances={key: (0, name) for key, (_, name) in tables.instances.items()})


def differences(found: ExpectedTables, expected: ExpectedTables) -> dict[Any, tuple[Any, Any]]:
    """Return the found and the expected value of each entry that differs."""
    differing: dict[Any, tuple[Any, Any]] = {}
    for part in ExpectedTables._fields:
        here, there = getattr(found, part), getattr(expected, part)
        for key in here.keys() | there.keys():
            if here.get(key) != there.get(key):
                differing[part, key] = (here.get(key), there.get(key))
    return differing


def recoveries(
    servers: Servers, ended: Iterable[tuple[str, float]], accepted_at: dict[str, float]
) -> list[Recovery]:
    """Return the recovery from each fault. It includes the next fault if that came before its end."""
    with servers.connection() as connection:
        rows = connection.execute("SELECT svix_id, extract(epoch FROM applied_at) FROM webhook_events")
        applied_at = {svix_id: float(at) for svix_id, at in rows}
    found = []
    for fault, ended_at in ended:
        waiting = [applied_at[svix_id] for svix_id, at in accepted_at.items() if at <= ended_at]
        found.append(Recovery(fault, max(0.0, max(waiting, default=ended_at) - ended_at)))
    return found

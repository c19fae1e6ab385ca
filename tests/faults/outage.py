"""PostgreSQL is away for long while deliveries come steadily: what it costs, and how soon all is applied."""

import time
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

from redis import Redis

from tests.faults.chaos import await_settled
from tests.faults.house import House, Member
from tests.faults.servers import Servers
from tests.faults.svix import Svix
from tests.jobs import RqView
from tests.model import Delivery

SETTLED_WITHIN_S = 120


class Outage(NamedTuple):
    """What was seen. `waits` is how often workers said that they wait; memory is in MB.

    `retries_left` counts the jobs that waited by the retries that they had left.
    """

    lasted_s: float
    answers: Counter[str]
    slowest_answer_s: float
    waits: int
    retries_left: Counter[int]
    memory_before: dict[str, float]
    memory_after: dict[str, float]
    redis_before: float
    redis_after: float
    applied_in_s: float


def without_postgres(
    servers: Servers, house: House, deliveries: Sequence[Delivery], seconds: float
) -> Outage:
    """Take PostgreSQL away, deliver steadily for so long, bring it back, and wait until all is applied."""
    memory_before, redis_before, waits_before = memory_mb(house.members), redis_mb(house.redis), waits(house)
    servers.postgres.stop("immediate")
    with Svix(house.ports, Random(0)) as svix:
        svix.send(deliveries, over_s=seconds)
        time.sleep(seconds)
        waiting = RqView(house.redis)
        retries_left = Counter(waiting.job(id_).retries_left or 0 for id_ in waiting.queue.get_job_ids())
        memory_after, redis_after, waits_after = memory_mb(house.members), redis_mb(house.redis), waits(house)
        servers.postgres.start()
        began = time.monotonic()
        await_settled(house, svix, SETTLED_WITHIN_S)
    return Outage(
        seconds,
        svix.answers,
        max(svix.answered_in),
        waits_after - waits_before,
        retries_left,
        memory_before,
        memory_after,
        redis_before,
        redis_after,
        time.monotonic() - began,
    )


def waits(house: House) -> int:
    """Return how often workers have said that they wait."""
    return sum(worker.read_log().count('"waiting"') for worker in house.workers)


def memory_mb(members: Sequence[Member]) -> dict[str, float]:
    """Return what each has in memory."""
    return {member.name: round(member.memory_mb(), 1) for member in members}


def redis_mb(redis: Redis) -> float:
    """Return what Redis has in memory."""
    memory: Any = redis.info("memory")
    return float(round(memory["used_memory"] / 2**20, 1))

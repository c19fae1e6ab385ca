"""A long outage of PostgreSQL or Redis under a steady load: memory, answers, and the time to recover."""

import time
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any, NamedTuple

import httpx
from redis import Redis

from tests.faults.chaos import await_settled
from tests.faults.servers import Servers
from tests.faults.service import Service, takes_deliveries
from tests.faults.svix import Svix
from tests.support import http
from tests.support.queue import RqView
from tests.support.reference_model import SentEvent
from tests.support.supervised_process import SupervisedProcess
from tests.support.waiting import wait_until
from worker.queue.rq_format import JOB_PREFIX, RETRY_INTERVALS_S, SUSPENDED_KEY

SETTLED_WITHIN_S = 120
READY_WITHIN_S = 30
ANSWER_S = 5
BACK_S = 30
GROWTH_MB = 20
WAITING_SHARE = 10  # a tenth of the deliveries is on the queue when Redis is killed
PAUSES_S = (1.0, 2.0, 5.0)  # so that two minutes of refusals mean some hundred attempts a second
LOOK_EVERY_S = 0.5
LOOKS = 10  # as either process may answer
WELL = "/health 200 ok"
TRUTH = {"/health 503 failing: redis", "/health/live 200 ok", "/health/ready 503 failing"}


class Outage(NamedTuple):
    """What was measured. `waits` counts the log lines of workers that wait; memory is in MB.

    `retries_left` counts the waiting jobs by their number of retries left.
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
    servers: Servers, service: Service, deliveries: Sequence[SentEvent], seconds: float
) -> Outage:
    """Stop PostgreSQL, deliver steadily for `seconds`, start it, and wait until all is applied."""
    memory_before, redis_before = memory_mb(service.processes), redis_mb(service.redis)
    waits_before = waits(service)
    servers.postgres.stop("immediate")
    with Svix(service.ports, Random(0)) as svix:
        svix.send(deliveries, over_s=seconds)
        time.sleep(seconds)
        waiting = RqView(service.redis)
        retries_left = Counter(waiting.job(id_).retries_left or 0 for id_ in waiting.queue.get_job_ids())
        memory_after, redis_after = memory_mb(service.processes), redis_mb(service.redis)
        waits_after = waits(service)
        servers.postgres.start()
        began = time.monotonic()
        await_settled(service, svix, SETTLED_WITHIN_S)
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


class RedisOutage(NamedTuple):
    """What was measured. `answers` and `health` count the answers during the outage; memory is in MB.

    `waiting` jobs were on the queue when Redis was killed; `kept` of them were there after its start. The
    receiver took deliveries again after `ready_in_s`.
    """

    lasted_s: float
    answers: Counter[str]
    slowest_answer_s: float
    health: Counter[str]
    slowest_health_s: float
    memory_before: dict[str, float]
    memory_after: dict[str, float]
    redis_before: float
    redis_after: float
    waiting: int
    kept: int
    ready_in_s: float
    applied_in_s: float


def without_redis(
    servers: Servers, service: Service, deliveries: Sequence[SentEvent], seconds: float
) -> RedisOutage:
    """Kill Redis with jobs on the queue, deliver for `seconds`, start it, and wait until all is applied."""
    waiting = deliveries[::WAITING_SHARE]
    coming = [delivery for i, delivery in enumerate(deliveries) if i % WAITING_SHARE]
    families = [process.family() for process in service.processes]
    with Svix(service.ports, Random(0), pauses_s=PAUSES_S) as svix:
        await_health(service)
        service.redis.set(SUSPENDED_KEY, 1)
        svix.send(waiting)
        wait_until(lambda: not svix.undelivered, SETTLED_WITHIN_S, service.logs)
        taken = Counter(svix.answers)
        memory_before, redis_before = memory_mb(service.processes), redis_mb(service.redis)
        servers.redis.kill()
        svix.send(coming, over_s=seconds)
        health, slowest_health_s = watch_health(service, seconds)
        answers, slowest_answer_s = svix.answers - taken, max(svix.answered_in[taken.total() :])
        memory_after = memory_mb(service.processes)
        servers.redis.start()
        began = time.monotonic()
        kept = sum(int(service.redis.exists(JOB_PREFIX + delivery.svix_id)) for delivery in waiting)
        service.redis.delete(SUSPENDED_KEY)
        wait_until(lambda: takes_deliveries(service.ports[0]), READY_WITHIN_S, service.logs)
        ready_in_s = time.monotonic() - began
        await_settled(service, svix, SETTLED_WITHIN_S)
        applied_in_s = time.monotonic() - began
    await_health(service)
    assert [process.family() for process in service.processes] == families, service.logs()
    return RedisOutage(
        seconds,
        answers,
        slowest_answer_s,
        health,
        slowest_health_s,
        memory_before,
        memory_after,
        redis_before,
        redis_mb(service.redis),
        len(waiting),
        kept,
        ready_in_s,
        applied_in_s,
    )


def check_outage(seen: Outage) -> None:
    """Fail unless every delivery was accepted soon, no retry was used, and memory did not keep growing."""
    assert set(seen.answers) == {"202"}, seen
    assert seen.slowest_answer_s < ANSWER_S, seen
    assert set(seen.retries_left) == {len(RETRY_INTERVALS_S)}, seen
    assert seen.waits > 0, seen
    _check_growth(seen)


def check_redis_outage(seen: RedisOutage) -> None:
    """Fail unless every answer was a quick 503, health named Redis, no job was lost, memory grew little."""
    assert set(seen.answers) == {"503"}, seen
    assert seen.slowest_answer_s < ANSWER_S, seen
    assert set(seen.health) == TRUTH, seen
    assert seen.slowest_health_s < ANSWER_S, seen
    assert seen.kept == seen.waiting, seen
    assert seen.ready_in_s < BACK_S, seen
    assert seen.applied_in_s < BACK_S + max(PAUSES_S), seen
    _check_growth(seen)


def _check_growth(seen: Outage | RedisOutage) -> None:
    for name, before in seen.memory_before.items():
        assert seen.memory_after[name] - before < GROWTH_MB, seen


def watch_health(service: Service, seconds: float) -> tuple[Counter[str], float]:
    """Query every health route for `seconds`; return the counted answers, and the slowest in s."""
    said: Counter[str] = Counter()
    slowest_s = 0.0
    ends = time.monotonic() + seconds
    while time.monotonic() < ends:
        for path in ("/health", "/health/live", "/health/ready"):
            began = time.monotonic()
            said[health(service, path)] += 1
            slowest_s = max(slowest_s, time.monotonic() - began)
        time.sleep(LOOK_EVERY_S)
    return said, slowest_s


def await_health(service: Service) -> None:
    """Wait until /health of every process of the receiver is ok."""
    wait_until(
        lambda: all(health(service, "/health") == WELL for _ in range(LOOKS)),
        READY_WITHIN_S,
        lambda: report(service, "/health").text,
    )


def health(service: Service, path: str) -> str:
    """Return the answer of a health route in short: the HTTP status, its verdict, and the failing checks."""
    answer = report(service, path)
    found = answer.json()
    broken = [name for name, check in found.get("checks", {}).items() if not check["ok"]]
    said = f"{path} {answer.status_code} {found['status']}"
    return f"{said}: {', '.join(broken)}" if broken else said


def report(service: Service, path: str) -> httpx.Response:
    return http.get(service.url(path), timeout=2 * ANSWER_S)


def waits(service: Service) -> int:
    """Return how often workers have logged that they wait."""
    return sum(worker.text().count('"waiting"') for worker in service.workers)


def memory_mb(processes: Sequence[SupervisedProcess]) -> dict[str, float]:
    return {process.name: round(process.memory_mb(), 1) for process in processes}


def redis_mb(redis: Redis) -> float:
    memory: Any = redis.info("memory")
    return float(round(memory["used_memory"] / 2**20, 1))

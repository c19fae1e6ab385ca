"""Far more is delivered than workers can apply."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import IO, NamedTuple

from tests.bench.load import LoadReport, Spec
from tests.faults.outage import memory_mb, redis_mb
from tests.faults.servers import Servers
from tests.faults.service import ROOT, Service
from tests.support.settings import SECRET
from worker.queue.rq_format import FINISHED_KEY, QUEUE_KEY

ROW_S = 0.1
LOOK_EVERY_S = 0.1
PATIENCE_S = 60
TIMES_TOO_MUCH = 20
FAST_MS = 2500  # on a machine that others use too
MISSED_BY = 10  # who looks now and then does not see the queue at its longest
COME_BACK = 50  # delivered before, and delayed by a lock: they may be queued again whatever the depth
GROWTH_MB = 30
SLOW = f"""
    CREATE OR REPLACE FUNCTION be_slow() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_sleep({ROW_S}); RETURN NEW; END $$;
    CREATE TRIGGER be_slow BEFORE INSERT OR UPDATE ON webhook_events FOR EACH ROW EXECUTE FUNCTION be_slow();
"""


class Overload(NamedTuple):
    """What was seen. Memory is in MB, before and at most; `deepest` is the longest that the queue was.

    `taken` and `shed` count the deliveries that were answered 202 and 503.
    """

    offered_per_s: float
    drained_per_s: float
    taken: int
    shed: int
    p50_ms: float
    p99_ms: float
    kept_up: bool
    deepest: int
    memory_before: dict[str, float]
    memory_at_most: dict[str, float]
    redis_before: float
    redis_at_most: float


class Offer:
    """The load client at work."""

    def __init__(self, client: "subprocess.Popen[bytes]", output: IO[str], seconds: float) -> None:
        self._client = client
        self._output = output
        self._deadline = time.monotonic() + seconds

    @property
    def goes_on(self) -> bool:
        """Whether it has not come to its end yet."""
        assert time.monotonic() < self._deadline
        return self._client.poll() is None

    def report(self) -> LoadReport:
        self._output.seek(0)
        return LoadReport(**json.load(self._output))


@contextmanager
def offered(spec: Spec) -> Iterator[Offer]:
    """Run the load client, in a process of its own."""
    argv = [sys.executable, "-m", "tests.bench.load", json.dumps(spec._asdict())]
    with TemporaryFile("w+") as output, subprocess.Popen(argv, cwd=ROOT, stdout=output) as client:
        try:
            yield Offer(client, output, spec.seconds + PATIENCE_S)
        finally:
            client.kill()


@contextmanager
def slow_database(servers: Servers) -> Iterator[None]:
    """Let every delivery take ROW_S to apply, for the length of the block."""
    with servers.connection() as connection:
        connection.execute(SLOW)
        try:
            yield
        finally:
            connection.execute("DROP TRIGGER be_slow ON webhook_events")


def overload(service: Service, rate: float, seconds: float) -> Overload:
    """Offer `rate` deliveries a second for so long, whether or not those before have been answered."""
    spec = Spec(service.ports[0], SECRET, seed=1, deliveries=int(rate * seconds), seconds=seconds, rate=rate)
    memory_before = memory_at_most = memory_mb(service.processes)
    redis_before = redis_at_most = redis_mb(service.redis)
    deepest, began = 0, 0.0
    with offered(spec) as offer:
        while offer.goes_on:
            deepest = max(deepest, service.redis.llen(QUEUE_KEY))
            began = began or (time.monotonic() if deepest else 0.0)  # first the client signs all it will send
            memory_at_most = greatest(memory_at_most, memory_mb(service.processes))
            redis_at_most = max(redis_at_most, redis_mb(service.redis))
            time.sleep(LOOK_EVERY_S)
        drained = service.redis.zcard(FINISHED_KEY)
        took_s = time.monotonic() - began
        report = offer.report()
    return Overload(
        report.rate,
        drained / took_s,
        report.answered,
        report.failed,
        report.p50_ms,
        report.p99_ms,
        not report.gave_up,
        deepest,
        memory_before,
        memory_at_most,
        redis_before,
        redis_at_most,
    )


def check(seen: Overload, max_queue_depth: int) -> None:
    """Fail unless the receiver stayed fast, shed what was too much, and nothing grew without an end."""
    assert seen.kept_up, seen
    assert seen.offered_per_s > TIMES_TOO_MUCH * seen.drained_per_s, seen
    assert seen.p99_ms < FAST_MS, seen
    assert seen.shed > 0, seen
    assert max_queue_depth - MISSED_BY <= seen.deepest <= max_queue_depth + COME_BACK, seen
    for name, before in seen.memory_before.items():
        assert seen.memory_at_most[name] - before < GROWTH_MB, seen
    assert seen.redis_at_most - seen.redis_before < GROWTH_MB, seen


def greatest(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """Return the greater number under each name."""
    return {name: max(number, other[name]) for name, number in one.items()}

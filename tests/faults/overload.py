"""Overload: far more deliveries than the workers can apply."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from tests.bench.load import Spec
from tests.bench.load_process import load_process
from tests.faults.outage import memory_mb, redis_mb
from tests.faults.servers import Servers
from tests.faults.service import Service
from tests.support.settings import SECRET
from worker.queue.rq_format import FINISHED_KEY, QUEUE_KEY

ROW_S = 0.1
LOOK_EVERY_S = 0.1
TIMES_TOO_MUCH = 20
FAST_MS = 2500  # on a machine with other load
MISSED_BY = 10  # the samples may miss the queue at its longest
COME_BACK = 50  # jobs that a lock has delayed are queued again whatever the depth
GROWTH_MB = 30
SLOW = f"""
    CREATE OR REPLACE FUNCTION be_slow() RETURNS trigger LANGUAGE plpgsql AS
        $$ BEGIN PERFORM pg_sleep({ROW_S}); RETURN NEW; END $$;
    CREATE TRIGGER be_slow BEFORE INSERT OR UPDATE ON webhook_events FOR EACH ROW EXECUTE FUNCTION be_slow();
"""


class Overload(NamedTuple):
    """What was measured. Memory is in MB, before and at most; `deepest` is the maximum length of the queue.

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
    """Send `rate` deliveries a second, without waiting for the answers to the ones before."""
    spec = Spec(service.ports[0], SECRET, seed=1, seconds=seconds, rate=rate)
    memory_before = memory_at_most = memory_mb(service.processes)
    redis_before = redis_at_most = redis_mb(service.redis)
    deepest, began = 0, 0.0
    with load_process(spec) as client:
        while client.running:
            deepest = max(deepest, service.redis.llen(QUEUE_KEY))
            began = began or (time.monotonic() if deepest else 0.0)  # the client first signs every request
            now_mb = memory_mb(service.processes)
            memory_at_most = {name: max(mb, now_mb[name]) for name, mb in memory_at_most.items()}
            redis_at_most = max(redis_at_most, redis_mb(service.redis))
            time.sleep(LOOK_EVERY_S)
        drained = service.redis.zcard(FINISHED_KEY)
        took_s = time.monotonic() - began
        report = client.report()
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
    """Fail unless the receiver stayed fast, answered 503 to the excess, and memory did not keep growing."""
    assert seen.kept_up, seen
    assert seen.offered_per_s > TIMES_TOO_MUCH * seen.drained_per_s, seen
    assert seen.p99_ms < FAST_MS, seen
    assert seen.shed > 0, seen
    assert max_queue_depth - MISSED_BY <= seen.deepest <= max_queue_depth + COME_BACK, seen
    for name, before in seen.memory_before.items():
        assert seen.memory_at_most[name] - before < GROWTH_MB, seen
    assert seen.redis_at_most - seen.redis_before < GROWTH_MB, seen

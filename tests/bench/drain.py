"""The drain of a backlog by our worker, and of the same events by the compared programs."""

import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import psycopg
from redis import Redis
from rq import Queue

from cli.dev.process import Process
from config import load
from db.times import now_ms
from tests.bench.cpu import OWN, CpuClock, cores_allow
from tests.bench.events import traffic
from tests.bench.figures import ComparedCase, Figures
from tests.bench.harness import POLL_S, Bench, Urls
from tests.bench.load_process import ROOT
from tests.bench.plan import BenchPlan, Setting, rounds
from worker.queue.producer import Delivery, delivery_queue
from worker.queue.rq_format import QUEUE

PART = "drain of a backlog"
OURS = "clerk-sync worker"
FIELDS = "image_url,first_name,username,public_metadata"
OURS_FIELDS = "clerk-sync worker, four PROFILE_FIELDS"
OURS_TWO = "two clerk-sync workers"
LOOP = "psycopg loop, a commit per event"
SIMPLE = "rq worker, SimpleWorker"
FORKING = "rq worker"
PRELOADED = "rq worker, the job's module loaded before the fork"
RATE = "events/s"
RIVALS_QUEUE = "bench"
JOB_MODULE = "tests.bench.baseline_job"
ROW_WAITS = "waits for rows %"
WAITS = """
    SELECT coalesce(wait_event_type = 'Lock', false) FROM pg_stat_activity
    WHERE state <> 'idle' AND backend_type = 'client backend' AND pid <> pg_backend_pid()
"""
LIMIT_S = 300
SETTLE_S = 0.5
CHUNK = 2_000


class Backlog:
    """Jobs in a logical database of their own; each round copies them to the queue."""

    def __init__(self, bench: Bench, number: int, queue: str) -> None:
        self.queue = queue
        self.size = 0
        self.url = bench.redis_server.url.removesuffix("/0") + f"/{number}"
        self._redis = Redis.from_url(self.url, decode_responses=True)
        self._list = f"rq:queue:{queue}"
        self._others: list[str] = []

    def fill(self, put: Callable[[str, int], None], size: int) -> None:
        """Let `put(redis_url, size)` enqueue the jobs."""
        self._redis.flushdb()
        put(self.url, size)
        self.size = size
        keys = [str(key) for key in self._redis.keys("*")]
        self._others = [key for key in keys if key != self._list]

    def lay_out(self) -> None:
        """Copy everything but the queue's list to logical database 0."""
        for start in range(0, len(self._others), CHUNK):
            with self._redis.pipeline(transaction=False) as pipeline:
                for key in self._others[start : start + CHUNK]:
                    pipeline.copy(key, key, "0", replace=True)
                pipeline.execute()

    def release(self) -> None:
        """Copy the list too, so that all jobs are ready at the same moment."""
        self._redis.copy(self._list, self._list, "0", replace=True)


class Contender(NamedTuple):
    """A program and its backlog: `start` runs it, and `workers` of them register."""

    subject: str
    backlog: Backlog
    workers: int
    start: Callable[[], AbstractContextManager[Process]]


def measure(bench: Bench, plan: BenchPlan, figures: Figures) -> None:
    """Drain the same backlog in every setting, all programs in turn.

    With the servers far away, the slow programs are measured once.
    """
    backlogs = _Backlogs(bench, plan)
    for turn in range(plan.rounds):
        for setting in Setting:
            if turn < rounds(plan, setting):
                _measure_loop(bench, plan, figures, setting)
                for contender in _contenders(bench, backlogs, setting, is_first=turn == 0):
                    figures.add(ComparedCase(PART, contender.subject, setting), drain(bench, contender))
    _check(figures)


class _Backlogs:
    def __init__(self, bench: Bench, plan: BenchPlan) -> None:
        self.ours = Backlog(bench, 1, QUEUE)
        self.ours.fill(put_deliveries(bench.next_seed()), plan.backlog)
        numbers = count(2)
        self.simple = {s: _baseline_backlog(bench, next(numbers), size) for s, size in plan.simple.items()}
        self.forking = {s: _baseline_backlog(bench, next(numbers), size) for s, size in plan.forking.items()}


def _contenders(
    bench: Bench, backlogs: _Backlogs, setting: Setting, *, is_first: bool
) -> Iterator[Contender]:
    urls = bench.urls(setting)
    yield Contender(OURS, backlogs.ours, 1, partial(bench.workers, urls))
    if is_first or setting is Setting.LOCAL:
        yield Contender(OURS_TWO, backlogs.ours, 2, partial(bench.workers, urls, 2))
        if setting is Setting.LOCAL:
            fields = partial(bench.workers, urls, env={"PROFILE_FIELDS": FIELDS})
            yield Contender(OURS_FIELDS, backlogs.ours, 1, fields)
        yield Contender(SIMPLE, backlogs.simple[setting], 1, partial(_rq_worker, bench, urls, "SimpleWorker"))
        yield Contender(FORKING, backlogs.forking[setting], 1, partial(_rq_worker, bench, urls, "Worker"))
    if is_first and setting is Setting.LOCAL:
        # RQ imports the module named by --config before it works
        start = partial(_rq_worker, bench, urls, "Worker", "--config", JOB_MODULE)
        yield Contender(PRELOADED, backlogs.forking[setting], 1, start)


def drain(bench: Bench, contender: Contender) -> dict[str, float]:
    """Return the events/s from the first finished job to the last, and the CPU time per event."""
    bench.clear()
    backlog = contender.backlog
    with contender.start() as process, bench.connect() as connection:
        bench.await_workers(contender.workers, backlog.queue)
        backlog.lay_out()
        time.sleep(SETTLE_S)
        clock = CpuClock(bench, {OWN: process.pid})
        waits = RowWaits(connection)
        backlog.release()
        rate = _await_finished(bench, process, backlog, waits)
        return {RATE: rate, **clock.per_event(backlog.size), **clock.busy(), ROW_WAITS: waits.percent}


class RowWaits:
    """The share of transactions that wait for rows that another transaction has locked."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        self._looks = Counter[bool]()

    def look(self) -> None:
        """Count the open transactions, by whether they wait."""
        self._looks.update(waits for (waits,) in self._connection.execute(WAITS))

    @property
    def percent(self) -> float:
        """The share of the counted transactions that waited."""
        return 100 * self._looks[True] / max(self._looks.total(), 1)


def _await_finished(bench: Bench, process: Process, backlog: Backlog, waits: RowWaits) -> float:
    deadline = time.monotonic() + LIMIT_S
    first: tuple[float, int] | None = None
    while True:
        finished, now = bench.finished(backlog.queue), time.monotonic()
        if finished and first is None:
            first = now, finished
        if first and finished >= backlog.size:
            return (finished - first[1]) / (now - first[0])
        failed = bench.redis.zcard(f"rq:failed:{backlog.queue}")
        if failed or now > deadline or not process.running:
            raise RuntimeError(f"{backlog.queue}: {finished} of {backlog.size} finished, {failed} failed")
        waits.look()
        time.sleep(POLL_S)


def put_deliveries(seed: int, existing: int = 0) -> Callable[[str, int], None]:
    """Return a function that puts `traffic` on our queue, as the receiver does."""

    def put(redis_url: str, size: int) -> None:
        queue = delivery_queue(load(_env_file=None, redis_url=redis_url))
        with closing(queue):
            for event in traffic(size, seed=seed, existing=existing):
                queue.enqueue(Delivery(event.svix_id, event.body, event.description, now_ms()))

    return put


def _baseline_backlog(bench: Bench, number: int, size: int) -> Backlog:
    backlog = Backlog(bench, number, RIVALS_QUEUE)
    seed = bench.next_seed()

    def put(redis_url: str, size: int) -> None:
        with closing(Redis.from_url(redis_url)) as redis:
            queue = Queue(RIVALS_QUEUE, connection=redis, serializer="json")
            for event in traffic(size, seed=seed):
                queue.enqueue(f"{JOB_MODULE}.handle_body", event.body, description=event.description)

    backlog.fill(put, size)
    return backlog


def _rq_worker(bench: Bench, urls: Urls, kind: str, *more: str) -> AbstractContextManager[Process]:
    options = ["--url", urls.redis, "--serializer", "json", "--worker-class", f"rq.worker.{kind}", "--quiet"]
    argv = [sys.executable, "-m", "rq.cli", "worker", *options, *more, RIVALS_QUEUE]
    return bench.running(argv, urls, ROOT)


def _measure_loop(bench: Bench, plan: BenchPlan, figures: Figures, setting: Setting) -> None:
    bench.clear()
    count = plan.loop[setting]
    argv = [sys.executable, "-m", JOB_MODULE, str(bench.next_seed()), str(count)]
    env = {"DATABASE_URL": bench.urls(setting).database}
    clock = CpuClock(bench, {})
    loop = subprocess.run(argv, env=env, cwd=ROOT, check=True, capture_output=True, text=True)
    rate, cpu_us = map(float, loop.stdout.split())
    figures.add(ComparedCase(PART, LOOP, setting), {RATE: rate, OWN: cpu_us, **clock.per_event(count)})


def _check(figures: Figures) -> None:
    def case(subject: str, setting: Setting) -> ComparedCase:
        return ComparedCase(PART, subject, setting)

    goals = ((LOOP, 4.5), (SIMPLE, 20.0), (FORKING, 300.0))
    for setting in Setting:
        ours, is_local = case(OURS, setting), setting is Setting.LOCAL
        for subject, goal in goals:
            at_least = goal if is_local else None
            figures.compare(f"drain : {subject}", ours, case(subject, setting), RATE, at_least=at_least)
        if is_local:
            figures.compare(f"drain : {PRELOADED}", ours, case(PRELOADED, setting), RATE)
            fields = case(OURS_FIELDS, setting)
            figures.compare("drain, four PROFILE_FIELDS : none", fields, ours, RATE, at_least=0.85)
        two, at_least = case(OURS_TWO, setting), 1.3 if is_local else None
        figures.compare("drain, two processes : one", two, ours, RATE, at_least=at_least)
    far, near = case(OURS, Setting.BOTH), case(OURS, Setting.LOCAL)
    most = cores_allow(figures, near)
    figures.check("drain, were every core always busy", Setting.LOCAL, most, "events/s")
    ratio = most / figures.median(case(LOOP, Setting.LOCAL), RATE)
    figures.check(f"drain, were every core always busy : {LOOP}", Setting.LOCAL, ratio)
    figures.compare("drain, 5 ms to both : local", far, near, RATE, at_least=0.6)

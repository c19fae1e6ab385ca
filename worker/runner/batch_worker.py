"""The worker process: an RQ worker that takes, applies and finishes many jobs at a time.

RQ's tools see an RQ worker: it registers, sends heartbeats, obeys `rq suspend` and shutdown commands, and
writes jobs and registries as RQ does. Only the loop differs. A job is at any moment in the queue, in a
consumer's reserved list, or in a registry; each step is one script in Redis or one transaction:

1. Finish the last batch and take the next, in one round trip.
2. Apply it, in one transaction.
3. If the worker is killed in between, another one releases its reserved jobs after DEAD_AFTER_S, and applying
   again changes nothing: applying is a merge.

A problem of the deployment fails no job: the worker puts the batch back into the queue, logs what it waits
for, and waits.
"""

import json
import os
import socket
import sys
import time
from concurrent.futures import wait
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import UTC, datetime, timedelta
from threading import Event, Thread
from typing import Any

import structlog
from redis import Redis
from redis.exceptions import RedisError, ResponseError
from rq import Queue, worker_registration
from rq.worker import SimpleWorker

from config import Settings
from db import ledger
from db.apply.isolation import Isolation
from db.apply.tables import Tables
from db.connection.engine import Database
from db.connection.errors import ChangeRefused
from db.merge.policy import Policy
from db.times import now_ms
from worker.clerk.payloads import FieldSources
from worker.monitoring.metrics import BATCH_SIZE, FLUSH_EVERY_S, Metrics
from worker.periodic import PeriodicRunner, PeriodicTask
from worker.queue.consumer import DEAD_AFTER_S, Deferred, Failed, ReservedJobs, Settled, TakenJob
from worker.queue.heartbeat import Heartbeat
from worker.queue.maintenance import QueueMaintenance
from worker.queue.producer import WATCHING_SINCE_KEY
from worker.queue.rq_format import JOB_PREFIX, QUEUE, RESULT_TTL_S, WORKER_REPORT, timestamp
from worker.redis_client import worker_redis
from worker.runner import batch
from worker.runner.consumer_loop import ConsumerThread, SharedState
from worker.runner.instrumentation import BatchInstrumentation
from worker.shutdown import StopSignal
from worker.threads import in_background

log = structlog.get_logger("worker")

MIN_CONSUMERS, MAX_CONSUMERS = 2, 3  # why: docs/decisions/008-why-several-consumer-threads.md
SWITCH_S = 0.001  # a thread with an answer waits 1 ms, not the default 5 ms, for the other threads
WORKER_TTL_S = 30
LOOK_EVERY_S = 0.5  # the interval of checks whether a heartbeat is due; they send no command
BEAT_EVERY_S = 3  # during work
IDLE_BEAT_EVERY_S = 10  # below DEAD_AFTER_S, also if a thread blocks right after a heartbeat
WORKER_HASH_EVERY_S = 30
MAINTENANCE_EVERY_S = 60
PRUNE_EVERY_S = 3600
KNOWN_FOR = timedelta(seconds=RESULT_TTL_S - 300)  # Redis keeps the job of an applied delivery for longer
OVERDUE_LOOK_S = 0.5


class BatchWorker(SimpleWorker):
    """An RQ worker with its own loop: see the module's docstring."""

    def __init__(self, settings: Settings, redis: Redis, database: Database, stopping: StopSignal) -> None:
        queue = Queue(QUEUE, connection=redis, serializer="json")
        # `prepare_for_work` would send commands: `_introduce` does, which waits for Redis
        super().__init__(
            [queue], connection=redis, serializer="json", worker_ttl=WORKER_TTL_S, prepare_for_work=False
        )
        self.hostname, self.pid = socket.gethostname(), os.getpid()
        self.birth_date = datetime.now(UTC)
        self.settings = settings
        self.database = database
        self.stopping = stopping
        self._metrics = Metrics()
        self._instrumentation = BatchInstrumentation(self._metrics)
        tables = Tables(database, Policy.of(settings), self._instrumentation.record_transaction)
        self._isolation = Isolation(tables)
        self._sources = FieldSources.of(settings)
        shared = SharedState(self._process, settings.batch_size, database, stopping, Event())
        parts = ["", *(f".{i}" for i in range(2, consumer_count(settings) + 1))]
        self._threads = [ConsumerThread(ReservedJobs(redis, self.name, part), shared) for part in parts]
        self._primary, *self._helpers = self._threads
        ids = [consumer.reserved.consumer_id for consumer in self._threads]
        self._heartbeat = Heartbeat(redis, self.name, ids)
        self._last_beat_s = self._next_beat_s = self._hash_at_s = 0.0  # on the monotonic clock
        self._hash_fields: dict[str, str] = {}  # as they were last written
        self._is_registered = False
        self._has_worked = False
        self._has_compared = False
        self._has_unpruned = True  # an earlier worker may have left old rows

    def work(self, *_args: Any, **_kwargs: Any) -> bool:
        """Take and apply batches until the stop signal; then settle the last batch and release the rest."""
        if not self._introduce():
            return False
        runners = self._periodic_runners()
        for runner in runners:
            runner.start()
        log.info("worker started", worker=self.name, batch_size=self.settings.batch_size)
        helpers = [in_background(consumer.run_helper) for consumer in self._helpers]
        for helper in helpers:  # a fault in one ends the worker, as one in the main thread does
            helper.add_done_callback(lambda _: self.stopping.request())
        try:
            self._primary.run_primary()
        finally:
            self.stopping.request()
            wait(helpers)
            for runner in runners:
                runner.stop()
            self._leave()
        for helper in helpers:
            helper.result()
        return True

    def _introduce(self) -> bool:
        """Register and listen for commands once Redis answers; return False if stopped before."""
        while not self.stopping.requested:
            try:
                self._set_ip_address(self.connection)  # private in RQ 3.0 (tests/test_private_names.py)
                with suppress(ResponseError):  # Redis is full: a later heartbeat registers the worker
                    self._beat()
                self.subscribe()
            except RedisError as error:
                self._primary.pause_for_redis(error)
            else:
                return True
        return False

    def _process(self, jobs: list[TakenJob]) -> list[Settled]:
        if not self._has_compared:
            self._compare_with_ledger()
        self._metrics.observe(BATCH_SIZE, len(jobs))
        done = batch.process(jobs, self._sources, self._isolation)
        for item in done:
            if isinstance(item, Failed):
                self._instrumentation.failed(item)
            elif isinstance(item, Deferred):
                self._instrumentation.deferred(item)
        self._has_worked = self._has_unpruned = True
        return done

    def _compare_with_ledger(self) -> None:
        """Before the first batch, report a Redis that does not know the newest delivery in the ledger.

        It has lost data. While processes run, their counts show that (worker.monitoring.metrics), but after a
        snapshot was restored all of them may have been started again.
        """
        svix_id = None
        with suppress(ChangeRefused):  # by a policy of the application, which refuses each delivery too
            svix_id = ledger.newest(self.database, KNOWN_FOR)
        if svix_id is not None and not self.connection.exists(JOB_PREFIX + svix_id):
            log.error("Redis has lost data: it does not know the newest delivery applied", svix_id=svix_id)
            with suppress(ResponseError):  # Redis is full: the worker must go on, to free memory
                self.connection.set(WATCHING_SINCE_KEY, now_ms())
        self._has_compared = True

    def _leave(self) -> None:
        try:
            for consumer in self._threads:
                consumer.leave()
            self._flush()
            self.teardown()
        except RedisError as error:
            log.warning("worker deregistration failed: Redis unavailable", error=type(error).__name__)
        log.info("worker stopped", worker=self.name)

    def _periodic_runners(self) -> tuple[PeriodicRunner, ...]:
        """Return the periodic threads. The heartbeat has its own, so that slow tasks do not delay it."""
        maintenance = QueueMaintenance(self.queues[0])
        return (
            PeriodicRunner(
                PeriodicTask("heartbeat", LOOK_EVERY_S, self._beat_if_due),
                PeriodicTask("flush metrics", FLUSH_EVERY_S, self._flush),
            ),
            PeriodicRunner(PeriodicTask("maintenance", MAINTENANCE_EVERY_S, maintenance.run)),
            PeriodicRunner(PeriodicTask("prune", PRUNE_EVERY_S, self._prune)),
        )

    def _beat_if_due(self) -> None:
        """Beat often while there is work or news, and seldom else: an idle worker costs few commands."""
        now = time.monotonic()
        has_news = self._has_worked or self._fields() != self._hash_fields
        if now >= self._next_beat_s or (has_news and now >= self._last_beat_s + BEAT_EVERY_S):
            self._beat()

    def _beat(self) -> None:
        now, fields = time.monotonic(), self._fields()
        has_news = self._has_worked or fields != self._hash_fields
        self._has_worked = False
        writes_hash = has_news or now >= self._hash_at_s + WORKER_HASH_EVERY_S
        self.last_heartbeat = datetime.now(UTC)
        written = {**fields, "last_heartbeat": timestamp(self.last_heartbeat)} if writes_hash else {}
        beat = self._heartbeat.beat(written)
        self._last_beat_s, self._next_beat_s = now, now + min(IDLE_BEAT_EVERY_S, beat.wait_s)
        if writes_hash:
            self._hash_at_s, self._hash_fields = now, fields
        if beat.released:
            log.warning("released jobs of a dead worker", jobs=beat.released, dead_after_s=DEAD_AFTER_S)
        # not known: just started, or removed while it was frozen, or Redis lost its data
        self._is_registered = self._is_registered and beat.is_known
        if not self._is_registered:  # repeated until it succeeds: a full Redis refuses it
            self._register()

    # As RQ 3.0's `register_birth`, which cannot be called twice (tests/test_private_names.py).
    def _register(self) -> None:
        with self.connection.pipeline() as pipeline:
            pipeline.hset(self.key, mapping=self.serialize())
            worker_registration.register(self, pipeline)
            pipeline.execute()
        self._is_registered = True

    def _fields(self) -> dict[str, str]:
        """Return the fields of this worker's hash that change, except the times."""
        is_busy = any(consumer.is_busy for consumer in self._threads)
        return {"state": "busy" if is_busy else "idle", WORKER_REPORT: json.dumps(self._report())}

    def _report(self) -> dict[str, object]:
        return {
            "waiting_for": self._primary.waiting_for,
            "reason": self._primary.reason,
            "in_hand_s": max(consumer.in_hand_s() for consumer in self._threads),
            "pool": self.database.pool_state()._asdict(),
        }

    def _flush(self) -> None:
        self._instrumentation.record_pool(self.database.pool_state())
        self._metrics.flush(self.connection)

    def _prune(self) -> None:
        """Prune the ledger at the start, then only if this worker has added to it since."""
        if not self._has_unpruned:
            return
        count = ledger.prune(self.database, timedelta(days=self.settings.event_retention_days))
        self._has_unpruned = False
        if count:
            log.info("ledger pruned", rows=count)

    def _pubsub_exception_handler(self, exc: Exception, *_: object) -> None:
        # In RQ 3.0 a time-out would end this thread, and the worker would obey no further command.
        log.debug("command channel lost", error=type(exc).__name__)
        self.stopping.wait(2)


def consumer_count(settings: Settings) -> int:
    """Return the number of consumer threads: as many as connections to the database, within limits."""
    return max(MIN_CONSUMERS, min(settings.db_pool_size + settings.db_max_overflow, MAX_CONSUMERS))


def run(settings: Settings) -> None:
    """Run one worker until SIGTERM or SIGINT. Waits for Redis, the database and the migrations."""
    sys.setswitchinterval(SWITCH_S)
    stopping = StopSignal()
    stopping.listen()
    Thread(target=_end_when_overdue, args=(stopping, settings.shutdown_seconds), daemon=True).start()
    with (
        Database(settings) as database,
        worker_redis(settings) as redis,
        _reconciling(settings, redis, database, stopping),
    ):
        BatchWorker(settings, redis, database, stopping).work()


def _reconciling(
    settings: Settings, redis: Redis, database: Database, stopping: StopSignal
) -> AbstractContextManager[None]:
    if settings.reconcile_every is None:
        return nullcontext()
    from worker.sync.scheduled import reconciling  # noqa: PLC0415 - loads an HTTP client, which most workers do without

    return reconciling(settings, redis, database, stopping)


def _end_when_overdue(stopping: StopSignal, limit_s: float) -> None:
    """End the process if it cannot finish its jobs in time. Another worker takes over the jobs."""
    while stopping.since_s() < limit_s:
        time.sleep(OVERDUE_LOOK_S)
    log.error("shutdown timeout exceeded, forcing exit", limit_s=limit_s)
    os._exit(1)

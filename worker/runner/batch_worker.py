"""The worker process: an RQ worker that takes, applies and finishes many jobs at a time.

To RQ's tools it is one of theirs: it registers, beats, obeys `rq suspend` and shutdown commands, and leaves
jobs, registries and results as RQ does. What differs is the loop. A job is at any moment in the queue, in
this worker's held list, or in a registry; each step between is one script in Redis or one transaction:

1. Settle what the last batch did and take the next, in one round trip.
2. Apply it, in one transaction.
3. Killed in between, the held list is given back by another worker after SILENT_AFTER_S, and applying again
   changes nothing: applying is a merge.

What is the deployment's trouble, not the event's, fails no job: the batch goes back to the queue, and the
worker says what it waits for and waits.
"""

import json
import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from threading import Event, Thread
from typing import Any

import structlog
from redis import Redis
from redis.exceptions import RedisError, ResponseError
from rq import Queue, worker_registration
from rq.worker import SimpleWorker

from config import Settings
from db import ledger
from db.apply import users
from db.connection.engine import Database
from db.merge.policy import Policy
from worker.clerk.payloads import FieldSources
from worker.monitoring.metrics import FLUSH_EVERY_S, Metrics
from worker.periodic import PeriodicRunner, PeriodicTask
from worker.queue.consumer import Failed, Finished, ReservedJobs, TakenJob
from worker.queue.maintenance import QueueMaintenance
from worker.queue.retry_scheduler import RetryScheduler
from worker.queue.rq_format import QUEUE, WORKER_REPORT
from worker.redis_causes import explain
from worker.redis_client import worker_redis
from worker.runner import batch
from worker.runner.consumer_loop import FIRST_PAUSE_S, MAX_PAUSE_S, ConsumerThread, SharedState
from worker.runner.instrumentation import BatchInstrumentation
from worker.shutdown import StopSignal

log = structlog.get_logger("worker")

CONSUMERS = 2  # a third brings a few percent more: docs/decisions/008-why-two-lanes.md
SWITCH_S = 0.001  # a lane whose answer has come need not wait the usual 5 ms for the other to pause
WORKER_TTL_S = 30
BEAT_EVERY_S = 3
RECOVER_EVERY_S = 5
SCHEDULE_EVERY_S = 2
MAINTENANCE_EVERY_S = 60
PRUNE_EVERY_S = 3600
OVERDUE_LOOK_S = 0.5


class BatchWorker(SimpleWorker):
    """RQ's worker with a loop of our own: see this module."""

    def __init__(self, settings: Settings, redis: Redis, database: Database, stopping: StopSignal) -> None:
        queue = Queue(QUEUE, connection=redis, serializer="json")
        super().__init__([queue], connection=redis, serializer="json", worker_ttl=WORKER_TTL_S)
        self.birth_date = datetime.now(UTC)
        self.settings = settings
        self.database = database
        self.stopping = stopping
        self._retries = RetryScheduler(queue)
        self._metrics = Metrics()
        self._instrumentation = BatchInstrumentation(self._metrics)
        self._apply = partial(users.apply, database, policy=Policy.of(settings))
        self._keys = FieldSources.of(settings)
        self._fault: BaseException | None = None
        shared = SharedState(self._process, settings.batch_size, database, stopping, Event())
        self._primary = ConsumerThread(ReservedJobs(redis, self.name), shared)
        self._helpers = [
            ConsumerThread(ReservedJobs(redis, self.name, f".{i}"), shared) for i in range(2, CONSUMERS + 1)
        ]
        self._threads = (self._primary, *self._helpers)

    def work(self, *_args: Any, **_kwargs: Any) -> bool:
        """Take and apply batches until told to stop; then settle what is in hand and give back the rest."""
        self._introduce()
        beat, flush, prune, *others = self._periodic_tasks()
        # Whatever takes long must not hold up the heartbeat, nor what others wait for.
        runners = (PeriodicRunner([beat, flush]), PeriodicRunner(others), PeriodicRunner([prune]))
        for runner in runners:
            runner.start()
        log.info("worker started", worker=self.name, batch_size=self.settings.batch_size)
        helpers = [
            Thread(target=self._run_helper, args=(consumer,), daemon=True) for consumer in self._helpers
        ]
        for helper in helpers:
            helper.start()
        try:
            self._primary.run_primary()
        finally:
            self.stopping.request()
            for helper in helpers:
                helper.join()
            for runner in runners:
                runner.stop()
            self._leave()
        if self._fault is not None:
            raise self._fault
        return True

    def _run_helper(self, consumer: ConsumerThread) -> None:
        try:
            consumer.run_helper()
        except BaseException as fault:  # it ends the worker, as one in the main thread does
            self._fault = fault
            self.stopping.request()

    def _introduce(self) -> None:
        """Register and listen for commands, in a way that may be tried again: RQ's own may not."""
        while not self.stopping.requested:
            try:
                with suppress(ResponseError):  # Redis is full: the first beat that finds room registers
                    self._beat()
                self.subscribe()
            except RedisError as error:
                self._primary.pause_for_redis(error)
            else:
                return

    def _process(self, jobs: list[TakenJob]) -> list[Finished | Failed]:
        self._instrumentation.record_batch_size(len(jobs))
        done = batch.process(jobs, self._keys, self._instrumentation.instrument(self._apply, jobs))
        for item in done:
            if isinstance(item, Failed):
                self._instrumentation.failed(item)
        return done

    def _leave(self) -> None:
        try:
            for consumer in self._threads:
                consumer.leave()
            self._flush()
            self._retries.stop()
            self.teardown()
        except RedisError as error:
            log.warning("left without a word: Redis does not answer", error=type(error).__name__)
        log.info("worker stopped", worker=self.name)

    def _periodic_tasks(self) -> list[PeriodicTask]:
        return [
            PeriodicTask("beat", BEAT_EVERY_S, self._beat),
            PeriodicTask("flush", FLUSH_EVERY_S, self._flush),
            PeriodicTask("prune", PRUNE_EVERY_S, self._prune),
            PeriodicTask("recover orphans", RECOVER_EVERY_S, self._recover_orphans),
            PeriodicTask("schedule", SCHEDULE_EVERY_S, self._retries.enqueue_due),
            PeriodicTask("upkeep", MAINTENANCE_EVERY_S, QueueMaintenance(self.queues[0]).run),
        ]

    def _beat(self) -> None:
        for consumer in self._threads:
            consumer.reserved.heartbeat()
        # No transaction: a Redis that is full refuses the fields, and still does not forget the worker.
        with self.connection.pipeline(transaction=False) as pipeline:
            self.heartbeat(pipeline=pipeline)
            is_busy = any(consumer.is_busy for consumer in self._threads)
            self.set_state("busy" if is_busy else "idle", pipeline=pipeline)
            pipeline.hset(self.key, WORKER_REPORT, json.dumps(self._report()))
            pipeline.hexists(self.key, "birth")
            is_registered = pipeline.execute()[-1]
        if not is_registered:  # it has just begun, or its hash expired while it was frozen, or Redis lost it
            with self.connection.pipeline() as pipeline:
                pipeline.hset(self.key, mapping=self.serialize())
                worker_registration.register(self, pipeline)
                pipeline.execute()

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

    def _recover_orphans(self) -> None:
        count = self._primary.reserved.recover_orphans()
        if count:
            log.warning("took back what a dead worker held", jobs=count)

    def _prune(self) -> None:
        self.database.ping()
        count = ledger.prune(self.database, timedelta(days=self.settings.event_retention_days))
        if count:
            log.info("ledger pruned", rows=count)

    def _pubsub_exception_handler(self, exc: Exception, *_: object) -> None:
        # RQ's own ends the thread on a time-out, and then the worker obeys no command any more.
        log.debug("command channel lost", error=type(exc).__name__)
        self.stopping.wait(2)


def run(settings: Settings) -> None:
    """Run one worker until SIGTERM or SIGINT. Waits for Redis, the database and the migrations."""
    sys.setswitchinterval(SWITCH_S)
    stopping = StopSignal()
    stopping.listen()
    Thread(target=_end_when_overdue, args=(stopping, settings.shutdown_seconds), daemon=True).start()
    database = Database(settings)
    redis = worker_redis(settings)
    try:
        worker = _make_worker(settings, redis, database, stopping)
        if worker is not None:
            with _repairing(settings, redis, database, stopping):
                worker.work()
    finally:
        database.dispose()
        redis.close()


def _repairing(
    settings: Settings, redis: Redis, database: Database, stopping: StopSignal
) -> AbstractContextManager[None]:
    if settings.reconcile_every is None:
        return nullcontext()
    from worker.sync.scheduled import repairing  # noqa: PLC0415 - loads an HTTP client, which most workers do without

    return repairing(settings, redis, database, stopping)


def _make_worker(
    settings: Settings, redis: Redis, database: Database, stopping: StopSignal
) -> BatchWorker | None:
    """Return a worker once Redis answers, which RQ asks for the worker's address; None when told to stop."""
    pause_s = FIRST_PAUSE_S
    while not stopping.requested:
        try:
            return BatchWorker(settings, redis, database, stopping)
        except RedisError as error:
            log.warning("waiting", what="Redis", reason=explain(error))
            stopping.wait(pause_s)
            pause_s = min(pause_s * 2, MAX_PAUSE_S)
    return None


def _end_when_overdue(stopping: StopSignal, limit_s: float) -> None:
    """End a process that cannot finish what it has in hand. Another worker takes it back: nothing is lost."""
    while stopping.since_s() < limit_s:
        time.sleep(OVERDUE_LOOK_S)
    log.error("not finished in time, ending all the same", limit_s=limit_s)
    os._exit(1)

"""Processes a batch: parse, change, apply, and the result of each job. It does not use the queue."""

import traceback
from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter
from typing import NamedTuple

from db.apply.isolation import Isolation, Result, blame, is_delay
from db.connection.errors import ChangeRefused, DatabaseUnavailable
from db.merge.incoming import Outcome, ReceivedChange
from db.times import to_ms
from worker import log
from worker.clerk.changes import change_of
from worker.clerk.errors import EventError
from worker.clerk.payloads import FieldSources, parse
from worker.queue.consumer import Deferred, Failed, Finished, Settled, TakenJob
from worker.queue.rq_format import ForeignJobError, decode_call, parse_timestamp

MAX_ID = 255  # of the ledger's key; PostgreSQL limits the size of an index entry


class Parsed(NamedTuple):
    """A job whose delivery was understood."""

    job: TakenJob
    incoming: ReceivedChange


def process(jobs: Sequence[TakenJob], sources: FieldSources, isolation: Isolation) -> list[Settled]:
    """Apply the deliveries of `jobs` together and return the result of each.

    1. A job that cannot be understood fails alone.
    2. The others are applied in one call; if the database refuses them, the job at fault is isolated.
    3. Jobs that have waited for a lock are applied separately, so that the others do not wait with them.

    Raises DatabaseUnavailable if no job is at fault: the same jobs can be processed again.
    """
    parsed = [_parse(job, sources) for job in jobs]
    failed = [item for item in parsed if isinstance(item, Failed)]
    has_waited = attrgetter("job.has_waited")
    understood = sorted((item for item in parsed if isinstance(item, Parsed)), key=has_waited)
    results = [
        result
        for have_waited, group in groupby(understood, has_waited)
        for result in isolation.apply([item.incoming for item in group], have_waited=have_waited)
    ]
    trouble = _unexplained(understood, results)
    if trouble is not None:
        raise trouble
    settled = zip(understood, results, strict=True)
    return [*failed, *(_settled(item.job, result) for item, result in settled)]


def _parse(job: TakenJob, sources: FieldSources) -> Parsed | Failed:
    try:
        if len(job.id) > MAX_ID:
            raise ForeignJobError("the job's id is longer than any svix-id")
        is_repeated = job.has_failed or job.has_waited
        return Parsed(job, incoming(job.id, decode_call(job.data), received_at(job), sources, is_repeated))
    except Exception as error:  # a bug that concerns one event must not stop the others
        return _failed(job, error)


def incoming(
    svix_id: str | None, body: str, received_ms: int, sources: FieldSources, is_repeated: bool = False
) -> ReceivedChange:
    """Return the change that a delivery's body makes. Raises Unreadable."""
    event = parse(body, sources)
    change = change_of(event, received_ms)
    origin = event.type, event.happened_at, received_ms, event.instance_id
    return ReceivedChange(change, svix_id, *origin, is_repeated)


def _unexplained(parsed: Sequence[Parsed], results: Sequence[Result]) -> DatabaseUnavailable | None:
    """Return an error for which the deployment may be at fault: no other job succeeded, now or before."""
    if any(isinstance(result, Outcome) for result in results):
        return None
    return next(
        (
            result
            for item, result in zip(parsed, results, strict=True)
            if isinstance(result, DatabaseUnavailable) and not is_delay(result) and not item.job.has_failed
        ),
        None,
    )


def _settled(job: TakenJob, result: Result) -> Settled:
    if isinstance(result, Outcome):
        return Finished(job, result)
    if is_delay(result):
        return Deferred(job, str(result))
    return _failed(job, blame(result) if isinstance(result, DatabaseUnavailable) else result)


def received_at(job: TakenJob) -> int:
    """Return when the delivery was received, in ms; 0 if the job has no valid time."""
    try:
        return to_ms(parse_timestamp(job.created_at))
    except (ValueError, OverflowError):
        return 0


def _failed(job: TakenJob, error: Exception) -> Failed:
    """Return the failure of a job, with the text of the error only if it is one of this project's."""
    if isinstance(error, EventError | ForeignJobError | ChangeRefused):
        reason, retryable = f"{type(error).__name__}: {error}", error.retryable
    else:
        reason, retryable = f"{log.fault(error)}: a fault of clerk-sync, report it", True
    frames = "".join(traceback.format_tb(error.__traceback__))
    return Failed(job, reason, f"Traceback (most recent call last):\n{frames}{reason}", retryable)

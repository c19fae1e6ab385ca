import zlib
from collections.abc import Sequence
from typing import Any

import psycopg
import pytest

from db.apply.isolation import Isolation
from db.apply.tables import Tables
from db.connection.engine import Database
from db.connection.errors import ChangeRefused, DatabaseUnavailable
from db.merge.policy import Policy
from tests.support.applied import Applied
from tests.support.payloads import (
    ANN,
    BEN,
    INSTANCE,
    NOW,
    body,
    session,
    session_event,
    svix_id,
    user,
    user_event,
)
from worker.clerk.payloads import FieldSources
from worker.queue import lock_waits
from worker.queue.consumer import Failed, Finished, Settled, TakenJob
from worker.queue.rq_format import encode_call
from worker.runner import batch

MARK = "marked.person"


def job(
    event: object = None, *, data: bytes | None = None, created_at: str = "2026-01-01T10:00:00Z"
) -> TakenJob:
    text = body(user_event() if event is None else event).decode()
    return TakenJob(
        svix_id(), zlib.compress(encode_call(text)) if data is None else data, created_at, 3, (10,), {}
    )


def person(i: int) -> TakenJob:
    return job(user_event(data=user(f"user_{i}", first_name=f"name {i}", last_name=None)))


def process(jobs: Sequence[TakenJob], tables: Tables) -> list[Settled]:
    return batch.process(jobs, FieldSources(), Isolation(tables))


def outcomes(done: Sequence[Settled]) -> dict[str, str]:
    """Return what became of each job: its outcome, or the first word of why it failed."""
    return {
        item.job.id: item.outcome if isinstance(item, Finished) else item.reason.partition(":")[0]
        for item in done
    }


def the_failed(done: Sequence[Settled]) -> Failed:
    (failed,) = (item for item in done if isinstance(item, Failed))
    return failed


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_batch_is_applied_in_one_call_and_each_job_has_its_outcome(count: int) -> None:
    jobs = [person(i) for i in range(count)]
    tables = Applied()
    done = process(jobs, tables)
    assert tables.calls == ([[one.id for one in jobs]] if jobs else [])
    outcomes = ["applied", "stale", "applied"][:count]
    assert done == [Finished(*pair) for pair in zip(jobs, outcomes, strict=True)]


def test_a_delivery_is_recorded_with_when_it_came_and_when_it_happened() -> None:
    tables = Applied()
    one = job(session_event(data=session(ANN), timestamp=NOW + 7), created_at="2026-01-01T10:00:00.250000Z")
    process([one], tables)
    assert [i[1:] for i in tables.batches[0]] == [
        (one.id, "session.created", NOW + 7, NOW + 250, INSTANCE, False)
    ]


@pytest.mark.parametrize("meta", [{"attempts": 2, "reason": "a reason"}, {lock_waits.WAITED: True}])
def test_a_delivery_that_was_tried_before_is_marked_as_repeated(meta: dict[str, object]) -> None:
    tables = Applied()
    process([person(1)._replace(meta=meta)], tables)
    assert [i.is_repeated for i in tables.batches[0]] == [True]


@pytest.mark.parametrize("created_at", ["", "yesterday", "2026-13-01T10:00:00Z", "0001-01-01T00:00:00+23:59"])
def test_a_job_that_does_not_say_when_it_came_is_applied_all_the_same(created_at: str) -> None:
    (done,) = process([job(created_at=created_at)], Applied())
    assert isinstance(done, Finished)


# What fails


UNREADABLE: list[tuple[TakenJob, str]] = [
    (job(user_event(data=user(MARK, first_name=MARK))), "the event's data.id is not a Clerk id"),
    (job(data=encode_call(f"{{{MARK}")), "body is not JSON"),
    (
        job(session_event(data=session(ANN, created_at=None))),
        "the session's created_at is not a time, and it has no user",
    ),
]


@pytest.mark.parametrize(("unreadable", "reason"), UNREADABLE)
def test_what_cannot_be_understood_fails_alone_and_for_good(unreadable: TakenJob, reason: str) -> None:
    jobs = [person(1), unreadable, person(2)]
    tables = Applied()
    failed = the_failed(done := process(jobs, tables))
    assert outcomes(done) == {jobs[0].id: "applied", jobs[1].id: "Unreadable", jobs[2].id: "stale"}
    assert tables.calls == [[jobs[0].id, jobs[2].id]]
    assert (failed.reason, failed.retryable) == (f"Unreadable: {reason}", False)
    assert failed.traceback.startswith("Traceback (most recent call last):\n")
    assert failed.traceback.endswith(failed.reason)
    assert MARK not in failed.traceback


@pytest.mark.parametrize("at", [[0], [1], [49], [98], [99], [0, 7, 8, 19, 99]])
@pytest.mark.parametrize("retryable", [True, False])
def test_those_that_are_refused_fail_alone_and_the_others_are_applied(
    at: list[int], *, retryable: bool
) -> None:
    jobs = [person(i) for i in range(100)]
    refused = {jobs[i].id for i in at}
    tables = Applied(ChangeRefused("refused", retryable=retryable), list(refused))
    done = process(jobs, tables)
    failed = [item for item in done if isinstance(item, Failed)]
    assert {item.job.id for item in failed} == refused
    assert {(item.reason, item.retryable) for item in failed} == {("ChangeRefused: refused", retryable)}
    assert sorted(outcomes(done)) == sorted(one.id for one in jobs)
    assert len(tables.calls) <= 2 * 7 * len(at) + 1, "halved each time, not tried one by one"


def test_a_database_that_is_away_is_no_jobs_fault() -> None:
    jobs = [person(i) for i in range(10)]
    tables = Applied(DatabaseUnavailable("no connection"), [jobs[3].id])
    with pytest.raises(DatabaseUnavailable):
        process(jobs, tables)
    assert len(tables.calls) == 1, "it is not halved"


def test_a_fault_of_our_own_fails_alone_is_tried_again_and_quotes_nothing() -> None:
    jobs = [person(i) for i in range(5)]
    tables = Applied(KeyError(f"{MARK}@example.com"), [jobs[2].id])
    failed = the_failed(process(jobs, tables))
    assert failed.job == jobs[2]
    assert failed.retryable is True
    assert failed.reason.startswith("KeyError in apply, line ")
    assert MARK not in failed.reason + failed.traceback


# Against the real database


def test_what_the_database_refuses_fails_alone_with_sqlstate_and_constraint(
    database: Database, connection: psycopg.Connection[Any]
) -> None:
    connection.execute(f"ALTER TABLE users ADD CONSTRAINT no_name CHECK (name <> '{MARK}')")
    jobs = [person(i) for i in range(30)]
    jobs[17] = job(user_event(data=user(BEN, f"{MARK}@example.com", first_name=MARK, last_name=None)))
    done = process(jobs, Tables(database, Policy()))
    failed = the_failed(done)
    assert failed.job == jobs[17]
    assert failed.reason == (
        "ChangeRefused: the database refused the change: CheckViolation (SQLSTATE 23514, constraint no_name)"
    )
    assert failed.retryable is False
    assert MARK not in failed.traceback
    names = connection.execute("SELECT name FROM users").fetchall()
    assert sorted(names) == sorted((f"name {i}",) for i in range(30) if i != 17)
    ids = connection.execute("SELECT svix_id FROM webhook_events").fetchall()
    assert sorted(ids) == sorted((one.id,) for one in jobs if one != jobs[17])

import json
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis import Redis
from rq.job_lifecycle import record_job_failure

from tests.support.failed_jobs import REASON, fail, fail_in_another_worker, forget, raise_personal
from tests.support.payloads import ANN, BEN, NOW, deleted_event, session, session_event, user, user_event
from tests.support.queue import RqView, delivery, enqueue
from tests.support.settings import NO_DATABASE, MakeSettings
from tests.support.together import together
from worker.queue import rq_format
from worker.queue.consumer import Failed, ReservedJobs
from worker.queue.failed_jobs import (
    FailedJobFilter,
    FailedJobs,
    ReplayResult,
    UnknownJob,
    _failed_job,
    _record,
)
from worker.queue.producer import DeliveryQueue, EnqueueResult
from worker.redis_client import QueueUnavailable, fail_fast_redis

MARK = "ann.marked@example.com"
HOUR = timedelta(hours=1)


@pytest.fixture
def failed(redis: Redis) -> FailedJobs:
    return FailedJobs(redis)


def test_a_failed_job_says_what_it_was_and_why_it_failed(failed: FailedJobs, redis: Redis) -> None:
    before = datetime.now(UTC)
    id_ = fail(redis, user_event("user.updated", user(BEN)))
    [job] = failed.newest()
    assert job[:5] == (id_, "user.updated", BEN, REASON, 1)
    assert job.first_failed_at == job.failed_at
    assert job.failed_at is not None
    assert before <= datetime.fromisoformat(job.failed_at) <= datetime.now(UTC)


def test_attempts_are_counted_on_through_replays_and_the_first_failure_is_kept(
    failed: FailedJobs, redis: Redis
) -> None:
    fail(redis, times=3)
    [job] = failed.newest()
    assert job.attempts == 3
    assert job.first_failed_at is not None
    assert job.failed_at is not None
    assert job.first_failed_at < job.failed_at


def test_the_newest_failure_comes_first(failed: FailedJobs, redis: Redis) -> None:
    ids = [fail(redis) for _ in range(5)]
    for seconds, id_ in enumerate(ids):  # the registry counts in whole seconds
        redis.zincrby(rq_format.FAILED_KEY, seconds, id_)
    assert [job.id for job in failed.newest()] == ids[::-1]
    assert [job.id for job in failed.newest(limit=2)] == ids[:2:-1]
    assert failed.ids() == ids
    assert failed.count() == 5


def test_jobs_are_found_by_type_user_and_time(failed: FailedJobs, redis: Redis) -> None:
    saved = fail(redis, user_event("user.created", user(ANN)))
    gone = fail(redis, deleted_event(ANN))
    other = fail(redis, user_event("user.created", user(BEN)))
    now = datetime.now(UTC)
    assert set(failed.ids(FailedJobFilter(type="user.created"))) == {saved, other}
    assert set(failed.ids(FailedJobFilter(clerk_id=ANN))) == {saved, gone}
    assert failed.ids(FailedJobFilter("user.created", BEN)) == [other]
    assert set(failed.ids(FailedJobFilter(since=now - HOUR))) == {saved, gone, other}
    assert failed.ids(FailedJobFilter(since=now + HOUR)) == []
    assert failed.ids(FailedJobFilter(until=now - HOUR)) == []
    assert [job.id for job in failed.newest(FailedJobFilter(type="user.deleted"), limit=1)] == [gone]


def test_a_job_whose_subject_is_unknown_is_listed_all_the_same(
    failed: FailedJobs, redis: Redis, queue: DeliveryQueue
) -> None:
    queue.enqueue(delivery()._replace(svix_id="msg_1", description="unreadable"))
    reserved = ReservedJobs(redis, "w")
    jobs = reserved.settle_and_take([], 1) or []
    reserved.settle_and_take([Failed(jobs[0], REASON, REASON, retryable=False)], 0)
    [job] = failed.newest()
    assert job[:4] == ("msg_1", None, None, REASON)


def test_many_pages_are_walked_without_a_gap(failed: FailedJobs, redis: Redis) -> None:
    with redis.pipeline() as pipeline:
        for i in range(1234):
            fields = rq_format.own_fields("{}", f"user.created {ANN}", NOW)
            pipeline.hset(f"rq:job:msg_{i}", items=[*fields, "status", "failed"])
            pipeline.zadd(rq_format.FAILED_KEY, {f"msg_{i}": 4_000_000_000 + i})
        pipeline.execute()
    assert [job.id for job in failed.newest()] == [f"msg_{i}" for i in reversed(range(1234))]
    fates = Counter(fate for _, fate in failed.replay(failed.ids()))
    assert fates == {ReplayResult.REPLAYED: 1234}
    assert failed.count() == 0


def test_a_replayed_job_is_queued_with_all_its_retries_and_never_expires(
    failed: FailedJobs, redis: Redis, rq: RqView
) -> None:
    id_ = fail(redis)
    redis.hset(f"rq:job:{id_}", "retries_left", 0)
    assert list(failed.replay([id_])) == [(id_, ReplayResult.REPLAYED)]
    job = rq.job(id_)
    assert (rq.places(id_), rq.status(id_)) == (["queue"], "queued")
    assert (job.retries_left, job.retry_intervals) == (3, [10, 60, 300])
    assert (job.started_at, job.ended_at) == (None, None)
    assert redis.ttl(f"rq:job:{id_}") == -1
    taken = ReservedJobs(redis, "w").settle_and_take([], 10)
    assert taken is not None
    assert [(job.id, job.retries_left) for job in taken] == [(id_, 3)]


def test_a_queue_that_rq_has_forgotten_is_known_again(failed: FailedJobs, redis: Redis, rq: RqView) -> None:
    id_ = fail(redis)
    redis.delete(rq_format.QUEUES_KEY)
    list(failed.replay([id_]))
    assert [queue.name for queue in type(rq.queue).all(connection=redis, serializer="json")] == ["clerk"]


def test_a_replay_says_what_became_of_each_job(failed: FailedJobs, redis: Redis, rq: RqView) -> None:
    good, expired, again = fail(redis), fail(redis), fail(redis)
    forget(redis, expired)
    list(failed.replay([again]))
    assert [job.id for job in failed.newest()] == [good], "what has expired is not listed"
    waiting = enqueue(redis)
    assert list(failed.replay([good, expired, again, waiting, "msg_never"])) == [
        (good, ReplayResult.REPLAYED),
        (expired, ReplayResult.GONE),
        (again, ReplayResult.NOT_FAILED),
        (waiting, ReplayResult.NOT_FAILED),
        ("msg_never", ReplayResult.GONE),
    ]
    assert failed.count() == 0, "the entry of what has expired is dropped"
    assert rq.queue.get_job_ids() == [again, waiting, good]


def test_a_job_that_rq_requeue_lost_halfway_is_put_back(failed: FailedJobs, redis: Redis, rq: RqView) -> None:
    id_ = fail(redis)
    redis.zrem(rq_format.FAILED_KEY, id_)  # the first of its two steps; then it was killed
    assert rq.places(id_) == []
    assert list(failed.replay([id_])) == [(id_, ReplayResult.REPLAYED)]
    assert rq.places(id_) == ["queue"]


def test_two_that_replay_the_same_queue_it_once(redis: Redis, rq: RqView) -> None:
    ids = [fail(redis) for _ in range(60)]
    fates: Counter[ReplayResult] = Counter()

    def replay() -> None:
        fates.update(fate for _, fate in FailedJobs(redis).replay(ids))

    together([replay] * 4)
    assert fates[ReplayResult.REPLAYED] == len(ids)
    assert sorted(rq.queue.get_job_ids()) == sorted(ids)


def test_discarding_a_failed_job_leaves_nothing_and_the_delivery_can_come_anew(
    failed: FailedJobs, redis: Redis, rq: RqView, queue: DeliveryQueue
) -> None:
    given = delivery()
    fail(redis, id_=given.svix_id)
    kept, queued = fail(redis), enqueue(redis)
    assert list(failed.discard([given.svix_id, "msg_never", queued])) == [
        (given.svix_id, ReplayResult.DISCARDED),
        ("msg_never", ReplayResult.GONE),
        (queued, ReplayResult.NOT_FAILED),
    ]
    assert rq.places(queued) == ["queue"]
    assert not list(redis.scan_iter(f"*{given.svix_id}*"))
    assert failed.ids() == [kept]
    assert queue.enqueue(given) is EnqueueResult.QUEUED


def test_a_job_is_shown_with_its_traceback_and_body(failed: FailedJobs, redis: Redis) -> None:
    event = session_event(data=session(ANN))
    details = failed.show(fail(redis, event))
    assert details.job.reason == REASON
    assert details.traceback.startswith("Traceback")
    assert details.traceback.endswith(REASON)
    assert details.body is not None
    assert json.loads(details.body) == event


@pytest.mark.parametrize("state", ["queued", "never there", "expired"])
def test_what_has_not_failed_cannot_be_shown(
    failed: FailedJobs, redis: Redis, queue: DeliveryQueue, state: str
) -> None:
    id_ = "msg_1"
    if state == "queued":
        queue.enqueue(delivery(id_=id_))
    elif state == "expired":
        forget(redis, fail(redis, id_=id_))
    with pytest.raises(UnknownJob, match="no failed job msg_1"):
        failed.show(id_)


def test_what_another_worker_raised_is_reported_by_its_class_alone(failed: FailedJobs, redis: Redis) -> None:
    id_ = fail_in_another_worker(redis, raise_personal, MARK)
    [job] = failed.newest()
    details = failed.show(id_)
    assert job.reason.startswith("LookupError: ")
    assert (job.type, job.clerk_id, job.attempts) == (None, None, 2)
    assert job.failed_at is not None
    assert abs(datetime.now(UTC) - datetime.fromisoformat(job.failed_at)) < timedelta(minutes=1)
    assert "in raise_personal" in details.traceback
    assert details.traceback.endswith("LookupError")
    assert MARK not in repr((job, details.traceback))
    assert MARK in details.raw_traceback
    assert details.body is None


def test_a_reason_of_ours_is_not_shown_for_a_later_failure_elsewhere(
    failed: FailedJobs, redis: Redis, rq: RqView
) -> None:
    id_ = fail(redis)
    job = rq.job(id_)
    raised = f'Traceback (most recent call last):\n  File "x.py", line 2, in f\n    g()\nap.Boom: {MARK}\n'
    with redis.pipeline() as pipeline:
        record_job_failure(job, raised, pipeline)  # what RQ does to a job that it gives up
        pipeline.execute()
    [shown] = failed.newest()
    assert shown.reason.startswith("Boom: failed by another RQ worker")
    assert shown.attempts >= 2
    assert MARK not in repr(failed.show(id_)[:2])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "unknown error"),
        (f"{MARK}", "unknown error"),
        ("Moved to FailedJobRegistry, due to AbandonedJobError, at 2026-01-01", "AbandonedJobError"),
        ("Work-horse terminated unexpectedly; waitpid returned 9", "unknown error"),
        ('Traceback\n  File "a", line 1, in b\n    c\n    ^\nx.y.Zed: no\nAnn: me', "Zed"),
        ('Traceback\n  File "a", line 1, in b\n' + MARK, "unknown error"),
    ],
)
def test_the_class_is_taken_from_where_python_writes_it(text: str, expected: str) -> None:
    _, packed = rq_format.encode_exception(text)
    results = [(b"%d-0" % NOW, {b"exc_string": packed.encode()})]
    record = _record("msg_1", [b"data", None, None, None, None], results)
    assert record is not None
    job = _failed_job(record)
    assert job.reason == f"{expected}: failed by another RQ worker, whose message is not shown"
    assert job.failed_at == "2026-01-01T10:00:00.000000Z"


anything = st.binary(max_size=60) | st.sampled_from(
    [b"[]", b"{}", b"[[[1]]]", b'{"reason": 1, "attempts": "x"}']
)


@given(
    st.lists(st.none() | anything, min_size=4, max_size=4),
    st.just([])
    | st.builds(lambda at, text: [(b"%d-0" % at, {b"exc_string": text})], st.integers(0, 2**64), anything),
)
def test_whatever_is_in_redis_is_listed_without_an_error(
    fields: list[bytes | None], results: list[tuple[bytes, dict[bytes, bytes]]]
) -> None:
    record = _record("msg_1", [b"data", *fields], results)
    assert record is not None
    job = _failed_job(record)
    assert job.attempts >= 1
    json.dumps(job._asdict())


@pytest.mark.parametrize(
    "ask",
    [
        lambda jobs: jobs.count(),
        lambda jobs: list(jobs.newest()),
        lambda jobs: jobs.ids(),
        lambda jobs: jobs.show("msg_1"),
        lambda jobs: list(jobs.replay(["msg_1"])),
        lambda jobs: list(jobs.discard(["msg_1"])),
    ],
    ids=["count", "newest", "ids", "show", "replay", "discard"],
)
def test_without_redis_every_question_is_one_line(
    make_settings: MakeSettings, ask: Callable[[FailedJobs], object]
) -> None:
    settings = make_settings(redis_url="redis://:secret@127.0.0.1:1/0", **NO_DATABASE)
    jobs = FailedJobs(fail_fast_redis(settings))
    with pytest.raises(QueueUnavailable, match="nothing listens") as caught:
        ask(jobs)
    assert "secret" not in str(caught.value)

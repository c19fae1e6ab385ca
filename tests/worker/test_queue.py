import gc
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from pydantic import SecretStr
from redis import Redis
from redis.exceptions import ReadOnlyError
from rq.job import Job
from rq.worker import SimpleWorker

import config
from cli.dev.servers import RedisServer, free_port
from tests.support.payloads import NOW
from tests.support.queue import RqView, delivery, frozen
from tests.support.reserved_jobs import fail_for_good, failure, settle, take
from tests.support.round_trips import TripCounter
from tests.support.settings import NO_DATABASE, MakeSettings
from tests.support.together import together
from tests.support.waiting import wait_until, within
from worker.auto_pipeline import Asked
from worker.monitoring import receivers
from worker.queue import rq_format
from worker.queue.consumer import ReservedJobs
from worker.queue.producer import (
    LAST_RECEIVED_KEY,
    Delivery,
    DeliveryQueue,
    EnqueueResult,
    delivery_queue,
)
from worker.queue.rq_format import RETRY_INTERVALS_S
from worker.redis_client import (
    OTHER_CONNECTIONS,
    QueueUnavailable,
    fail_fast_redis,
    heartbeat_redis,
    worker_redis,
)

# of a receiver's process, for deliveries and for the probe
CONNECTIONS = config.Settings.model_fields["redis_max_connections"].default - OTHER_CONNECTIONS


@pytest.mark.usefixtures("patient_receiver")
def test_eight_receivers_with_one_delivery_queue_it_once(make_settings: MakeSettings, rq: RqView) -> None:
    given = [delivery() for _ in range(10)]
    receivers = [delivery_queue(make_settings(**NO_DATABASE)) for _ in range(8)]
    start = threading.Barrier(8)

    def receive(receiver: DeliveryQueue) -> list[EnqueueResult]:
        start.wait(30)
        return [receiver.enqueue(one) for one in given]

    with ThreadPoolExecutor(8) as threads:
        answers = Counter(answer for answers in threads.map(receive, receivers) for answer in answers)
    for receiver in receivers:
        receiver.close()
    assert answers == {EnqueueResult.QUEUED: 10, EnqueueResult.DUPLICATE: 70}
    assert Counter(rq.queue.get_job_ids()) == dict.fromkeys((one.svix_id for one in given), 1)


@pytest.mark.parametrize("status", ["queued", "started", "scheduled", "finished", "deferred"])
def test_a_delivery_whose_job_lives_is_a_duplicate(status: str, queue: DeliveryQueue, rq: RqView) -> None:
    queue.enqueue(given := delivery())
    rq.redis.hset(Job.key_for(given.svix_id), "status", status)
    before = rq.fields(given.svix_id)
    assert queue.enqueue(given) == EnqueueResult.DUPLICATE
    assert rq.fields(given.svix_id) == before


def test_a_delivery_whose_job_failed_is_queued_anew_with_full_retries(
    queue: DeliveryQueue, rq: RqView, reserved: ReservedJobs
) -> None:
    queue.enqueue(given := delivery())
    (job,) = take(reserved)
    settle(reserved, failure(job._replace(retries_left=0), retryable=True))
    rq.redis.hset(Job.key_for(given.svix_id), "retries_left", 0)
    assert rq.places(given.svix_id) == ["failed"]

    assert queue.enqueue(given) == EnqueueResult.REQUEUED
    assert rq.places(given.svix_id) == ["queue"]
    again = rq.job(given.svix_id)
    assert (again.get_status(), again.retries_left) == ("queued", len(RETRY_INTERVALS_S))
    assert (again.started_at, again.ended_at, again.worker_name, again._exc_info) == (None, None, None, None)
    assert rq.redis.ttl(Job.key_for(given.svix_id)) == -1, "it does not expire while it waits"
    assert queue.enqueue(given) == EnqueueResult.DUPLICATE


def test_what_failed_before_is_remembered_when_it_is_queued_anew(
    queue: DeliveryQueue, rq: RqView, reserved: ReservedJobs
) -> None:
    failed = fail_for_good(reserved)
    first = rq.job(failed).meta["first_failed_at"]
    queue.enqueue(delivery(id_=failed))
    (job,) = take(reserved)
    settle(reserved, failure(job))
    assert rq.job(failed).meta["attempts"] == 2
    assert rq.job(failed).meta["first_failed_at"] == first


@pytest.mark.usefixtures("patient_receiver")
def test_eight_receivers_queue_a_failed_delivery_anew_once(
    make_settings: MakeSettings, rq: RqView, reserved: ReservedJobs
) -> None:
    failed = fail_for_good(reserved)
    receivers = [delivery_queue(make_settings(**NO_DATABASE)) for _ in range(8)]
    with ThreadPoolExecutor(8) as threads:
        answers = Counter(threads.map(lambda receiver: receiver.enqueue(delivery(id_=failed)), receivers))
    for receiver in receivers:
        receiver.close()
    assert answers == {EnqueueResult.REQUEUED: 1, EnqueueResult.DUPLICATE: 7}
    assert rq.places(failed) == ["queue"]


def cancel(rq: RqView, id_: str) -> None:
    rq.job(id_).cancel()
    assert rq.places(id_) == ["canceled"]


def stop(rq: RqView, id_: str) -> None:
    """Do what RQ's worker does with a job that `stop-job` stops."""
    worker = SimpleWorker([rq.queue], connection=rq.redis, serializer="json", prepare_for_work=False)
    worker._stopped_job_id = id_
    rq.redis.lpop(rq.queue.key)
    worker.handle_job_failure(rq.job(id_), rq.queue)
    assert (rq.status(id_), rq.places(id_)) == ("stopped", ["failed"])


@pytest.mark.parametrize("end", [cancel, stop])
def test_a_delivery_whose_job_was_canceled_or_stopped_is_queued_anew(
    end: Callable[[RqView, str], None], queue: DeliveryQueue, rq: RqView
) -> None:
    queue.enqueue(given := delivery())
    end(rq, given.svix_id)
    assert queue.enqueue(given) == EnqueueResult.REQUEUED
    assert (rq.status(given.svix_id), rq.places(given.svix_id)) == ("queued", ["queue"])


def test_a_job_that_rq_deleted_is_new_again(queue: DeliveryQueue, rq: RqView) -> None:
    queue.enqueue(given := delivery())
    rq.job(given.svix_id).delete()
    assert queue.enqueue(given) == EnqueueResult.QUEUED
    assert rq.places(given.svix_id) == ["queue"]


def test_when_the_last_delivery_came_is_known(queue: DeliveryQueue, redis: Redis) -> None:
    queue.enqueue(given := delivery(received_at=NOW))
    queue.enqueue(given._replace(received_at=NOW + 5))
    assert redis.get(LAST_RECEIVED_KEY) == str(NOW + 5).encode()


def test_a_delivery_is_one_round_trip(make_settings: MakeSettings, redis_url: str) -> None:
    with TripCounter(redis_url) as counter:
        receiver = delivery_queue(make_settings(**NO_DATABASE, redis_url=SecretStr(counter.url)))
        receiver.enqueue(again := delivery())
        for given in (delivery(), again):
            with counter.counting() as trips:
                receiver.enqueue(given)
            assert trips.count == 1
        receiver.close()


@pytest.fixture
def own_settings(make_settings: MakeSettings, own_redis: RedisServer) -> config.Settings:
    return make_settings(**NO_DATABASE, redis_url=SecretStr(own_redis.url))


@pytest.fixture
def receiver(own_settings: config.Settings) -> Iterator[DeliveryQueue]:
    """The receiver's side of the queue in a Redis that the test may stop, fill and damage."""
    made = delivery_queue(own_settings)
    yield made
    made.close()


def test_a_redis_that_is_away_is_said_at_once_and_without_its_address(make_settings: MakeSettings) -> None:
    port = free_port()
    receiver = delivery_queue(
        make_settings(**NO_DATABASE, redis_url=SecretStr(f"redis://:hunter2@127.0.0.1:{port}"))
    )
    with within(5), pytest.raises(QueueUnavailable) as refused:
        receiver.enqueue(delivery())
    assert str(refused.value) == "nothing listens where REDIS_URL leads: start Redis, or correct REDIS_URL"


def test_a_full_redis_takes_nothing_and_says_so(receiver: DeliveryQueue, own_redis: RedisServer) -> None:
    receiver.enqueue(first := delivery())
    with Redis.from_url(own_redis.url) as watching:
        watching.config_set("maxmemory", 1)
        for ask in (lambda: receiver.enqueue(delivery()), receiver.ping):
            with pytest.raises(QueueUnavailable, match=r"^Redis is out of memory: "):
                ask()
        assert watching.lrange(rq_format.QUEUE_KEY, 0, -1) == [first.svix_id.encode()]


@pytest.mark.usefixtures("patient_receiver")
def test_a_receiver_opens_few_connections_and_the_others_wait_their_turn(
    receiver: DeliveryQueue, own_redis: RedisServer
) -> None:
    with ThreadPoolExecutor(100) as threads, Redis.from_url(own_redis.url) as watching:
        watching.client_pause(500)
        given = [delivery() for _ in range(100)]
        assert list(threads.map(receiver.enqueue, given)) == [EnqueueResult.QUEUED] * 100
        assert len(watching.client_list()) <= CONNECTIONS + 1  # its own
        assert sorted(watching.lrange(rq_format.QUEUE_KEY, 0, -1)) == sorted(
            one.svix_id.encode() for one in given
        )


def test_a_connection_that_redis_has_closed_costs_no_delivery(
    receiver: DeliveryQueue, own_redis: RedisServer
) -> None:
    with Redis.from_url(own_redis.url) as watching:
        for _ in range(3):
            assert receiver.enqueue(delivery()) == EnqueueResult.QUEUED
            assert watching.client_kill_filter(_type="normal", skipme=True) == 1


def test_a_redis_that_has_become_a_replica_is_left(receiver: DeliveryQueue, own_redis: RedisServer) -> None:
    receiver.enqueue(delivery())
    with Redis.from_url(own_redis.url) as watching:
        watching.replicaof("127.0.0.1", free_port())
        with pytest.raises(QueueUnavailable, match="read-only replica"):
            receiver.enqueue(delivery())
        wait_until(lambda: len(watching.client_list(_type="normal")) == 1, 20)  # its own
        watching.replicaof("NO", "ONE")
        assert receiver.enqueue(delivery()) == EnqueueResult.QUEUED


@pytest.mark.parametrize("client", [heartbeat_redis, fail_fast_redis, worker_redis])
def test_a_heartbeat_leaves_a_redis_that_has_become_a_replica(
    client: Callable[[config.Settings], Redis], own_settings: config.Settings, own_redis: RedisServer
) -> None:
    redis = client(own_settings)
    receivers.beat(redis, "receiver")
    with Redis.from_url(own_redis.url) as watching:
        watching.replicaof("127.0.0.1", free_port())
        with pytest.raises(ReadOnlyError):
            receivers.beat(redis, "receiver")
        wait_until(lambda: len(watching.client_list(_type="normal")) == 1, 2)  # its own
        watching.replicaof("NO", "ONE")
        receivers.beat(redis, "receiver")
    redis.close()


def test_what_stands_in_the_url_does_not_change_how_long_it_waits_nor_what_it_reads(
    make_settings: MakeSettings, own_redis: RedisServer
) -> None:
    url = f"{own_redis.url}?socket_timeout=30&socket_connect_timeout=30&decode_responses=true&encoding=bogus"
    settings = make_settings(**NO_DATABASE, redis_url=SecretStr(f"{url}&max_connections=2"))
    receiver, client = delivery_queue(settings), worker_redis(settings)
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: receiver.enqueue(delivery()), range(8)))
    assert answers == [EnqueueResult.QUEUED] * 8
    assert len(take(ReservedJobs(client, "w"))) == 8
    with frozen(own_redis):
        late = r"did not answer in time|connecting to Redis timed out"
        with within(5), pytest.raises(QueueUnavailable, match=late):
            receiver.enqueue(delivery())
    receiver.close()
    client.close()


def test_trouble_uses_up_no_connection(receiver: DeliveryQueue, own_redis: RedisServer) -> None:
    receiver.enqueue(delivery())
    own_redis.stop()
    for _ in range(2 * CONNECTIONS):
        with pytest.raises(QueueUnavailable, match=r"nothing listens|closed the connection"):
            receiver.enqueue(delivery())
    own_redis.start()
    assert receiver.enqueue(delivery()) == EnqueueResult.QUEUED


def test_behind_a_redis_that_hangs_all_are_answered_in_time(
    receiver: DeliveryQueue, own_redis: RedisServer
) -> None:
    given = [delivery() for _ in range(10)]

    def reason(one: Delivery) -> str:
        with pytest.raises(QueueUnavailable) as refused:
            receiver.enqueue(one)
        return str(refused.value)

    with frozen(own_redis), ThreadPoolExecutor(len(given)) as threads:
        with within(5):
            reasons = set(threads.map(reason, given))
        with within(5), pytest.raises(QueueUnavailable):
            receiver.ping()
    assert reasons <= {
        "all connections to Redis are in use here: raise REDIS_MAX_CONNECTIONS",
        "Redis did not answer in time: see what keeps it busy (SLOWLOG), or whether it hangs",
    }
    assert {receiver.enqueue(one) for one in given} <= {EnqueueResult.QUEUED, EnqueueResult.DUPLICATE}


def test_while_the_name_of_redis_is_looked_up_for_long_all_are_answered_in_time(
    make_settings: MakeSettings, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look-up has no time-out, and each address that it finds has one of its own."""
    found, look_up = threading.Event(), socket.getaddrinfo

    def look_up_late(*arguments: Any, **options: Any) -> Any:
        found.wait(20)
        return look_up(*arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up_late)
    receiver = delivery_queue(make_settings(**NO_DATABASE, redis_url=SecretStr(redis_url)))

    def answer_s(_: int) -> float:
        began = time.monotonic()
        with pytest.raises(QueueUnavailable, match=r"connecting to Redis timed out|are in use here"):
            receiver.enqueue(delivery())
        return time.monotonic() - began

    with ThreadPoolExecutor(10) as threads:
        assert max(threads.map(answer_s, range(10))) < 5
    found.set()
    wait_until(lambda: receiver.enqueue(delivery()) == EnqueueResult.QUEUED, 20)
    receiver.close()


@pytest.mark.usefixtures("patient_receiver")
def test_what_comes_while_another_is_under_way_goes_out_together(
    make_settings: MakeSettings, redis_url: str
) -> None:
    with TripCounter(redis_url) as counter, ThreadPoolExecutor(50) as threads:
        receiver = delivery_queue(make_settings(**NO_DATABASE, redis_url=SecretStr(counter.url)))
        list(threads.map(lambda _: receiver.enqueue(delivery()), range(50)))
        with counter.counting() as trips, Redis.from_url(redis_url) as other:
            other.client_pause(1500)
            answers = list(threads.map(lambda _: receiver.enqueue(delivery()), range(50)))
        assert answers == [EnqueueResult.QUEUED] * 50
        assert trips.count <= 2 * CONNECTIONS
        receiver.close()


@pytest.mark.usefixtures("patient_receiver")
def test_each_of_those_that_go_out_together_gets_its_own_answer(
    receiver: DeliveryQueue, own_redis: RedisServer
) -> None:
    """Some are new, some known, some refused, and one cannot be sent at all."""
    known = [delivery() for _ in range(10)]
    for one in known:
        receiver.enqueue(one)
    with Redis.from_url(own_redis.url) as other:
        for one in known[5:]:
            other.delete(one_key := rq_format.JOB_PREFIX + one.svix_id)
            other.set(one_key, "no hash")
        odd = delivery()._replace(description="\ud800")
        both = [each for pair in zip(known, [delivery() for _ in known], strict=True) for each in pair]

        def answer(one: Delivery) -> object:
            try:
                return receiver.enqueue(one)
            except (QueueUnavailable, UnicodeEncodeError) as error:
                return type(error)

        with ThreadPoolExecutor(len(both) + 1) as threads:
            other.client_pause(300)
            answers = list(threads.map(answer, [*both, odd]))
    assert answers[0:10:2] == [EnqueueResult.DUPLICATE] * 5
    assert answers[10:20:2] == [QueueUnavailable] * 5
    assert answers[1:20:2] == [EnqueueResult.QUEUED] * 10
    assert answers[20] is UnicodeEncodeError


def test_a_delivery_that_is_refused_leaves_its_body_to_no_collector(
    receiver: DeliveryQueue, own_redis: RedisServer
) -> None:
    """An error that kept its frames would keep their bodies too, until garbage is looked for."""
    gc.collect()
    gc.disable()
    try:
        with Redis.from_url(own_redis.url) as watching:
            watching.config_set("maxmemory", 1)
            together([lambda: refused(receiver)] * 4)
        assert not [each for each in gc.get_objects() if type(each) is Asked]
    finally:
        gc.enable()


def refused(receiver: DeliveryQueue) -> None:
    with pytest.raises(QueueUnavailable):
        receiver.enqueue(delivery())

"""A queue that is too long. How fast the receiver is meanwhile is measured by `make faults`."""

import http.client
import time

from cli.dev.servers import HOST
from cli.samples import signed_headers
from tests.faults.conftest import MAX_QUEUE_DEPTH
from tests.faults.house import House, what_is_left
from tests.faults.svix import KEY, PATH
from tests.support.payloads import body, svix_id, user_event
from tests.support.waiting import wait_until
from worker.queue.rq_format import QUEUE_KEY, SUSPENDED_KEY
from worker.redis_client import FAIL_FAST_TIMEOUT_S

DRAINED_WITHIN_S = 40


def test_a_queue_that_is_too_long_is_answered_503_with_retry_after_and_duplicates_as_ever(
    house: House,
) -> None:
    known = svix_id()
    assert deliver(house, known).status == 202
    wait_until(lambda: what_is_left(house.redis) == {}, DRAINED_WITHIN_S)
    house.redis.set(SUSPENDED_KEY, 1)
    house.redis.rpush(QUEUE_KEY, *(f"gone-{number}" for number in range(MAX_QUEUE_DEPTH + 10)))
    answer = deliver(house, svix_id())
    assert (answer.status, answer.getheader("Retry-After")) == (503, "5")
    assert deliver(house, known).status == 200
    house.redis.delete(SUSPENDED_KEY)
    wait_until(lambda: deliver(house, svix_id()).status == 202, DRAINED_WITHIN_S)


def test_ids_without_a_job_are_dropped_and_keep_nobody_waiting_for_redis(house: House) -> None:
    house.redis.rpush(QUEUE_KEY, *(f"gone-{number}" for number in range(100_000)))
    slowest = 0.0
    while house.redis.llen(QUEUE_KEY):
        began = time.monotonic()
        house.redis.ping()
        slowest = max(slowest, time.monotonic() - began)
    assert slowest < FAIL_FAST_TIMEOUT_S
    assert deliver(house, svix_id()).status == 202


def deliver(house: House, id_: str) -> http.client.HTTPResponse:
    """Send one genuine delivery and return the answer's head."""
    content = body(user_event())
    connection = http.client.HTTPConnection(HOST, house.ports[0], timeout=10)
    try:
        connection.request("POST", PATH, content, signed_headers(KEY, id_, int(time.time()), content))
        return connection.getresponse()
    finally:
        connection.close()

"""A queue that is too long. `make faults` measures the receiver meanwhile."""

from typing import Any

import httpx

from tests.faults.conftest import MAX_QUEUE_DEPTH
from tests.faults.service import Service, what_is_left
from tests.support import http
from tests.support.deliveries import PATH, genuine, signed
from tests.support.payloads import svix_id
from tests.support.waiting import wait_until
from worker.queue.rq_format import QUEUE_KEY, SUSPENDED_KEY
from worker.redis_client import FAIL_FAST_TIMEOUT_S

DRAINED_WITHIN_S = 40


def test_a_queue_that_is_too_long_is_answered_503_with_retry_after_and_duplicates_as_ever(
    service: Service,
) -> None:
    known = svix_id()
    assert deliver(service, known).status_code == 202
    wait_until(lambda: what_is_left(service.redis) == {}, DRAINED_WITHIN_S)
    service.redis.set(SUSPENDED_KEY, 1)
    service.redis.rpush(QUEUE_KEY, *(f"gone-{number}" for number in range(MAX_QUEUE_DEPTH + 10)))
    answer = deliver(service, svix_id())
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    assert deliver(service, known).status_code == 200
    service.redis.delete(SUSPENDED_KEY)
    wait_until(lambda: deliver(service, svix_id()).status_code == 202, DRAINED_WITHIN_S)


def test_ids_without_a_job_are_dropped_and_keep_redis_free(service: Service) -> None:
    service.redis.config_set("slowlog-log-slower-than", 50_000)  # µs
    service.redis.slowlog_reset()
    service.redis.rpush(QUEUE_KEY, *(f"gone-{number}" for number in range(100_000)))
    wait_until(lambda: not service.redis.llen(QUEUE_KEY), DRAINED_WITHIN_S)
    slow: Any = service.redis.slowlog_get()
    assert max((command["duration"] for command in slow), default=0) < FAIL_FAST_TIMEOUT_S * 1_000_000
    assert deliver(service, svix_id()).status_code == 202


def deliver(service: Service, id_: str) -> httpx.Response:
    content = genuine()
    return http.post(service.url(PATH), content=content, headers=signed(content, id_=id_), timeout=10)

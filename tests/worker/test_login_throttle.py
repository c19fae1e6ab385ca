from concurrent.futures import ThreadPoolExecutor

import pytest
from redis import Redis

from tests.support.settings import NO_DATABASE, MakeSettings
from worker.monitoring.login_throttle import KEY_PREFIX, LIMIT, WINDOW_S, LoginThrottle


@pytest.fixture
def attempts(make_settings: MakeSettings) -> LoginThrottle:
    return LoginThrottle(make_settings(**NO_DATABASE))


@pytest.mark.parametrize(
    ("one", "other", "are_the_same"),
    [
        ("192.0.2.1", "192.0.2.1", True),
        ("192.0.2.1", "192.0.2.2", False),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
        (None, "not an address", True),
    ],
)
def test_attempts_count_by_address_and_ipv6_by_network(
    attempts: LoginThrottle, one: str | None, other: str, are_the_same: bool
) -> None:
    for _ in range(LIMIT):
        assert attempts.may_try(one)
    assert not attempts.may_try(one)
    assert attempts.may_try(other) is not are_the_same


def test_attempts_are_forgotten_after_a_while(attempts: LoginThrottle, redis: Redis) -> None:
    for _ in range(3):
        attempts.may_try("192.0.2.1")
    [key] = redis.scan_iter(f"{KEY_PREFIX}*")
    assert 0 < int(redis.ttl(key)) <= WINDOW_S


def test_right_passwords_are_not_counted(attempts: LoginThrottle, make_settings: MakeSettings) -> None:
    for _ in range(3 * LIMIT):
        assert attempts.may_try("192.0.2.1")
        attempts.succeeded("192.0.2.1")
    other_process = LoginThrottle(make_settings(**NO_DATABASE))
    assert [other_process.may_try("192.0.2.1") for _ in range(LIMIT + 1)] == [True] * LIMIT + [False]


def test_right_passwords_that_are_refused_do_not_lock_the_address(attempts: LoginThrottle) -> None:
    allowed = [attempts.may_try("192.0.2.1") for _ in range(3 * LIMIT)].count(True)
    for _ in range(allowed):
        attempts.succeeded("192.0.2.1")
    assert attempts.may_try("192.0.2.1")


def test_an_attempt_that_is_taken_back_after_the_window_leaves_nothing(
    attempts: LoginThrottle, redis: Redis
) -> None:
    attempts.may_try("192.0.2.1")
    redis.flushdb()
    attempts.succeeded("192.0.2.1")
    assert redis.dbsize() == 0


def test_of_many_guesses_at_once_only_as_many_as_allowed_are_compared(make_settings: MakeSettings) -> None:
    processes = [LoginThrottle(make_settings(**NO_DATABASE)) for _ in range(2)]
    with ThreadPoolExecutor(30) as pool:
        tried = list(pool.map(lambda i: processes[i % 2].may_try("192.0.2.1"), range(300)))
    assert tried.count(True) == LIMIT

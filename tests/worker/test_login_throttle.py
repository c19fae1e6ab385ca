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
        assert not attempts.too_many(one)
        attempts.failed(one)
    assert attempts.too_many(one)
    assert attempts.too_many(other) is are_the_same


def test_attempts_are_forgotten_after_a_while(attempts: LoginThrottle, redis: Redis) -> None:
    for _ in range(3):
        attempts.failed("192.0.2.1")
    [key] = redis.scan_iter(f"{KEY_PREFIX}*")
    assert 0 < int(redis.ttl(key)) <= WINDOW_S

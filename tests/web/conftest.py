"""The application with a real Redis behind it, and no database: deliveries never need one."""

from collections.abc import Callable, Iterator

import pytest
from flask.testing import FlaskClient
from redis import Redis

from tests.conftest import MakeSettings
from tests.jobs import RqView
from web.app import create_app

NO_DATABASE = "postgresql://nobody@127.0.0.1:1/none"

MakeClient = Callable[..., FlaskClient]


@pytest.fixture
def make_client(make_settings: MakeSettings) -> MakeClient:
    """Make a client of an application; keywords replace its settings."""

    def make(**overrides: object) -> FlaskClient:
        settings = make_settings(database_url=NO_DATABASE, database_url_unpooled=NO_DATABASE, **overrides)
        return create_app(settings).test_client()

    return make


@pytest.fixture
def client(make_client: MakeClient) -> FlaskClient:
    """A client of an application with the usual settings."""
    return make_client()


@pytest.fixture
def redis(redis_url: str) -> Iterator[Redis]:
    """The test's Redis."""
    with Redis.from_url(redis_url) as connection:
        yield connection


@pytest.fixture
def rq(redis: Redis) -> RqView:
    """What RQ sees on the queue."""
    return RqView(redis)

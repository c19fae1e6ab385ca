"""The application with a real Redis behind it, and no database: deliveries never need one."""

import pytest
from flask.testing import FlaskClient

from tests.support.deliveries import MakeClient
from tests.support.settings import UNREACHABLE_DATABASE_URL, MakeSettings
from web.app import create_app


@pytest.fixture
def make_client(make_settings: MakeSettings) -> MakeClient:
    """Make a client of an application; keywords replace its settings."""

    def make(**overrides: object) -> FlaskClient:
        nowhere = UNREACHABLE_DATABASE_URL
        settings = make_settings(database_url=nowhere, database_url_unpooled=nowhere, **overrides)
        return create_app(settings).test_client()

    return make


@pytest.fixture
def client(make_client: MakeClient) -> FlaskClient:
    """A client of an application with the usual settings."""
    return make_client()

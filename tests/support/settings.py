"""Settings for a test, and what they name that is not there."""

from collections.abc import Callable
from typing import Any, NamedTuple

import config

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
MakeSettings = Callable[..., config.Settings]
NO_DATABASE: dict[str, Any] = {"database_url": None, "database_url_unpooled": None}
NOTHING_LISTENS = (
    "no connection to the database (DATABASE_URL): nothing listens at its host and port;"
    " start PostgreSQL, or correct host and port in the URL"
)
UNREACHABLE_DATABASE_URL = "postgresql://a_role@127.0.0.1:1/none"


class GivenServer(NamedTuple):
    """A server that runs already, outside the tests."""

    url: str

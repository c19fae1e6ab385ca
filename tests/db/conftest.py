"""A database in which random histories are tried."""

from collections.abc import Iterator

import pytest

from tests.support.database_trial import WORKERS, Trial
from tests.support.settings import MakeSettings


@pytest.fixture
def trial(make_settings: MakeSettings) -> Iterator[Trial]:
    """As many connections as WORKERS."""
    made = Trial(make_settings(db_pool_size=WORKERS))
    yield made
    made.close()

"""A database in which random histories are tried."""

from collections.abc import Iterator

import pytest

from db.connection import session
from tests.support.database_trial import WORKERS, Trial
from tests.support.settings import MakeSettings


@pytest.fixture
def trial(make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trial]:
    """As many connections as WORKERS. No transaction ends because the machine is busy."""
    for limit in ("lock_timeout", "statement_timeout", "idle_in_transaction_session_timeout"):
        monkeypatch.setitem(session.BATCH_LIMITS, limit, "60s")
    monkeypatch.setitem(session.BATCH_LIMITS, "transaction_timeout", "90s")
    made = Trial(make_settings(db_pool_size=WORKERS))
    yield made
    made.close()

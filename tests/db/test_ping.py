import pytest
import structlog

from db.connection.engine import Database
from db.connection.errors import DatabaseUnavailable
from tests.support.settings import MakeSettings


def test_a_ping_that_finds_no_free_connection_is_counted(make_settings: MakeSettings) -> None:
    settings = make_settings(redis_url=None, db_pool_size=1, db_max_overflow=0, db_pool_timeout=0.1)
    database = Database(settings)
    with (
        database.engine.connect(),
        structlog.testing.capture_logs() as logs,
        pytest.raises(DatabaseUnavailable, match="DB_POOL_SIZE"),
    ):
        database.ping()
    assert database.pool_state().timeouts == 1
    assert [entry["event"] for entry in logs] == ["pool exhausted"]
    database.ping()
    database.dispose()

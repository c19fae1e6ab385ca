"""What the tests of the database have in common."""

import pytest
import structlog


@pytest.fixture(autouse=True)
def _loud() -> None:
    """Let the log be heard: a command that ran in this process before may have silenced it."""
    structlog.reset_defaults()

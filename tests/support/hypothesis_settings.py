"""Hypothesis writes no files and has no stopwatch: on a busy machine a slow example is no fault of ours."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "tests", max_examples=50, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def use() -> None:
    """Let every property that says nothing else have these settings."""
    settings.load_profile("tests")

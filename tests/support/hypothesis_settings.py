"""Hypothesis without a stopwatch: on a busy machine a slow example is no fault of the code."""

from hypothesis import HealthCheck, settings

no_deadline = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

"""Hypothesis profiles: `ci` is what tests/run uses; `thorough` is for a night (pytest --hypothesis-profile=thorough)."""

from hypothesis import HealthCheck, settings

# No deadline: a slow machine is no bug of ours.
settings.register_profile("ci", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", deadline=None, max_examples=5000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("ci")

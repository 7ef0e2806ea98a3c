"""One deterministic hypothesis profile for the planner's property tests."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "planning",
    max_examples=400,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("planning")

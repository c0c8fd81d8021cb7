"""What all tests share. None depends on how long a machine takes: examples have no deadline."""

import pytest
from hypothesis import settings

from profiler.samples import Timing

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def contended():
    """What is left of a measurement in whose way a neighbour was."""
    return Timing(
        latency_ms=None,
        samples_kept=0,
        samples_discarded=9,
        stop_reason="contended",
        reason="contended: a neighbour",
        rounds_ms=(None,) * 3,
        details={"own_core": False},
    )

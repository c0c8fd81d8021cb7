"""What all tests share. None depends on how long a machine takes: examples have no deadline."""

from pathlib import Path

import pytest
from hypothesis import settings

from profiler.samples import Timing

# What judges how long something takes, and pytest-benchmark, which measures nothing in a process of
# pytest-xdist. Other tests measure too, but what they ask holds on a busy machine as well.
ALONE = (
    "bench",
    "kernels/test_peaks.py",
    "profiler/test_contention.py",
    "profiler/test_noise.py",
    "profiler/test_roofline.py",
    "profiler/test_shared_core.py",
    "profiler/test_timing.py",
)

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks them ``alone``."""
    here = Path(__file__).parent
    for item in items:
        place = item.path.relative_to(here) if item.path.is_relative_to(here) else item.path
        if any(place.is_relative_to(one) for one in ALONE):
            item.add_marker(pytest.mark.alone)


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

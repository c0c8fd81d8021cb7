"""What all tests share. None depends on how long a machine takes: examples have no deadline."""

from pathlib import Path

import pytest
from hypothesis import settings

from profiler.samples import Timing

# What judges how long something takes, and pytest-benchmark, which measures nothing in a process of
# pytest-xdist. Other tests measure too, but what they ask holds on a busy machine as well.
ALONE = (
    "bench",
    "kernels/test_last_panel.py",
    "kernels/test_lines_ahead.py",
    "kernels/test_peaks.py",
    "profiler/test_contention.py",
    "profiler/test_noise.py",
    "profiler/test_roofline.py",
    "profiler/test_shared_core.py",
    "profiler/test_timing.py",
)

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


def _is_alone(path: Path) -> bool:
    return any(path.is_relative_to(Path(__file__).parent / one) for one in ALONE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Asked for those alone, no other file is imported."""
    others = config.option.markexpr == "alone" and collection_path.suffix == ".py"
    return True if others and not _is_alone(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks them ``alone``."""
    for item in items:
        if _is_alone(item.path):
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

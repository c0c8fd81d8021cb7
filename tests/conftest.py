"""What all tests share. None depends on how long a machine takes: examples have no deadline."""

from pathlib import Path

import pytest
from hypothesis import settings

from profiler.samples import Timing

# What measures, or works on all cores: with other tests beside it would find no core of its own.
ALONE = (
    "bench",
    "docs",
    "kernels/test_peaks.py",
    "kernels/test_search.py",
    "profiler/test_contention.py",
    "profiler/test_noise.py",
    "profiler/test_roofline.py",
    "profiler/test_rpc.py",
    "profiler/test_shared_core.py",
    "profiler/test_sweep.py",
    "profiler/test_sweep_passes.py",
    "profiler/test_timing.py",
    "profiler/test_tune.py",
    "profiler/test_workers.py",
    "prove",
    "reparam/test_ablate.py",
    "reparam/test_calibration.py",
    "reparam/test_distributed.py",
    "reparam/test_evaluate.py",
    "reparam/test_finetune.py",
    "reparam/test_kept_memory.py",
    "reparam/test_predicted_measured.py",
    "reports/test_report_in_browser.py",
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

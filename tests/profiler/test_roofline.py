"""Roofs and launch overhead of this machine, by the clock that times every kernel."""

import pytest

from kernels.build import build, set_threads
from kernels.peaks import peaks
from kernels.reference import random_operands
from kernels.workload import attention, linear
from profiler.device import cpu_info
from profiler.roofline import measure_launch_overheads, measure_roofs, roofline_share
from profiler.samples import PRESETS
from profiler.timing import measure_interleaved

QUICK = PRESETS["quick"]
BUSY = "this machine is busy"


def latency_ms(workload):
    set_threads(1)
    kernel, operands = build(workload), random_operands(workload)
    arguments = (*kernel.pack(operands), kernel.allocate(operands))
    return measure_interleaved({"it": lambda: kernel.launch(*arguments)}, QUICK)["it"].latency_ms


def test_launch_overhead_is_a_small_part_of_a_real_product():
    overheads = measure_launch_overheads(cpu_info(threads=1), QUICK)
    large_ms = latency_ms(linear("mult_fp32", m=784, k=128, n=128))
    if overheads.keys() != {"ours", "torch"} or large_ms is None:
        pytest.skip(BUSY)
    assert all(0 < overhead_ms < large_ms / 5 for overhead_ms in overheads.values())


def test_no_linear_exceeds_its_roof(monkeypatch):
    # Of a copy past the caches nothing is asked here.
    monkeypatch.setattr("profiler.roofline.peaks", lambda threads, _: peaks(threads, 2**20))
    workload = linear("mult_fp32", m=784, k=128, n=128)
    # The clock may change between the two, and for long: so the roof is measured on both sides.
    before = measure_roofs(cpu_info(threads=1), QUICK)
    measured_ms = latency_ms(workload)
    after = measure_roofs(cpu_info(threads=1), QUICK)
    if "fma_fp32" not in before.keys() & after.keys() or measured_ms is None:
        pytest.skip(BUSY)
    shares = [roofline_share(workload, measured_ms, roofs) for roofs in (before, after)]
    assert 0.05 < min(shares) < 1.3


def test_no_share_without_a_roof_or_a_latency_or_for_other_products():
    workload = linear("mult_int8", m=8, k=8, n=8)
    assert roofline_share(workload, 1.0, {"dot_int8": 1024.0}) == pytest.approx(0.5)
    assert roofline_share(workload, 1.0, {"fma_fp32": 1.0}) is None
    assert roofline_share(workload, None, {"dot_int8": 1024.0}) is None
    assert roofline_share(attention(1, 8, 8, 8)[0], 1.0, {"fma_fp32": 1.0}) is None

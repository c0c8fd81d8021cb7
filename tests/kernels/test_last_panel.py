"""Outputs that fill half of the last panel cost half of one."""

import time

import pytest

from kernels.build import build, set_threads
from kernels.reference import random_operands
from kernels.targets import cpu_target
from kernels.workload import linear

ROUNDS = 60


def _least_s(widths):
    """The least time of each width, in rounds that all take part in."""
    launches, least = {}, dict.fromkeys(widths, float("inf"))
    for n in widths:
        workload = linear("mult_fp32", 350, 512, n)
        kernel, operands = build(workload), random_operands(workload)
        arguments, out = kernel.pack(operands), kernel.allocate(operands)
        kernel.launch(*arguments, out)
        launches[n] = (kernel.launch, (*arguments, out))
    for _ in range(ROUNDS):
        for n, (launch, arguments) in launches.items():
            start = time.perf_counter()
            launch(*arguments)
            least[n] = min(least[n], time.perf_counter() - start)
    return least


@pytest.mark.skipif(cpu_target().vector_bits < 256, reason="its vectors are of AVX2 or wider")
def test_half_a_panel_takes_half_of_its_time():
    set_threads(1)
    least = _least_s((32, 48, 64))
    # Three vectors of four; all four took 1.0.
    assert least[48] < 0.88 * least[64]
    assert least[48] > 1.2 * least[32]

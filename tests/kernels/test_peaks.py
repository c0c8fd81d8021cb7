import time

from kernels.build import build, set_threads
from kernels.peaks import peaks
from kernels.reference import random_operands
from kernels.workload import linear


def _rate(launch, amount):
    launch()
    best = min(_seconds(launch) for _ in range(5))
    return amount / best


def _seconds(launch):
    start = time.perf_counter()
    launch()
    return time.perf_counter() - start


def test_no_kernel_is_faster_than_the_roof():
    roofs = {peak.name: _rate(peak.launch, peak.amount) for peak in peaks(1, 2**20)}
    assert set(roofs) == {"fma_fp32", "dot_bf16", "dot_int8", "copy"}
    set_threads(1)
    roof_of = {"mult_fp32": "fma_fp32", "mult_bf16": "dot_bf16", "mult_int8": "dot_int8"}
    for form, roof in roof_of.items():
        workload = linear(form, 196, 256, 256)
        kernel, operands = build(workload), random_operands(workload)
        arguments = (*kernel.pack(operands), kernel.allocate(operands))
        rate = _rate(lambda: kernel.launch(*arguments), workload.macs)  # noqa: B023
        # Timed apart, on a machine that may change its clock in between.
        assert 0.05 < rate / roofs[roof] < 1.3, form

"""Benchmarks of the regression gate: one kernel of each form, on one thread.

Collected only when named: ``pytest tests/bench/bench_kernels.py --benchmark-enable``. The gate
relies on the names of the cases and on ``extra_info``: ``device`` says who was measured and
``source`` whose code it was.
"""

from pathlib import Path

import pytest

import kernels
from kernels.build import build, set_threads
from kernels.reference import max_abs_error, random_operands
from kernels.workload import attention, linear
from profiler.device import cpu_info

KEY_VALUE, QUERY = attention(b=8, tokens=196, bits=16, n=32)
CASES = {
    "mult_fp32": linear("mult_fp32", m=196, k=128, n=128),
    "mult_int8": linear("mult_int8", m=196, k=128, n=128),
    "shift_fp32": linear("shift_fp32", m=196, k=128, n=128),
    "shift_int8": linear("shift_int8", m=196, k=128, n=128),
    "add_kv": KEY_VALUE,
    "add_qkv": QUERY,
}


@pytest.mark.parametrize("case", CASES)
def test_kernel(benchmark, case):
    set_threads(1)
    workload = CASES[case]
    kernel = build(workload)
    operands = random_operands(workload, seed=0)
    arguments, out = kernel.pack(operands), kernel.allocate(operands)
    kernel.launch(*arguments, out)
    assert max_abs_error(workload, operands, out)[1], "the result is wrong: not worth timing"
    benchmark.extra_info["device"] = cpu_info(threads=1).fingerprint
    benchmark.extra_info["source"] = str(Path(kernels.__file__).parent.parent)
    benchmark(kernel.launch, *arguments, out)

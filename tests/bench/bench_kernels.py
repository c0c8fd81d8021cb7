"""Benchmarks of the regression gate: one kernel of each form, on one thread.

Collected only when named: ``pytest tests/bench/bench_kernels.py --benchmark-enable``. The gate runs
this file of the head in the trees of both sides, so that both are measured with one ruler, in
turns. It relies on the names of the cases and on ``extra_info``: ``device`` says who was measured
and ``source`` whose code it was.

A case more is a workload more in ``cases``; every form of a linear that has a lowering is one.
"""

import os
import random
import time
from functools import partial
from itertools import repeat
from pathlib import Path

import pytest
import torch
from turns import agree, wait_for_turn

import kernels
from kernels.build import build, lowerings, set_threads
from kernels.reference import max_abs_error, random_operands

# Of a base commit too, which may be older than kernels/forms.py.
from kernels.workload import FORMS, attention, linear
from profiler.device import cpu_info

TURNS = 20
# Where its arrays lie changes the latency of a kernel by some percent, and is an accident of each
# process. So they move from turn to turn, within as much memory as no cache holds.
ARENA_BYTES = 64 << 20
SAMPLES_PER_TURN = 10
WARM_UP_S = 5e-3
# In one sample, which so takes 0.2 to 1 ms. The gate's error rates are measured with more.
LAUNCHES = int(os.environ.get("GATE_LAUNCHES", "10"))


def cases():
    linears = [form for form, fields in FORMS.items() if fields["w_layout"] == "nk"]
    workloads = [
        *(linear(form, m=784, k=128, n=128) for form in linears),
        *attention(b=64, tokens=196, bits=16, n=32),
    ]
    return {workload.form: workload for workload in workloads if lowerings(workload)}


AGREED = agree(list(cases()))


@pytest.fixture(scope="session")
def launches():
    """All kernels, built and checked before the first is timed."""
    set_threads(1)
    built = {name: checked(workload) for name, workload in cases().items() if name in AGREED}
    if hasattr(os, "sched_setaffinity"):
        # All sides on one CPU: on a shared host one may be slower than another for minutes, which
        # taking turns does not cancel where each side keeps to its own.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    return built


def checked(workload):
    """A kernel and its arguments; its result is right."""
    kernel = build(workload)
    operands = random_operands(workload, seed=0)
    arguments, out = kernel.pack(operands), kernel.allocate(operands)
    kernel.launch(*arguments, out)
    assert max_abs_error(workload, operands, out)[1], "the result is wrong: not worth timing"
    return kernel, (*arguments, out)


def elsewhere(arguments, arena, rng):
    """Copies of the arguments at random places of an arena, one after the other."""
    place, moved = 64 * rng.randrange(len(arena) // 128), []
    for argument in arguments:
        place += 64 * rng.randrange(64)
        moved.append(arena[place : place + argument.nbytes].view(argument.dtype))
        moved[-1] = moved[-1].view(argument.shape).copy_(argument)
        place += -(-argument.nbytes // 64) * 64
    return moved


@pytest.mark.parametrize("case", AGREED)
def test_kernel(benchmark, launches, case):
    kernel, arguments = launches[case]
    arena, rng = torch.zeros(ARENA_BYTES, dtype=torch.uint8), random.Random(case)
    launch, samples = partial(kernel.launch, *arguments), 0

    def sample():
        for _ in repeat(None, LAUNCHES):
            launch()

    def before_each_sample():
        nonlocal launch, samples
        if samples % SAMPLES_PER_TURN == 0:
            launch = partial(kernel.launch, *elsewhere(arguments, arena, rng))
            wait_for_turn()
            end = time.perf_counter() + WARM_UP_S
            while time.perf_counter() < end:
                sample()
        samples += 1

    benchmark.extra_info["device"] = cpu_info(threads=1).fingerprint
    benchmark.extra_info["source"] = str(Path(kernels.__file__).parent.parent)
    benchmark.extra_info["turns"] = TURNS
    benchmark.pedantic(sample, setup=before_each_sample, rounds=TURNS * SAMPLES_PER_TURN)

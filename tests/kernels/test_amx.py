"""AMX: compiled anywhere, run where the CPU has it."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.build import LOWERINGS, BuildError, build, compiled, superseded
from kernels.reference import max_abs_error, random_operands
from kernels.targets import cpu_target
from kernels.workload import linear

AMX = {name: lowering.forms[0] for name, lowering in LOWERINGS.items() if lowering.amx}
HERE = cpu_target().amx
needs_amx = pytest.mark.skipif(not HERE, reason="this CPU has no AMX")


@pytest.mark.parametrize(("name", "form"), AMX.items())
def test_compiles_to_tile_products_on_any_machine(name, form):
    target = replace(cpu_target("sapphirerapids"), amx=True)
    text = compiled(name, linear(form, 1, 100, 70).family, target).mod.inspect_source("asm")
    product = "tdpbf16ps" if "bf16" in form else "tdpbusd"
    # Four for 64 bytes of k, four for what is left over, twice for one tile of rows.
    assert text.count(product) >= 8
    assert "ldtilecfg" in text and "tilerelease" in text


@pytest.mark.parametrize(("name", "form"), AMX.items())
def test_a_task_of_several_panels_is_another_program(name, form):
    target = replace(cpu_target("sapphirerapids"), amx=True)
    schedule = {"tile_rows": 32, "panels_outer": 0, "panels": 1}
    family = linear(form, 1, 64, 320).family
    one, four = (
        compiled(name, family, target, schedule | {"panels": panels}).mod.inspect_source("ll")
        for panels in (1, 4)
    )
    assert one != four


def test_a_cpu_without_amx_is_told_so():
    target = replace(cpu_target(), amx=False)
    with pytest.raises(BuildError, match="AMX"):
        build(linear("mult_int8", 4, 8, 8), "mult.amx_dot", target)
    assert build(linear("mult_int8", 4, 8, 8), target=target).lowering == "mult.dot"


def test_vectors_are_superseded_where_there_are_tiles():
    target, workload = cpu_target(), linear("shift_int4", 4, 8, 8)
    assert superseded(workload, replace(target, amx=True)) == ["shift.nibbles"]
    assert superseded(workload, replace(target, amx=False)) == []
    assert superseded(linear("mult_fp32", 4, 8, 8), replace(target, amx=True)) == []


def test_another_chip_is_never_given_this_machines_amx():
    assert not cpu_target("sapphirerapids", "x86_64-linux-gnu").amx


@needs_amx
@pytest.mark.parametrize(("name", "form"), AMX.items())
@settings(max_examples=15)
@given(m=st.integers(1, 300), k=st.integers(1, 200), n=st.sampled_from([5, 32, 70]))
def test_any_size_matches_the_oracle(name, form, m, k, n):
    # Few families, since each is compiled.
    k = (k // 9) * 9 + 1
    workload = linear(form, m, k, n)
    operands = random_operands(workload, seed=m * k)
    out = build(workload, name)(operands)
    error, within = max_abs_error(workload, operands, out)
    assert within, f"{name} of {workload.label} is off by {error}"


@needs_amx
@pytest.mark.parametrize(("name", "form"), AMX.items())
def test_a_task_may_take_several_panels_and_leave_some_over(name, form):
    for m, n in ((70, 230), (33, 128), (1, 5)):
        workload = linear(form, m, 100, n, around=("gelu", "layer_norm", "residual"))
        operands = random_operands(workload, seed=m)
        alone = {"tile_rows": 128, "panels_outer": 0, "panels": 1}
        expected = build(workload, name, schedule=alone)(operands)
        for others in ({"panels": 4}, {"panels": 8, "panels_outer": 1, "tile_rows": 64}):
            schedule = alone | {"tile_rows": 32} | others
            assert torch.equal(build(workload, name, schedule=schedule)(operands), expected)


@needs_amx
def test_torch_and_ours_leave_each_others_tiles_alone():
    workload = linear("mult_int8", 70, 100, 40)
    operands = random_operands(workload)
    ours, expected = build(workload), build(workload, "mult.dot")(operands)
    x, w = torch.randn(96, 320).bfloat16(), torch.randn(200, 320).bfloat16()
    theirs = torch.nn.functional.linear(x, w)
    for _ in range(5):
        torch.testing.assert_close(ours(operands), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(torch.nn.functional.linear(x, w), theirs)


@needs_amx
def test_a_thread_of_python_that_began_before_may_use_it():
    program = (
        "import threading\n"
        "begin, found = threading.Event(), []\n"
        "thread = threading.Thread(target=lambda: (begin.wait(), found.append(run())))\n"
        "thread.start()\n"
        "from kernels.build import build\n"
        "from kernels.reference import random_operands\n"
        "from kernels.workload import linear\n"
        "workload = linear('mult_int8', 40, 64, 32)\n"
        "operands = random_operands(workload)\n"
        "run = lambda: build(workload)(operands)\n"
        "begin.set(); thread.join()\n"
        "assert found[0].isfinite().all()\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=os.environ)

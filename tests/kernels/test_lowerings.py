"""Every CPU lowering against the float64 oracle, on random inputs of ragged and size-1 shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.baselines import BASELINES, baseline
from kernels.build import LOWERINGS, BuildError, build, compiled, lowerings, set_threads
from kernels.reference import Operands, max_abs_error, oracle, random_operands
from kernels.targets import TargetError, cpu_target, cuda_target
from kernels.workload import attention, linear

LINEAR = [
    f for low in LOWERINGS.values() if low.target == "llvm" for f in low.forms if "add" not in f
]
SHAPES = [(1, 1, 1), (3, 5, 7), (17, 37, 33), (29, 64, 64), (14, 16, 100), (61, 130, 96)]
ATTENTION = [
    (1, 2500, 16, 32),
    (1, 1, 1, 1),
    (2, 7, 5, 3),
    (3, 50, 16, 32),
    (2, 33, 20, 24),
    (4, 49, 64, 64),
]
TARGETS = [None, "generic", "x86-64-v3"]


def _matches(workload, target=None):
    operands = random_operands(workload, seed=torch.seed() % 2**31)
    for lowering in lowerings(workload):
        out = build(workload, lowering, cpu_target(target) if target else None)(operands)
        error, within = max_abs_error(workload, operands, out)
        assert within, f"{lowering} of {workload.label} is off by {error}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", LINEAR)
def test_linear_matches_the_oracle(form, shape):
    _matches(linear(form, *shape))


@pytest.mark.parametrize("shape", ATTENTION, ids=str)
@pytest.mark.parametrize("alphabet", ["pm1", "01"])
def test_attention_matches_the_oracle(alphabet, shape):
    for workload in attention(*shape, alphabet):
        _matches(workload)


@pytest.mark.parametrize("chip", TARGETS[1:])
def test_other_x86_chips_get_the_same_figures(chip):
    for form in LINEAR:
        _matches(linear(form, 9, 37, 40), chip)
    for workload in attention(2, 30, 20, 24):
        _matches(workload, chip)


def test_arm_code_is_generated():
    target = cpu_target("neoverse-n1", "aarch64-linux-gnu")
    for workload in (*(linear(form, 9, 37, 40) for form in LINEAR), *attention(2, 30, 20, 24)):
        program = compiled(lowerings(workload)[0], workload.family, target)
        assert (
            "fmul" in (text := program.mod.inspect_source("asm"))
            or "fmla" in text
            or "fadd" in text
        )


def test_the_oracle_is_the_definition():
    workload = linear("shift_fp32", 2, 3, 4)
    operands = random_operands(workload)
    p = operands.parameters
    expected = [
        [
            sum(float(operands.x[i, k]) * float(p.values[j, k]) for k in range(3))
            * float(p.scale[j])
            + float(p.bias[j])
            for j in range(4)
        ]
        for i in range(2)
    ]
    assert torch.allclose(
        torch.tensor(expected), torch.from_numpy(oracle(workload, operands)[0]).float()
    )


def test_the_bound_catches_a_single_wrong_code():
    workload = linear("shift_int8", 4, 64, 64)
    operands = random_operands(workload)
    out = build(workload)(operands)
    assert max_abs_error(workload, operands, out)[1]
    changed = operands.x.clone()
    changed[1, 3] += changed.abs().max() / 100
    assert not max_abs_error(workload, Operands(changed, operands.parameters), out)[1]


@given(tokens=st.integers(0, 80))
@settings(max_examples=25, deadline=None)
def test_one_kernel_serves_any_number_of_tokens(tokens):
    for form in LINEAR:
        kernel = build(linear(form, 14, 37, 33))
        operands = random_operands(linear(form, max(tokens, 1), 37, 33), seed=tokens)
        cut = Operands(operands.x[:tokens].contiguous(), operands.parameters)
        out = kernel(cut)
        assert out.shape == (tokens, 33)
        assert max_abs_error(linear(form, max(tokens, 1), 37, 33), cut, out)[1]


@pytest.mark.parametrize("alphabet", ["pm1", "01"])
def test_attention_without_tokens_is_empty_or_zero(alphabet):
    kv, qkv = (build(w) for w in attention(1, 1, 16, 32, alphabet))
    assert kv(Operands(torch.empty(2, 0, 16), values=torch.empty(2, 0, 32))).abs().sum() == 0
    assert qkv(Operands(torch.empty(2, 0, 16), values=torch.randn(2, 16, 32))).shape == (2, 0, 32)


def test_the_sign_of_zero_is_not_positive():
    kv, _ = attention(1, 3, 8, 4, "01")
    zeros = torch.tensor([0.0, -0.0, 1e-40]).view(1, 3, 1).expand(1, 3, 8).contiguous()
    values = torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1).expand(1, 3, 4).contiguous()
    assert torch.equal(build(kv)(Operands(zeros, values=values)), torch.full((1, 8, 4), 100.0))


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_result(threads):
    set_threads(threads)
    try:
        for form in LINEAR:
            _matches(linear(form, 100, 64, 96))
    finally:
        set_threads(1)


@pytest.mark.parametrize(
    ("form", "name"), [(form, name) for form, found in BASELINES.items() for name in found]
)
def test_baselines_compute_the_same_product(form, name):
    if form.startswith("add"):
        workload = next(w for w in attention(2, 40, 16, 32, form.split("_")[-1]) if w.form == form)
    else:
        workload = linear(form, 40, 64, 48)
    operands = random_operands(workload)
    kernel = baseline(workload, name)
    error, within = max_abs_error(workload, operands, kernel(operands))
    assert kernel.is_baseline
    assert within if kernel.exact else error < 0.2


def test_unknown_names_are_refused():
    workload = linear("mult_fp32", 1, 2, 3)
    with pytest.raises(BuildError, match=r"mult\.panels"):
        build(workload, "mult.magic")
    with pytest.raises(BuildError, match=r"torch\.fp32"):
        baseline(workload, "torch.magic")
    with pytest.raises(TargetError, match="sm_90"):
        cuda_target("sm_1")
    assert lowerings(workload) == ["mult.panels"]


def test_wrong_operands_are_refused_by_the_kernel():
    kernel = build(linear("mult_fp32", 4, 8, 8))
    operands = random_operands(linear("mult_fp32", 4, 8, 8))
    x, *packed = kernel.pack(operands)
    out = kernel.allocate(operands)
    for wrong in (x[:, :4].contiguous(), x.double(), x.t().contiguous().t()):
        with pytest.raises(Exception, match=r"(?i)mismatch|expected|shape|dtype|stride|contig"):
            kernel.launch(wrong, *packed, out)

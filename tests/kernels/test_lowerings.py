"""Every CPU lowering against the float64 oracle, on random inputs of ragged and size-1 shapes."""

import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.baselines import BASELINES, baseline, names
from kernels.build import LOWERINGS, BuildError, build, compiled, lowerings, set_threads
from kernels.forms import AROUND, FORMS
from kernels.lowerings.code_groups import groups_of
from kernels.lowerings.emit import LANES
from kernels.lowerings.panel_gemm import line_of_tile
from kernels.packing import PANEL
from kernels.reference import Operands, max_abs_error, oracle, random_operands
from kernels.targets import TargetError, cpu_target, cuda_target
from kernels.workload import WorkloadError, attention, linear

LINEAR = [
    f
    for low in LOWERINGS.values()
    if low.target == "llvm"
    for f in low.forms
    if FORMS[f]["w_layout"] == "nk"
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


def _attention_of(form):
    every = [
        workload
        for alphabet in ("pm1", "01")
        for dtype in ("float32", "bfloat16")
        for workload in attention(2, 40, 16, 32, alphabet, dtype)
    ]
    return next(workload for workload in every if workload.form == form)


def _matches(workload, chip=None):
    operands = random_operands(workload, seed=torch.seed() % 2**31)
    target = cpu_target(chip)
    for lowering in lowerings(workload, target):
        out = build(workload, lowering, target)(operands)
        error, within = max_abs_error(workload, operands, out)
        assert within, f"{lowering} of {workload.label} is off by {error}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", LINEAR)
def test_linear_matches_the_oracle(form, shape):
    _matches(linear(form, *shape))


@pytest.mark.parametrize("form", LINEAR)
@pytest.mark.parametrize("around", [AROUND, ("gelu",), ("layer_norm",), ("residual",)])
def test_neighbours_fused_around_a_linear_match_the_oracle(around, form):
    for shape in ((17, 37, 33), (9, 64, 96)):
        workload = linear(form, *shape, around)
        assert workload.form == form and workload.alone == linear(form, *shape)
        _matches(workload)


@pytest.mark.parametrize("form", ["mult_fp32", "shift_int8"])
def test_lines_of_results_and_residuals_are_asked_for_in_time(form):
    target = replace(cpu_target("znver4"), amx=False)

    def asked(*around):
        workload = linear(form, 1, 32, 192, around)
        program = compiled(lowerings(workload, target)[0], workload.family, target)
        ahead = "i32 0, i32 2, i32 1)"  # to read, into the second level, data
        lines = program.mod.inspect_source("ll").splitlines()
        return sum("call void @llvm.prefetch" in line and ahead in line for line in lines)

    # Of residuals as many as of results.
    assert asked("residual") == 2 * asked() > 0


@pytest.mark.parametrize("n", [32, 42, 48, 80, 192])
def test_lines_of_a_tile_are_asked_for_in_the_order_of_addresses(n):
    rows, panels = 6, -(-n // PANEL)
    last = -(-(n - (panels - 1) * PANEL) // LANES)
    vectors = [2] * (panels - 1) + [last]
    lines = [
        line_of_tile(rows, panel, row, vectors[panel], vector)
        for panel in range(panels)
        for row in range(rows)
        for vector in range(vectors[panel])
    ]
    # Whole lines from the first of the tile to its last.
    assert lines == list(range(0, len(lines) * LANES, LANES))
    assert len(lines) * LANES >= rows * n


@pytest.mark.parametrize("form", ["mult_int8", "shift_int4"])
def test_few_steps_are_a_loop_like_many(form):
    target = replace(cpu_target("znver4"), amx=False)

    def products(k):
        workload = linear(form, 1, k, 80, ("residual",))
        program = compiled(lowerings(workload, target)[0], workload.family, target)
        return program.mod.inspect_source("asm").count("vpdpbusd")

    # Written out, four steps would be as many times as many.
    assert products(16) == products(1600) > 0


def test_layer_norm_keeps_its_digits_far_from_zero():
    workload = linear("mult_fp32", 20, 64, 32, ("layer_norm",))
    operands = random_operands(workload)
    far = replace(operands, x=operands.x + 1000)
    out = build(workload)(far)
    exact = torch.nn.functional.layer_norm(far.x.double(), (64,), eps=1e-6)
    norm = operands.norm.double()
    exact = exact * norm[:64] + norm[64:128]
    expected = exact @ operands.weight.double().T + operands.parameters.bias.double()
    # The inputs themselves are 1000 ± 3e-5.
    assert (out.double() - expected).abs().max() < 2e-3


def test_what_cannot_do_a_neighbour_is_not_offered():
    workload = linear("shift_int8", 4, 8, 8, ("gelu",))
    assert lowerings(workload, replace(cpu_target(), amx=False)) == ["shift.dot"]
    assert lowerings(workload, replace(cpu_target(), amx=True)) == ["shift.amx_dot", "shift.dot"]
    assert lowerings(workload, cuda_target("sm_90")) == []
    assert names(workload, compiled=True, device="cpu") == []
    with pytest.raises(WorkloadError, match="residual"):
        linear("shift_int8", 4, 8, 8, ("softmax",))


@pytest.mark.parametrize("shape", ATTENTION, ids=str)
@pytest.mark.parametrize("alphabet", ["pm1", "01"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_matches_the_oracle(dtype, alphabet, shape):
    for workload in attention(*shape, alphabet, dtype):
        _matches(workload)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_groups_of_any_size_give_the_same(bits):
    # 41 bits are held in two words, cut into groups of unequal size.
    for workload in attention(2, 60, 41, 20):
        operands = random_operands(workload)
        for lowering in lowerings(workload):
            out = build(workload, lowering, schedule={"group_bits": bits})(operands)
            assert max_abs_error(workload, operands, out)[1]


@given(st.integers(1, 100), st.integers(1, 8))
def test_groups_cover_each_bit_once_and_share_no_row(bits, largest):
    groups = groups_of(bits, largest)
    assert [bit for group in groups for bit in group.bits] == list(range(bits))
    assert all(group.size <= largest for group in groups)
    assert all(group.bits[0] // 32 == group.bits[-1] // 32 for group in groups)
    rows = [group.row + i for group in groups for i in range(1 << group.size)]
    assert rows == list(range(len(rows)))


@pytest.mark.parametrize("chip", TARGETS[1:])
def test_other_x86_chips_get_the_same_figures(chip):
    for form in LINEAR:
        _matches(linear(form, 9, 37, 40), chip)
    for dtype in ("float32", "bfloat16"):
        for workload in attention(2, 30, 20, 24, dtype=dtype):
            _matches(workload, chip)


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
@settings(max_examples=25)
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
    kv, qkv, _ = (build(w) for w in attention(1, 1, 16, 32, alphabet))
    assert kv(Operands(torch.empty(2, 0, 16), values=torch.empty(2, 0, 32))).abs().sum() == 0
    assert qkv(Operands(torch.empty(2, 0, 16), values=torch.randn(2, 16, 32))).shape == (2, 0, 32)


def test_the_sign_of_zero_is_not_positive():
    kv = attention(1, 3, 8, 4, "01").kv
    zeros = torch.tensor([0.0, -0.0, 1e-40]).view(1, 3, 1).expand(1, 3, 8).contiguous()
    values = torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1).expand(1, 3, 4).contiguous()
    assert torch.equal(build(kv)(Operands(zeros, values=values)), torch.full((1, 8, 4), 100.0))


def _moved(tensor, elements):
    """The same numbers, beginning that many elements into an allocation."""
    room = torch.empty(tensor.numel() + elements, dtype=tensor.dtype)
    return room[elements:].view(tensor.shape).copy_(tensor)


@pytest.mark.parametrize("elements", [1, 3, 16])
def test_slices_that_begin_anywhere_are_served(elements):
    for workload in (*(linear(form, 9, 40, 64) for form in LINEAR), *attention(2, 30, 16, 32)):
        operands = random_operands(workload)
        kernel = build(workload)
        arguments = (*kernel.pack(operands), kernel.allocate(operands))
        moved = [_moved(argument, elements) for argument in arguments]
        kernel.launch(*moved)
        assert max_abs_error(workload, operands, moved[-1])[1]


def test_padding_never_reaches_the_result():
    # The workspace keeps what the launch before has left in it: here, bits of a NaN.
    for form in LINEAR:
        poison, clean = linear(form, 40, 8, 32), linear(form, 40, 5, 32)
        kernel = build(poison)
        operands = random_operands(poison)
        x, *packed = kernel.pack(operands)
        kernel.launch(torch.full_like(x, torch.nan), *packed, kernel.allocate(operands))
        _matches(clean)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_result(threads):
    set_threads(threads)
    try:
        for form in LINEAR:
            _matches(linear(form, 100, 64, 96))
            # More rows than are quantised or rounded at a time.
            _matches(linear(form, 3000, 513, 33))
    finally:
        set_threads(1)


@pytest.mark.parametrize(
    ("form", "name"), [(form, name) for form, found in BASELINES.items() for name in found]
)
def test_baselines_compute_the_same_product(form, name):
    if BASELINES[form][name].compiled:
        if not shutil.which("g++"):
            pytest.skip("torch.compile needs g++")
        if "01" in form or "bf16" in form:
            pytest.skip("compiled in the other alphabet and type")
    workload = _attention_of(form) if form.startswith("add") else linear(form, 40, 64, 48)
    operands = random_operands(workload)
    kernel = baseline(workload, name)
    out = kernel(operands)
    error, within = max_abs_error(workload, operands, out)
    assert kernel.is_baseline
    assert within if kernel.exact else error < 0.02 * float(out.abs().max())


def test_compiled_baselines_are_left_out_unless_asked_for():
    workload = linear("mult_int8", 1, 2, 3)
    assert names(workload, False, "cpu") == ["torch.int8", "torch.int8_dynamic"]
    assert names(workload, True, "cpu")[-1] == "torch.compile.int8"


@pytest.mark.parametrize(
    ("form", "cpu", "cuda"),
    [
        ("mult_fp32", ["fp32"], ["fp32", "tf32"]),
        ("mult_bf16", ["bf16"], ["bf16", "fp16", "compile.bf16"]),
        ("mult_int8", ["int8", "int8_dynamic", "compile.int8"], ["int8", "compile.int8"]),
    ],
)
def test_a_device_has_the_rivals_that_its_users_would_pick(form, cpu, cuda):
    workload = linear(form, 1, 2, 3)
    for device, expected in (("cpu", cpu), ("cuda", cuda)):
        assert names(workload, True, device) == [f"torch.{name}" for name in expected]


def test_tf32_is_switched_on_for_its_own_launch_alone(monkeypatch):
    precision, seen = torch.backends.cuda.matmul, []
    monkeypatch.setattr(
        torch, "addmm", lambda *_, out: seen.append(precision.fp32_precision) or out.zero_()
    )
    before = precision.fp32_precision
    workload = linear("mult_fp32", 4, 8, 8)
    operands = random_operands(workload)
    for name in ("torch.fp32", "torch.tf32", "torch.fp32"):
        baseline(workload, name)(operands)
    assert seen == [before, "tf32", before] and precision.fp32_precision == before


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

"""Every CUDA lowering against the float64 oracle, emulated on the CPU: see ``emulated_cuda``."""

import pytest
import torch
import tvm
import tvm.script.ir_builder.tirx as T
from emulated_cuda import emulation, launcher, missing

from kernels.build import LOWERINGS, BuildError, build
from kernels.lowerings.emit import argument, program
from kernels.packing import LinearParameters
from kernels.reference import Operands, max_abs_error, random_operands
from kernels.targets import cuda_target
from kernels.workload import attention, linear

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

LINEAR = [
    (name, form)
    for name, lowering in LOWERINGS.items()
    if lowering.target == "cuda"
    for form in lowering.forms
    if not form.startswith("add")
]
# Input and output features: fewer than a word, ragged in every way, whole tiles.
FEATURES = [(1, 1), (37, 33), (130, 96)]
ATTENTION = [
    (1, 1, 1, 1),
    (2, 7, 5, 3),
    (2, 33, 20, 24),
    (1, 300, 72, 40),
]


@pytest.fixture(autouse=True, scope="module")
def emulated():
    with emulation():
        yield


def _matches(kernel, workload):
    operands = random_operands(workload, seed=torch.seed() % 2**31)
    error, within = max_abs_error(workload, operands, kernel(operands))
    assert within, f"{kernel.lowering} of {workload.label} is off by {error}"


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize(("name", "form"), LINEAR)
def test_linear_matches_the_oracle_for_any_number_of_rows(name, form, features):
    kernel = build(linear(form, 1, *features), name, cuda_target("sm_90"))
    for rows in (1, 61, 130):
        _matches(kernel, linear(form, rows, *features))
    none = random_operands(linear(form, 1, *features))
    assert kernel(Operands(none.x[:0], none.parameters)).shape == (0, features[1])


@pytest.mark.parametrize("row_tiles", [2, 8])
@pytest.mark.parametrize("k_warps", [1, 2, 4])
def test_every_schedule_computes_the_same(row_tiles, k_warps):
    schedule = {"row_tiles": row_tiles, "k_warps": k_warps}
    workload = linear("mult_int8", 50, 300, 72)
    _matches(build(workload, "mult.cuda_dot", cuda_target("sm_90"), schedule), workload)


def test_older_tensor_cores_compute_the_same():
    workload = linear("shift_int4", 50, 100, 72)
    _matches(build(workload, target=cuda_target("sm_75")), workload)


@pytest.mark.parametrize(
    ("alphabet", "shape"),
    [*(("pm1", shape) for shape in ATTENTION), ("01", ATTENTION[1])],
    ids=str,
)
def test_attention_matches_the_oracle(alphabet, shape):
    for workload in attention(*shape, alphabet):
        _matches(build(workload, target=cuda_target("sm_90")), workload)


def test_attention_in_bf16_matches_the_oracle():
    for workload in attention(1, 300, 20, 24, "pm1", "bfloat16"):
        _matches(build(workload, target=cuda_target("sm_90")), workload)


@pytest.mark.parametrize(
    ("alphabet", "shape"), [("pm1", ATTENTION[0]), ("pm1", ATTENTION[2]), ("01", ATTENTION[1])]
)
def test_attention_without_bf16_tensor_cores(alphabet, shape):
    for workload in attention(*shape, alphabet)[:2]:
        kernel = build(workload, target=cuda_target("sm_75"))
        assert kernel.lowering == "add.cuda"
        _matches(kernel, workload)


def test_one_kernel_serves_any_batch_and_number_of_tokens():
    kv, qkv, both = (build(w, target=cuda_target("sm_90")) for w in attention(1, 1, 16, 32, "pm1"))
    for b, tokens in ((1, 255), (3, 256), (2, 257), (1, 1000)):
        for kernel, workload in zip((kv, qkv, both), attention(b, tokens, 16, 32, "pm1")):
            _matches(kernel, workload)
    none = torch.empty(2, 0, 16)
    assert kv(Operands(none, values=torch.empty(2, 0, 32))).abs().sum() == 0
    assert qkv(Operands(none, values=torch.randn(2, 16, 32))).shape == (2, 0, 32)


def test_codes_follow_the_sign_of_any_number():
    kv = build(attention(1, 3, 8, 4, "01").kv, target=cuda_target("sm_90"))
    numbers = torch.tensor([0.0, -0.0, 1e-40]).view(1, 3, 1).expand(1, 3, 8).contiguous()
    values = torch.tensor([1.0, 10.0, 100.0]).view(1, 3, 1).expand(1, 3, 4).contiguous()
    assert torch.equal(kv(Operands(numbers, values=values)), torch.full((1, 8, 4), 100.0))


def test_values_keep_all_of_their_bits():
    kv = build(attention(1, 1, 8, 32).kv, target=cuda_target("sm_90"))
    values = torch.rand(1, 1, 32) + torch.arange(32) * 2.0**-23
    out = kv(Operands(torch.ones(1, 1, 8), values=values))
    assert torch.equal(out, values.expand(1, 8, 32))


def test_a_row_of_zeros_becomes_the_bias():
    workload = linear("shift_int8", 2, 40, 33)
    operands = random_operands(workload)
    operands.x[1] = 0
    out = build(workload, target=cuda_target("sm_90"))(operands)
    assert torch.equal(out[1], operands.parameters.bias)


def test_extreme_codes_are_not_cut():
    """127 · 127 · k, and the most negative power of each code."""
    x = torch.full((3, 64), -1.0)
    for form, value in (("mult_int8", 127.0), ("shift_int8", -1.0), ("shift_int4", -1.0)):
        values = torch.full((32, 64), value)
        parameters = LinearParameters(form, values, torch.ones(32), torch.zeros(32))
        out = build(linear(form, 3, 64, 32), target=cuda_target("sm_90"))(Operands(x, parameters))
        assert torch.equal(out, torch.full((3, 32), -64 * value))


def test_what_a_gpu_cannot_run_is_refused():
    with pytest.raises(BuildError, match=r"sm_80.*sm_75"):
        build(attention(1, 9, 8, 8).kv, "add.cuda_split", cuda_target("sm_75"))
    with pytest.raises(BuildError, match="sm_75"):
        build(linear("shift_bf16", 1, 8, 8), target=cuda_target("sm_75"))


def test_an_address_that_a_gpu_cannot_read_is_refused():
    workload = linear("shift_int8", 3, 16, 8)
    kernel = build(workload, target=cuda_target("sm_90"))
    operands = random_operands(workload)
    moved = torch.cat([torch.zeros(1), operands.x.flatten()])[1:].view(3, 16)
    with pytest.raises(ValueError, match="argument 0"):
        kernel(Operands(moved, operands.parameters))


def _run(body, *tensors):
    built = tvm.compile(tvm.IRModule({"main": program(body)}), target=cuda_target("sm_90").tvm)
    launcher(built["main"])(*tensors)


def test_the_emulator_sees_an_access_outside_of_the_operands():
    def body():
        x, out = argument("x", (64,), "float32"), argument("out", (64,), "float32")
        with T.launch_thread("threadIdx.x", 64) as t:
            T.buffer_store(out, x[t + 1], [t])

    with pytest.raises(RuntimeError, match="outside"):
        _run(body, torch.rand(64), torch.empty(64))


def test_the_emulator_sees_threads_that_miss_a_barrier():
    def body():
        out = argument("out", (64,), "float32")
        with T.launch_thread("threadIdx.x", 64) as t:
            with T.If(t < 32), T.Then():
                T.evaluate(T.tvm_storage_sync("shared"))
            T.buffer_store(out, T.float32(1), [t])

    with pytest.raises(RuntimeError, match="barrier"):
        _run(body, torch.empty(64))


def test_the_emulator_runs_threads_in_both_orders():
    """Without a barrier, a neighbour's number is there in one order and not in the other."""

    def body():
        out = argument("out", (2, 8), "float32")
        with T.launch_thread("blockIdx.x", 2) as b, T.launch_thread("threadIdx.x", 8) as t:
            T.buffer_store(out, T.float32(1), [b, t])
            with T.If(t > 0), T.Then():
                T.buffer_store(out, out[b, t - 1] + 1, [b, t])

    out = torch.zeros(2, 8)
    _run(body, out)
    assert out[0].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert out[1].tolist() == [1, 1, 1, 1, 1, 1, 1, 1]

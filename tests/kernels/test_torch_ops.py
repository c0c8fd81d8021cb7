import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import kernels.build
from kernels import torch_ops
from kernels.build import LOWERINGS
from kernels.forms import FORMS as EVERY_FORM
from kernels.operators import operator
from kernels.packing import pack_linear, quantise_rows, quantise_weight
from kernels.reference import Operands, oracle
from kernels.targets import cuda_target
from kernels.workload import attention, linear

FORMS = [name for name, form in EVERY_FORM.items() if form["w_layout"] == "nk"]


def _layer(form, k=20, n=12):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(n, k, generator=generator), torch.randn(n, generator=generator)
    return quantise_weight(form, weight, bias)


@pytest.mark.parametrize("form", FORMS)
def test_linear_keeps_leading_dimensions_and_agrees_with_torch(form):
    parameters, x = _layer(form), torch.randn(2, 3, 20)
    y = torch.ops.shiftadd.linear(x, list(pack_linear(parameters)), form, 12)
    if "int" in form:
        codes, scale = quantise_rows(x)
        x = codes * scale
    if "bf16" in form:
        x = x.bfloat16().float()
    expected = torch.nn.functional.linear(x, parameters.weight, parameters.bias)
    assert y.shape == (2, 3, 12)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_operator_contract(form):
    packed = list(pack_linear(_layer(form)))
    torch.library.opcheck(torch.ops.shiftadd.linear.default, (torch.randn(4, 20), packed, form, 12))


def test_attention_operators_agree_with_the_oracle():
    kv_workload, qkv_workload, _ = attention(2, 9, 8, 5)
    k, v, q = torch.randn(2, 9, 8), torch.randn(2, 9, 5), torch.randn(2, 9, 8)
    kv = torch.ops.shiftadd.add_kv(k, v, "pm1")
    out = torch.ops.shiftadd.add_qkv(q, kv, "pm1")
    expected = oracle(kv_workload, Operands(k, values=v))[0]
    torch.testing.assert_close(kv.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    expected = oracle(qkv_workload, Operands(q, values=kv))[0]
    torch.testing.assert_close(out.double(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)
    torch.library.opcheck(torch.ops.shiftadd.add_kv.default, (k, v, "pm1"))
    torch.library.opcheck(torch.ops.shiftadd.add_qkv.default, (q, kv, "pm1"))


@pytest.mark.parametrize("tokens", [9, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_attention_in_one_is_its_two_products(dtype, tokens):
    q, k, v = (torch.randn(2, tokens, size).to(dtype) for size in (8, 8, 5))
    both = torch.ops.shiftadd.add_attention(q, k, v, "pm1")
    kv = torch.ops.shiftadd.add_kv(k.float(), v.float(), "pm1")
    apart = torch.ops.shiftadd.add_qkv(q.float(), kv, "pm1")
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    assert both.dtype == dtype
    torch.testing.assert_close(
        both.float(), apart, rtol=tolerance, atol=tolerance * float(apart.abs().max())
    )
    torch.library.opcheck(torch.ops.shiftadd.add_attention.default, (q, k, v, "pm1"))


def test_non_contiguous_inputs_are_served():
    parameters = _layer("mult_fp32")
    packed = list(pack_linear(parameters))
    x = torch.randn(20, 6).t()
    y = torch.ops.shiftadd.linear(x, packed, "mult_fp32", 12)
    expected = torch.nn.functional.linear(x, parameters.weight, parameters.bias)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_a_compiled_model_calls_the_operator_without_a_break():
    packed = list(pack_linear(_layer("shift_int8")))

    def model(x):
        return torch.ops.shiftadd.linear(x, packed, "shift_int8", 12).relu()

    x = torch.randn(3, 20)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))


def test_kernels_are_kept():
    first = torch_ops.linear_kernel("mult_fp32", 20, 12, torch.device("cpu"))
    assert torch_ops.linear_kernel("mult_fp32", 20, 12, torch.device("cpu")) is first


def test_a_gpus_linears_have_the_schedule_of_so_many_tokens(monkeypatch):
    """On tensors without content and a kernel that is none."""
    target, launched = cuda_target("sm_90"), []

    def program(lowering, family, target, schedule):
        return {"main": tuple(schedule.items())}

    monkeypatch.setattr(kernels.build, "compiled", program)
    monkeypatch.setattr(kernels.build, "_on_gpu", lambda main, memory: main)
    monkeypatch.setattr(kernels.build, "_also_without_tokens", lambda main: main)
    monkeypatch.setattr(torch_ops, "_target", lambda device: target)
    monkeypatch.setattr(torch_ops, "launch", lambda main, *arguments: launched.append(dict(main)))
    packed = [t.to("meta") for t in pack_linear(_layer("shift_int8", 512, 64))]
    torch_ops.linear_kernel.cache_clear()
    try:
        for tokens in (0, 1, 300, 25088):
            torch_ops._linear(torch.empty(tokens, 512, device="meta"), packed, "shift_int8", 64)
    finally:
        torch_ops.linear_kernel.cache_clear()
    few, many = (
        LOWERINGS["shift.cuda_dot"].default_schedule(linear("shift_int8", m, 512, 64), target)
        for m in (1, 25088)
    )
    assert few != many and launched == [few, few, few, many]


def test_a_long_sequence_of_few_heads_gives_the_same_on_two_threads():
    q, k, v = torch.randn(1, 1500, 8), torch.randn(1, 1500, 8), torch.randn(1, 1500, 5)
    results = []
    for threads in (1, 2):
        torch_ops.set_threads(threads)
        kv = torch.ops.shiftadd.add_kv(k, v, "pm1")
        results.append((kv, torch.ops.shiftadd.add_qkv(q, kv, "pm1")))
    torch_ops.set_threads(1)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-3)


def test_an_operator_is_called_at_once_unless_someone_must_see_it():
    seen = []

    def double(x):
        seen.append(x)
        return 2 * x

    library = "doubled_for_a_test"
    call = operator(f"{library}(Tensor x) -> Tensor", double, torch.empty_like)
    x = torch.randn(3)
    assert call(x) is not None and seen.pop() is x
    with torch.profiler.profile() as profile:
        call(x)
    assert f"shiftadd::{library}" in {event.key for event in profile.key_averages()}
    with FakeTensorMode() as mode:
        assert call(mode.from_tensor(x)).shape == x.shape
    assert not any(isinstance(tensor, FakeTensor) for tensor in seen)
    (node,) = [n for n in make_fx(call)(x).graph.nodes if n.op == "call_function"]
    assert node.target is getattr(torch.ops.shiftadd, library).default
    exported = torch.export.export(Called(call), (x,)).module()
    torch.testing.assert_close(exported(x), 2 * x)


class Called(torch.nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)

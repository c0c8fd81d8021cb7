"""The kernels around the products against torch's operators in float64."""

import itertools
import math
from itertools import pairwise

import pytest
import torch
import tvm.script.ir_builder.tirx as T
from torch.nn import functional as F

import kernels.expert_ops
import kernels.layer_ops  # noqa: F401  both register torch.ops.shiftadd
from kernels.build import set_threads
from kernels.compilation import compile_program
from kernels.layer_kernels import layer_kernel
from kernels.lowerings.code_attention import code_attention
from kernels.lowerings.emit import argument, at, program
from kernels.lowerings.gelu import _by_pieces, gelu
from kernels.lowerings.routing import probability
from kernels.packing import pack_linear, quantise_weight
from kernels.targets import cpu_target


def _angular(qkv, conv, alphabet):
    _, tokens, _, _, head_dim = qkv.shape
    q, k, v = qkv.double().permute(2, 0, 3, 1, 4).unbind(0)
    low = -1.0 if alphabet == "pm1" else 0.0
    q, k = ((x > 0).double() * (1 - low) + low for x in (q, k))
    y = v / 2 + q @ (k.transpose(-1, -2) @ v) / (math.pi * head_dim * math.sqrt(tokens))
    heads, window = conv.shape
    near = F.conv2d(
        v, conv.double().view(heads, 1, window, 1), padding=(window // 2, 0), groups=heads
    )
    return (F.normalize(y, dim=-1) + near).transpose(1, 2)


@pytest.mark.parametrize("alphabet", ["pm1", "01"])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    "images, tokens, heads, head_dim",
    [(1, 1, 1, 16), (2, 33, 3, 32), (1, 197, 3, 64), (3, 50, 2, 24)],
)
def test_angular_attention(images, tokens, heads, head_dim, split, alphabet):
    qkv = torch.randn(images, tokens, 3, heads, head_dim)
    conv = torch.randn(heads, 9)
    out = torch.full((images, tokens, heads, head_dim), math.nan)
    layer_kernel("angular_attention", head_dim, 9, alphabet, split, 4)(qkv, conv, out)
    torch.testing.assert_close(out.double(), _angular(qkv, conv, alphabet), rtol=1e-4, atol=1e-4)


def _code_scores(q, k, alphabet):
    q, k = q.double(), k.double()
    if alphabet == "pm1":
        codes = [torch.where(x > 0, 1.0, -1.0).double() for x in (q, k)]
    else:
        codes = [(x > x.mean(-1, keepdim=True)).double() for x in (q, k)]
    magnitudes = q.abs().mean(-1)[..., None] * k.abs().mean(-1)[..., None, :]
    return codes[0] @ codes[1].transpose(-1, -2) * magnitudes


def _heads_of(images, heads, tokens, width):
    """As attentions cut them out of what their linear gave: the rows lie apart."""
    return torch.randn(images, tokens, heads, width).transpose(1, 2)


CODED = [(2, 3, 5, 1, 1, 1), (1, 2, 65, 16, 32, 20), (3, 1, 7, 17, 72, 33), (1, 2, 49, 49, 24, 64)]


@pytest.mark.parametrize("biased", [None, "heads", "all"])
@pytest.mark.parametrize("alphabet", ["pm1", "01"])
@pytest.mark.parametrize("images, heads, queries, keys, bits, n", CODED)
def test_code_attention(images, heads, queries, keys, bits, n, alphabet, biased):
    q, k = _heads_of(images, heads, queries, bits), _heads_of(images, heads, keys, bits)
    v, scale = _heads_of(images, heads, keys, n), 0.3
    scores = scale * _code_scores(q, k, alphabet)
    bias = None
    if biased:
        bias = torch.randn(images if biased == "all" else 1, heads, queries, keys)
        bias[..., 1:].masked_fill_(torch.rand(queries, keys - 1) > 0.8, -torch.inf)
        scores = scores + bias.double()
    out = torch.ops.shiftadd.code_attention(q, k, v, bias, alphabet, scale)
    expected = scores.softmax(-1) @ v.double()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("alphabet", ["pm1", "01"])
@pytest.mark.parametrize("images, heads, queries, keys, bits, n", CODED)
def test_code_scores(images, heads, queries, keys, bits, n, alphabet):
    q, k = _heads_of(images, heads, queries, bits), _heads_of(images, heads, keys, bits)
    out = torch.ops.shiftadd.code_scores(q, k, alphabet)
    torch.testing.assert_close(out.double(), _code_scores(q, k, alphabet), rtol=1e-5, atol=1e-6)


def test_code_attention_of_any_size_of_scores_and_any_layout():
    """The softmax neither overflows nor divides by nothing; features that lie apart are copied."""
    for bits, scale in itertools.product((1, 16), (1e-6, 0.1, 1e4)):
        q, k, v = torch.randn(1, 2, 9, bits), torch.randn(1, 2, 20, bits), torch.randn(1, 2, 20, 8)
        apart = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
        expected = (scale * _code_scores(q, k, "pm1")).softmax(-1) @ v.double()
        for given in ((q, k, v), apart):
            out = torch.ops.shiftadd.code_attention(*given, None, "pm1", scale)
            torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.ops.shiftadd.code_attention(q[:, :, :0], k, v, None, "pm1", 1.0).numel() == 0


@pytest.mark.parametrize("chip", ["generic", "x86-64-v3"])
def test_code_attention_of_older_cpus(chip):
    q, k, v, bias = (torch.randn(1, 2, 40, width) for width in (70, 70, 33, 40))
    target, out = cpu_target(chip), torch.empty(1, 40, 2, 33)
    program = compile_program(code_attention(70, 33, "pm1", 0.5, True, target), target)
    program["main"](q, k, v, bias, out)
    expected = (0.5 * _code_scores(q, k, "pm1") + bias).softmax(-1) @ v.double()
    torch.testing.assert_close(out.transpose(1, 2).double(), expected, rtol=1e-5, atol=1e-5)


def test_operator_contracts_of_attention_on_codes():
    q, k, v = (_heads_of(2, 3, 5, 16) for _ in range(3))
    for bias in (None, torch.randn(1, 3, 5, 5)):
        given = (q, k, v, bias, "pm1", 0.25)
        torch.library.opcheck(torch.ops.shiftadd.code_attention.default, given)
    torch.library.opcheck(torch.ops.shiftadd.code_scores.default, (q, k, "01"))


@pytest.mark.parametrize("m, k, experts", [(1, 5, 2), (200, 64, 2), (77, 40, 5)])
@pytest.mark.parametrize("normalised", [False, True])
def test_top1_routing(m, k, experts, normalised):
    x, gate, bias = torch.randn(m, k), torch.randn(experts, k), torch.randn(experts)
    norm = torch.cat((torch.rand(k) + 0.5, torch.randn(k), torch.tensor([1e-6])))
    tokens = F.layer_norm(x, (k,), norm[:k], norm[k : 2 * k], 1e-6) if normalised else x
    expected, choice = F.linear(tokens, gate, bias).softmax(-1).max(-1)
    rows, counts = torch.empty(m, dtype=torch.int32), torch.empty(experts, dtype=torch.int32)
    probability = torch.empty(m)
    given = (x, gate, bias, norm) if normalised else (x, gate, bias)
    layer_kernel("top1_routing", k, experts, normalised)(*given, rows, probability, counts)
    assert counts.tolist() == torch.bincount(choice, minlength=experts).tolist()
    assert rows.tolist() == torch.argsort(choice, stable=True).tolist()
    torch.testing.assert_close(probability, expected[rows.long()], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "images, height, width, channels",
    [(1, 1, 1, 16), (2, 5, 7, 48), (1, 8, 2, 32), (2, 3, 9, 16), (1, 4, 14, 32), (1, 2, 20, 16)],
)
@pytest.mark.parametrize("activated", [False, True])
def test_depthwise_gelu(images, height, width, channels, activated):
    x, weight = torch.randn(images, height, width, channels), torch.randn(channels, 1, 3, 3)
    bias, out = torch.randn(channels), torch.empty_like(x)
    taps = weight.flatten(1).T.contiguous()
    layer_kernel("depthwise_gelu", channels, activated)(x, taps, bias, out)
    expected = F.conv2d(
        x.double().permute(0, 3, 1, 2), weight.double(), bias.double(), padding=1, groups=channels
    )
    expected = F.gelu(expected) if activated else expected
    torch.testing.assert_close(out.double(), expected.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)


def _linears(forms, k, n):
    parts = [pack_linear(quantise_weight(f, torch.randn(n, k), torch.randn(n))) for f in forms]
    return [list(part) for part in parts]


def _flat(parts):
    return [tensor for part in parts for tensor in part]


@pytest.mark.parametrize(
    "images, height, width", [(2, 3, 9), (1, 1, 1), (3, 5, 4), (0, 2, 2), (2, 30, 20)]
)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(
    "forms",
    [("shift_int8",), ("mult_int8", "shift_int8"), ("mult_int8", "shift_int4", "mult_int8")],
)
def test_depthwise_moe_is_its_steps(forms, added, images, height, width):
    channels, n = 48, 40
    x = torch.randn(images, height * width, channels)
    weight, bias = torch.randn(9, channels), torch.randn(channels)
    packed = _flat(_linears(forms, channels, n))
    residual = torch.randn(images, height * width, n) if added else None
    experts = len(forms) if len(forms) > 1 else 0
    gate = torch.randn(experts, channels) if experts else None
    gate_bias = torch.randn(experts) if experts else None
    hidden = torch.ops.shiftadd.depthwise_gelu(x, weight, bias, height, True)
    if experts:
        expected = torch.ops.shiftadd.moe(
            hidden, None, gate, gate_bias, packed, forms, [channels, n], False, residual
        )
    else:
        expected = torch.ops.shiftadd.linear(hidden, packed, forms[0], n, None, False, residual)
    actual = torch.ops.shiftadd.depthwise_moe(
        x, weight, bias, height, gate, gate_bias, packed, forms, n, residual
    )
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def _steps(x, norm, router, parts, forms, sizes, gelu, residual):
    """A mixture of experts by the operators that it stands for; without a router one expert."""
    depth, out = len(sizes) - 1, torch.empty(len(x), sizes[-1])
    rows, weight, counts = torch.arange(len(x)), torch.ones(len(x)), torch.tensor([len(x)])
    if router:
        rows, weight, counts = torch.ops.shiftadd.route(x, norm, *router)
    for expert, index in enumerate(rows.long().split(counts.tolist())):
        y = x[index]
        for step in range(depth):
            place, n = expert * depth + step, sizes[step + 1]
            first = (norm, gelu) if step == 0 else (None, False)
            y = torch.ops.shiftadd.linear(y, parts[place], forms[place], n, *first, None)
        out[index] = y
    out[rows.long()] *= weight[:, None]
    return out if residual is None else out + residual


@pytest.mark.parametrize(
    "widths, gelu, normalised, added",
    [
        ([40], False, True, False),
        ([40], True, False, True),
        ([70, 37], True, True, True),
        ([70, 37], False, False, False),
    ],
)
@pytest.mark.parametrize(
    "forms",
    [
        ("shift_int8",),
        ("mult_fp32",),
        ("mult_int8",) * 5,
        ("mult_int8", "shift_int4"),
        ("mult_int8", "shift_fp32"),
        ("mult_bf16", "shift_int8_wide"),
        ("mult_fp32", "shift_bf16"),
    ],
)
def test_experts_are_their_steps(forms, widths, gelu, normalised, added):
    k = 37
    norm = torch.cat((torch.rand(k) + 0.5, torch.randn(k), torch.tensor([1e-6])))
    norm = norm if normalised else None
    router = (torch.randn(len(forms), k), torch.randn(len(forms))) if len(forms) > 1 else ()
    sizes, each = [k, *widths], [form for form in forms for _ in widths]
    parts = [
        part
        for form in forms
        for inputs, n in pairwise(sizes)
        for part in _linears([form], inputs, n)
    ]
    gates = router or (None, None)
    for m in (0, 1, 60):
        x, residual = torch.randn(m, k), torch.randn(m, widths[-1]) if added else None
        out = torch.ops.shiftadd.moe(x, norm, *gates, _flat(parts), each, sizes, gelu, residual)
        expected = _steps(x, norm, router, parts, each, sizes, gelu, residual)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chip", [None, "generic"])
def test_gelu_keeps_its_digits_over_the_whole_range(chip):
    values = torch.cat([torch.linspace(-9, 9, 16 * 4001), torch.logspace(-30, 30, 16 * 101)])
    target = cpu_target(chip)

    def body():
        count = T.int32()
        x, out = (argument(name, (count, 16), "float32") for name in ("x", "out"))
        with T.parallel(0, count) as row:
            T.buffer_store(out, gelu(target)(x[row, at(0, 16)]), [row, at(0, 16)])

    for x in (values, -values):
        x = x.view(-1, 16)
        out = torch.empty_like(x)
        compile_program(program(body), target)["main"](x, out)
        expected = F.gelu(x.double())
        # The quotient is as good as its own error, the pieces as the last place of 1/2.
        limit = 1.5e-7 if gelu(target) is _by_pieces else 5e-7
        assert ((out - expected).abs() <= limit * x.abs()).all()


@pytest.mark.parametrize("experts", [2, 4])
def test_a_probability_keeps_its_digits_however_far_the_others_are_behind(experts):
    behind = -torch.cat([torch.zeros(16), torch.linspace(0, 200, 16 * 2001)]).view(-1, 16)

    def body():
        count = T.int32()
        x, out = (argument(name, (count, 16), "float32") for name in ("x", "out"))
        with T.parallel(0, count) as row:
            logits = [x[row, at(0, 16)] for _ in range(experts - 1)]
            # Of two the chosen one is left out, as ``choose`` does.
            chosen = [] if experts == 2 else [T.broadcast(T.float32(0), 16)]
            T.buffer_store(out, probability(chosen + logits, 16), [row, at(0, 16)])

    out = torch.empty_like(behind)
    compile_program(program(body), cpu_target())["main"](behind, out)
    expected = 1 / (1 + (experts - 1) * behind.double().exp())
    torch.testing.assert_close(out.double(), expected, rtol=5e-7, atol=0)


def test_experts_take_tokens_of_any_layout():
    forms, sizes, parts = ["mult_int8"], [24, 24], _linears(["mult_int8"], 24, 24)
    tokens = torch.randn(2, 24, 7).transpose(1, 2)
    given = (None, None, None, _flat(parts), forms, sizes, False)
    expected = torch.ops.shiftadd.moe(tokens.reshape(14, 24), *given, None).view(2, 7, 24)
    for x in (tokens, tokens.contiguous(), tokens.reshape(2, 7, 1, 24)):
        for residual in (None, tokens, tokens.contiguous()):
            added = None if residual is None else residual.reshape(x.shape)
            out = torch.ops.shiftadd.moe(x, *given, added).view(2, 7, 24)
            torch.testing.assert_close(out, expected + (0 if residual is None else tokens))


@pytest.mark.parametrize(
    "k, n, forms",
    [
        (64, 48, ["mult_int8", "shift_int8"]),
        (40, 24, ["mult_int8", "shift_int4", "mult_int8"]),
        # Weights that a core's cache does not keep: more tokens at a time.
        (1024, 1536, ["mult_int8", "shift_int8"]),
    ],
)
def test_a_mixture_is_the_same_on_any_threads_and_over_blocks(k, n, forms):
    parts, experts = _linears(forms, k, n), len(forms)
    router = (torch.randn(experts, k), torch.zeros(experts))
    for m in (3, 29, 1300):
        x, found = torch.randn(m, k), []
        for threads in (1, 2, 3):
            set_threads(threads)
            found.append(
                torch.ops.shiftadd.moe(x, None, *router, _flat(parts), forms, [k, n], False, None)
            )
        set_threads(1)
        for other in found[1:]:
            torch.testing.assert_close(found[0], other, rtol=0, atol=0)
        expected = _steps(x, None, router, parts, forms, [k, n], False, None)
        torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_operator_contracts_of_experts(gated):
    forms, sizes, x = ["mult_int8", "shift_int8"], [16, 16], torch.randn(5, 16)
    if gated:
        router = (torch.randn(2, 16), torch.randn(2))
        torch.library.opcheck(torch.ops.shiftadd.route.default, (x, None, *router))
    else:
        forms, router = forms[:1], (None, None)
    packed = _flat(_linears(forms, 16, 16))
    given = (x, None, *router, packed, forms, sizes, False, None)
    torch.library.opcheck(torch.ops.shiftadd.moe.default, given)
    image, conv = torch.randn(1, 6, 16), (torch.randn(9, 16), torch.randn(16), 2)
    given = (image, *conv, *router, packed, forms, 16, None)
    torch.library.opcheck(torch.ops.shiftadd.depthwise_moe.default, given)


@pytest.mark.parametrize("shape", [(1, 5), (3, 7, 64), (0, 16), (2, 3, 5, 40)])
def test_layer_norm(shape):
    k, x = shape[-1], 3 * torch.randn(shape) + 1
    weight, bias = torch.randn(k), torch.randn(k)
    out = torch.ops.shiftadd.layer_norm(x, torch.cat((weight, bias, torch.tensor([1e-5]))))
    expected = F.layer_norm(x.double(), (k,), weight.double(), bias.double(), 1e-5)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_layer_norm_of_images_whose_channels_lie_apart():
    x, norm = torch.randn(2, 24, 3, 5), torch.rand(2 * 24 + 1)
    tokens = x.flatten(2).transpose(1, 2)
    out = torch.ops.shiftadd.layer_norm(tokens, norm)
    expected = F.layer_norm(tokens, (24,), norm[:24], norm[24:48], float(norm[48]))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side, stride, padding", [(4, 4, 0), (7, 4, 3), (3, 2, 1), (2, 1, 0)])
@pytest.mark.parametrize("images, channels, height, width", [(1, 3, 16, 12), (2, 5, 9, 14)])
def test_patches_are_what_a_convolution_multiplies(
    side, stride, padding, images, channels, height, width
):
    x, weight = torch.randn(images, channels, height, width), torch.randn(6, channels, side, side)
    rows = torch.ops.shiftadd.patches(x, side, stride, padding)
    expected = F.conv2d(x.double(), weight.double(), stride=stride, padding=padding)
    found = (rows.double() @ weight.double().flatten(1).T).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, expected)

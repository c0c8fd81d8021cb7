"""Whole layers of a deployed model as torch operators, on the CPU.

``torch.ops.shiftadd.angular_attention``: what lies between the projections of an add attention.
``torch.ops.shiftadd.route``: tokens to experts, as ``kernels.lowerings.routing`` has it.
``torch.ops.shiftadd.moe``: a mixture of experts from its layer norm to the residual. Each token is
read from where it lies and its result written to where it belongs: nothing is gathered or
scattered in between, and the number of tokens of an expert is seen by this operator alone.
``torch.ops.shiftadd.depthwise_gelu``: the convolution between two linears of a PVT v2 MLP.
``torch.ops.shiftadd.layer_norm``: of tokens, where no linear behind does it.
``torch.ops.shiftadd.patches``: what a convolution multiplies, as rows for a linear.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.build import get_threads
from kernels.layer_kernels import layer_kernel
from kernels.lowerings.add import LONG_TOKENS
from kernels.torch_ops import linear_kernel

_library = torch.library.Library("shiftadd", "FRAGMENT")
_library.define("angular_attention(Tensor qkv, Tensor conv, str alphabet) -> Tensor")
_library.define(
    "route(Tensor x, Tensor? norm, Tensor gate, Tensor gate_bias) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "moe(Tensor x, Tensor? norm, Tensor gate, Tensor gate_bias, Tensor[] packed, int[] lengths,"
    " str[] forms, int[] sizes, bool gelu, Tensor? residual) -> Tensor"
)
_library.define(
    "depthwise_gelu(Tensor x, Tensor weight, Tensor bias, int height, bool gelu) -> Tensor"
)
_library.define("layer_norm(Tensor x, Tensor norm) -> Tensor")
_library.define("patches(Tensor x, int side, int stride, int padding) -> Tensor")
# A chunk's own tables cost as much as some tokens: cutting a sequence must spare more than that.
_SPLIT_GAIN = 1.2


def _angular_attention(qkv: Tensor, conv: Tensor, alphabet: str) -> Tensor:
    heads, window = conv.shape
    images, tokens, width = qkv.shape
    head_dim = width // (3 * heads)
    out = qkv.new_empty(images, tokens, heads, head_dim)
    if out.numel():
        threads, sequences = get_threads(), images * heads
        split = -(-sequences // threads) * threads > _SPLIT_GAIN * sequences
        group_bits = 6 if tokens >= LONG_TOKENS else 4
        kernel = layer_kernel("angular_attention", head_dim, window, alphabet, split, group_bits)
        kernel(qkv.contiguous().view(images, tokens, 3, heads, head_dim), conv, out)
    return out.view(images, tokens, heads * head_dim)


def _angular_attention_fake(qkv: Tensor, conv: Tensor, alphabet: str) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)


def _route(
    x: Tensor, norm: Tensor | None, gate: Tensor, gate_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (m, k), experts = x.shape, gate.shape[0]
    rows, probability = x.new_empty(m, dtype=torch.int32), x.new_empty(m)
    counts = x.new_zeros(experts, dtype=torch.int32)
    if m:
        given = (x, gate, gate_bias) if norm is None else (x, gate, gate_bias, norm)
        kernel = layer_kernel("top1_routing", k, experts, norm is not None)
        kernel(*given, rows, probability, counts)
    return rows, probability, counts


def _route_fake(
    x: Tensor, norm: Tensor | None, gate: Tensor, gate_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    m, int32 = x.shape[0], torch.int32
    counts = x.new_empty(gate.shape[0], dtype=int32)
    return x.new_empty(m, dtype=int32), x.new_empty(m), counts


def _moe(
    x: Tensor,
    norm: Tensor | None,
    gate: Tensor,
    gate_bias: Tensor,
    packed: list[Tensor],
    lengths: list[int],
    forms: list[str],
    sizes: list[int],
    gelu: bool,
    residual: Tensor | None,
) -> Tensor:
    """One or two linears an expert: ``sizes`` are k and n of each, in turn; so are the others."""
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    (m, k), n, experts = tokens.shape, sizes[-1], gate.shape[0]
    out = tokens.new_empty(m, n)
    rows, probability, counts = _route(tokens, norm, gate, gate_bias)
    beside = [] if norm is None else [norm]
    added = [] if residual is None else [residual.reshape(-1, n).contiguous()]
    first_around = ("layer_norm",) * (norm is not None)
    last_around = ("residual",) * (residual is not None)
    depth, start = len(forms) // experts, 0
    parts = _cut(packed, lengths)
    for expert, count in enumerate(counts.tolist()):
        if count:
            index, weight = rows[start : start + count], probability[start : start + count]
            own = range(expert * depth, (expert + 1) * depth)
            if depth == 1:
                around = ("gather", "scatter", *first_around, *last_around)
                kernel = linear_kernel(forms[own[0]], k, n, x.device, around)
                kernel.launch(tokens, *parts[own[0]], *beside, *added, index, weight, out)
            else:
                around = ("gather", *first_around, *(("gelu",) * gelu))
                hidden = tokens.new_empty(count, sizes[1])
                kernel = linear_kernel(forms[own[0]], k, sizes[1], x.device, around)
                kernel.launch(tokens, *parts[own[0]], *beside, index, hidden)
                kernel = linear_kernel(
                    forms[own[1]], sizes[1], n, x.device, ("scatter", *last_around)
                )
                kernel.launch(hidden, *parts[own[1]], *added, index, weight, out)
        start += count
    return out.view(*x.shape[:-1], n)


def _cut(packed: list[Tensor], lengths: list[int]) -> list[list[Tensor]]:
    parts, start = [], 0
    for length in lengths:
        parts.append(packed[start : start + length])
        start += length
    return parts


def _moe_fake(
    x: Tensor,
    norm: Tensor | None,
    gate: Tensor,
    gate_bias: Tensor,
    packed: list[Tensor],
    lengths: list[int],
    forms: list[str],
    sizes: list[int],
    gelu: bool,
    residual: Tensor | None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], sizes[-1])


def _depthwise_gelu(x: Tensor, weight: Tensor, bias: Tensor, height: int, gelu: bool) -> Tensor:
    images, tokens, channels = x.shape
    grid = x.contiguous().view(images, height, tokens // height, channels)
    out = torch.empty_like(grid)
    layer_kernel("depthwise_gelu", channels, gelu)(grid, weight, bias, out)
    return out.view(x.shape)


def _depthwise_gelu_fake(
    x: Tensor, weight: Tensor, bias: Tensor, height: int, gelu: bool
) -> Tensor:
    return x.new_empty(x.shape)


def _layer_norm(x: Tensor, norm: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty_like(rows)
    if out.numel():
        layer_kernel("layer_norm", rows.shape[1])(rows, norm, out)
    return out.view(x.shape)


def _layer_norm_fake(x: Tensor, norm: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _patches(x: Tensor, side: int, stride: int, padding: int) -> Tensor:
    out = _patches_fake(x, side, stride, padding)
    if out.numel():
        channels = x.shape[1]
        windows = out.view(*out.shape[:3], channels, side, side)
        layer_kernel("patches", side, stride, padding)(x.contiguous(), windows)
    return out


def _patches_fake(x: Tensor, side: int, stride: int, padding: int) -> Tensor:
    images, channels, height, width = x.shape
    rows, columns = ((n + 2 * padding - side) // stride + 1 for n in (height, width))
    return x.new_empty(images, rows, columns, channels * side * side)


for _name, _implementation, _fake in (
    ("angular_attention", _angular_attention, _angular_attention_fake),
    ("route", _route, _route_fake),
    ("moe", _moe, _moe_fake),
    ("depthwise_gelu", _depthwise_gelu, _depthwise_gelu_fake),
    ("layer_norm", _layer_norm, _layer_norm_fake),
    ("patches", _patches, _patches_fake),
):
    _library.impl(_name, _implementation, "CPU")
    torch.library.register_fake(f"shiftadd::{_name}", _fake, lib=_library)

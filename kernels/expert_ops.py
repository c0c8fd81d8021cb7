"""Mixtures of experts as torch operators, on the CPU.

``torch.ops.shiftadd.route``: tokens to experts, as ``kernels.lowerings.routing`` has it.
``torch.ops.shiftadd.moe``: a mixture of experts from its layer norm to the residual. Each token is
read from where it lies and its result written to where it belongs: nothing is gathered or
scattered in between, and the number of tokens of an expert is seen by this operator alone.
``torch.ops.shiftadd.depthwise_linear``: PVT v2's convolution with GELU and the linear, or the
mixture of linears, behind it, of forms that quantise what they read.

Where all experts quantise what they read it is done once, by the kernel that chooses among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.forms import quantises
from kernels.layer_kernels import layer_kernel
from kernels.packing import DOT_GROUP
from kernels.torch_ops import last_dimension, linear_kernel

_library = torch.library.Library("shiftadd", "FRAGMENT")
_library.define(
    "route(Tensor x, Tensor? norm, Tensor gate, Tensor gate_bias) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "moe(Tensor x, Tensor? norm, Tensor gate, Tensor gate_bias, Tensor[] packed, int[] lengths,"
    " str[] forms, int[] sizes, bool gelu, Tensor? residual) -> Tensor"
)
_library.define(
    "depthwise_linear(Tensor x, Tensor weight, Tensor bias, int height, Tensor? gate,"
    " Tensor? gate_bias, Tensor[] packed, int[] lengths, str[] forms, int n, Tensor? residual)"
    " -> Tensor"
)


class _Route(NamedTuple):
    """Rows in the order of the experts, the probabilities of their choices, tokens an expert."""

    rows: Tensor
    probability: Tensor
    counts: Tensor


class _Given(NamedTuple):
    """What the first linear of each expert reads.

    Attributes:
        x: All tokens.
        beside: The layer norm in front, or the scales of codes.
        around: What the linear does in front of its product.
    """

    x: Tensor
    beside: list[Tensor]
    around: tuple[str, ...]


def _route(
    x: Tensor, norm: Tensor | None, gate: Tensor, gate_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    (m, k), experts = x.shape, gate.shape[0]
    route = _room(x, m, experts)
    if m:
        given = (x, gate, gate_bias) if norm is None else (x, gate, gate_bias, norm)
        layer_kernel("top1_routing", k, experts, norm is not None)(*given, *route)
    else:
        route.counts.zero_()
    return route.rows, route.probability, route.counts


def _room(x: Tensor, m: int, experts: int) -> _Route:
    int32 = torch.int32
    rows, counts = x.new_empty(m, dtype=int32), x.new_empty(experts, dtype=int32)
    return _Route(rows, x.new_empty(m), counts)


def _route_fake(
    x: Tensor, norm: Tensor | None, gate: Tensor, gate_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _room(x, x.shape[0], gate.shape[0])


def _quantised(
    tokens: Tensor, norm: Tensor | None, gate: Tensor, gate_bias: Tensor
) -> tuple[_Given, _Route]:
    (m, k), experts = tokens.shape, gate.shape[0]
    codes = tokens.new_empty(m, -(-k // DOT_GROUP) * DOT_GROUP, dtype=torch.uint8)
    scale, route = tokens.new_empty(m), _room(tokens, m, experts)
    beside = () if norm is None else (norm,)
    kernel = layer_kernel("routing_codes", k, experts, norm is not None)
    kernel(tokens, gate, gate_bias, *beside, codes, scale, *route)
    return _Given(codes, [scale], ("codes",)), route


def _dispatched(route: _Route) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Experts that have tokens: (expert, rows of its tokens, their probabilities)."""
    start = 0
    for expert, count in enumerate(route.counts.tolist()):
        if count:
            part = slice(start, start + count)
            yield expert, route.rows[part], route.probability[part]
        start += count


def _one_linear_each(
    given: _Given,
    route: _Route,
    forms: Sequence[str],
    parts: list[list[Tensor]],
    sizes: tuple[int, int],
    added: list[Tensor],
    out: Tensor,
) -> None:
    around = ("gather", "scatter", *given.around, *(("residual",) * len(added)))
    for expert, index, weight in _dispatched(route):
        kernel = linear_kernel(forms[expert], *sizes, out.device, around)
        kernel.launch(given.x, *parts[expert], *given.beside, *added, index, weight, out)


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
    out, depth = tokens.new_empty(m, n), len(forms) // experts
    if not m:
        return out.view(*x.shape[:-1], n)
    if all(quantises(form) for form in forms[::depth]):
        given, route = _quantised(tokens, norm, gate, gate_bias)
    else:
        route = _Route(*_route(tokens, norm, gate, gate_bias))
        norms = [] if norm is None else [norm]
        given = _Given(tokens, norms, ("layer_norm",) * len(norms))
    added = [] if residual is None else [residual.reshape(-1, n).contiguous()]
    parts = _cut(packed, lengths)
    if depth == 1:
        _one_linear_each(given, route, forms, parts, (k, n), added, out)
        return out.view(*x.shape[:-1], n)
    before = ("gather", *given.around, *(("gelu",) * gelu))
    behind = ("scatter", *(("residual",) * len(added)))
    for expert, index, weight in _dispatched(route):
        first, second = 2 * expert, 2 * expert + 1
        hidden = tokens.new_empty(len(index), sizes[1])
        kernel = linear_kernel(forms[first], k, sizes[1], x.device, before)
        kernel.launch(given.x, *parts[first], *given.beside, index, hidden)
        kernel = linear_kernel(forms[second], sizes[1], n, x.device, behind)
        kernel.launch(hidden, *parts[second], *added, index, weight, out)
    return out.view(*x.shape[:-1], n)


def _cut(packed: list[Tensor], lengths: list[int]) -> list[list[Tensor]]:
    parts, start = [], 0
    for length in lengths:
        parts.append(packed[start : start + length])
        start += length
    return parts


def _depthwise_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    height: int,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    packed: list[Tensor],
    lengths: list[int],
    forms: list[str],
    n: int,
    residual: Tensor | None,
) -> Tensor:
    """One linear without a gate, one an expert with it; forms that quantise their input."""
    images, tokens, channels = x.shape
    m, experts = images * tokens, 0 if gate is None else gate.shape[0]
    out = x.new_empty(m, n)
    if not m:
        return out.view(*x.shape[:-1], n)
    grid = x.contiguous().view(images, height, tokens // height, channels)
    codes, scale = x.new_empty(m, channels, dtype=torch.uint8), x.new_empty(m)
    router = () if gate is None else (gate, gate_bias)
    route = _room(x, m, experts) if experts else None
    kernel = layer_kernel("depthwise_codes", channels, experts)
    kernel(grid, weight, bias, *router, codes, scale, *(route or ()))
    added = [] if residual is None else [residual.reshape(-1, n).contiguous()]
    if route is not None:
        given = _Given(codes, [scale], ("codes",))
        parts = _cut(packed, lengths)
        _one_linear_each(given, route, forms, parts, (channels, n), added, out)
    else:
        around = ("codes", *(("residual",) * len(added)))
        linear = linear_kernel(forms[0], channels, n, x.device, around)
        linear.launch(codes, *packed, scale, *added, out)
    return out.view(*x.shape[:-1], n)


for _name, _implementation, _fake in (
    ("route", _route, _route_fake),
    ("moe", _moe, last_dimension(7)),
    ("depthwise_linear", _depthwise_linear, last_dimension(9)),
):
    _library.impl(_name, _implementation, "CPU")
    torch.library.register_fake(f"shiftadd::{_name}", _fake, lib=_library)

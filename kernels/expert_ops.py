"""MLPs and mixtures of experts as torch operators, on the CPU.

``route``: tokens to experts, as ``kernels.lowerings.routing`` has it.
``moe``: a mixture of experts, or one expert alone, from its layer norm to the residual.
``depthwise_moe``: PVT v2's convolution with GELU and the linear, or mixture of linears, behind it.

Each is one launch of one program: the number of tokens of an expert is seen by it alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from itertools import cycle, pairwise

import torch
from torch import Tensor

from kernels.build import get_threads
from kernels.launches import launch
from kernels.layer_kernels import layer_kernel
from kernels.lowerings.amx import BLOCK_ROWS
from kernels.lowerings.arithmetic import fastest
from kernels.lowerings.mixture import Sizes
from kernels.lowerings.panel_gemm import RESIDENT_WEIGHT_BYTES, default_tile_rows
from kernels.lowerings.register_tiles import largest_tile_rows
from kernels.operators import operator
from kernels.packing import NIBBLE_BITS
from kernels.targets import cpu_target
from kernels.torch_ops import last_dimension
from kernels.workload import linear as linear_workload

# Tokens that a thread routes at a time: their codes fit in a core's own cache beside the weights of
# some experts, and an expert's weights, once fetched, serve many of them.
_BLOCK_ROWS = 512
# Tokens of a task whose expert has weights that the cache does not keep, and of one that decodes
# them for AMX's tiles.
_FAR_TASK_ROWS, _DECODED_TASK_ROWS = 256, 64


def _route(
    x: Tensor, norm: Tensor | None, gate: Tensor, gate_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in the order of the experts, the probabilities of their choices, tokens an expert."""
    (m, k), experts = x.shape, gate.shape[0]
    rows, probability, counts = _route_fake(x, norm, gate, gate_bias)
    if m:
        given = (x, gate, gate_bias) if norm is None else (x, gate, gate_bias, norm)
        kernel = layer_kernel("top1_routing", k, experts, norm is not None)
        launch(kernel, *given, rows, probability, counts)
    else:
        counts.zero_()
    return rows, probability, counts


def _route_fake(
    x: Tensor, norm: Tensor | None, gate: Tensor, gate_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    m, experts, int32 = x.shape[0], gate.shape[0], torch.int32
    rows, counts = x.new_empty(m, dtype=int32), x.new_empty(experts, dtype=int32)
    return rows, x.new_empty(m), counts


@functools.cache
def experts_kernel(
    name: str, sizes: tuple[int, ...], forms: tuple[str, ...], threads: int, *there: bool
) -> Callable[..., None]:
    """The program of some experts for any number of tokens.

    Args:
        name: In ``kernels.layer_kernels``: ``mixture`` or ``depthwise_mixture``.
        sizes: k and n of each of an expert's linears, in turn.
        forms: Of the linears, those of the first expert first.
        threads: That share the tokens.
        there: Layer norm, GELU and residual.
    """
    each, target = list(pairwise(sizes)), cpu_target()
    linears = [linear_workload(form, 1, *size) for form, size in zip(forms, cycle(each))]
    by_amx = [bool(fastest(form, target).unit.amx) for form in forms]
    own_rows = [default_tile_rows(one, target) for one in linears]
    most = max((rows for rows, amx in zip(own_rows, by_amx) if not amx), default=BLOCK_ROWS)
    # A task is then one tile of every linear; tiles of half panels are of some linears only.
    whole_panels = most <= largest_tile_rows(target) or all(by_amx)
    tile_rows = (most,) * len(forms) if whole_panels else tuple(own_rows)
    task_rows, experts = BLOCK_ROWS if any(by_amx) else most, len(forms) // len(each)
    weight_bytes = sum(one.weight_bytes for one in linears) / experts
    if weight_bytes > RESIDENT_WEIGHT_BYTES:
        task_rows = _FAR_TASK_ROWS // task_rows * task_rows
    elif any(by_amx) and any(one.code_bits == NIBBLE_BITS for one in linears):
        task_rows = _DECODED_TASK_ROWS
    block_rows = task_rows if experts == 1 else _BLOCK_ROWS
    fixed = (block_rows, task_rows, tile_rows, threads, sizes[0], sizes[1:], forms)
    return layer_kernel(name, Sizes(*fixed, *there))


def _of_images(x: Tensor) -> Tensor:
    """``(..., n)`` as ``(images, tokens, n)``, without a view where it can be: that takes time."""
    return (x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])).contiguous()


def _moe(
    x: Tensor,
    norm: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    packed: Sequence[Tensor],
    forms: Sequence[str],
    sizes: Sequence[int],
    gelu: bool,
    residual: Tensor | None,
) -> Tensor:
    """One or two linears an expert: ``sizes`` are k and n of each, in turn; so are the others."""
    out = x.new_empty((*x.shape[:-1], sizes[-1]))
    if out.numel():
        there = (norm is not None, gelu, residual is not None)
        kernel = experts_kernel("mixture", tuple(sizes), tuple(forms), get_threads(), *there)
        given = [tensor for tensor in (norm, gate, gate_bias) if tensor is not None]
        added = () if residual is None else (_of_images(residual),)
        launch(kernel, _of_images(x), *given, *packed, *added, _of_images(out))
    return out


def _depthwise_moe(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    height: int,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    packed: Sequence[Tensor],
    forms: Sequence[str],
    n: int,
    residual: Tensor | None,
) -> Tensor:
    """One linear without a gate, one an expert with it; forms that quantise their input."""
    images, tokens, channels = x.shape
    out = x.new_empty(images, tokens, n)
    if out.numel():
        grid = x.contiguous().view(images, height, tokens // height, channels)
        router = () if gate is None else (gate, gate_bias)
        there = (False, False, residual is not None)
        kernel = experts_kernel(
            "depthwise_mixture", (channels, n), tuple(forms), get_threads(), *there
        )
        added = () if residual is None else (residual.contiguous(),)
        launch(kernel, grid, weight, bias, *router, *packed, *added, out)
    return out


route = operator(
    "route(Tensor x, Tensor? norm, Tensor gate, Tensor gate_bias) -> (Tensor, Tensor, Tensor)",
    _route,
    _route_fake,
)
moe = operator(
    "moe(Tensor x, Tensor? norm, Tensor? gate, Tensor? gate_bias, Tensor[] packed, str[] forms,"
    " int[] sizes, bool gelu, Tensor? residual) -> Tensor",
    _moe,
    last_dimension(6),
)
depthwise_moe = operator(
    "depthwise_moe(Tensor x, Tensor weight, Tensor bias, int height, Tensor? gate,"
    " Tensor? gate_bias, Tensor[] packed, str[] forms, int n, Tensor? residual) -> Tensor",
    _depthwise_moe,
    last_dimension(8),
)

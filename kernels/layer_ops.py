"""Whole layers of a deployed model as torch operators, on the CPU.

``angular_attention``: what lies between the projections of an add attention.
``code_attention``, ``code_scores``: attention over all pairs of tokens on binary codes, and its
scores alone.
``depthwise_gelu``: the convolution between two linears of a PVT v2 MLP.
``layer_norm``: of tokens, where no linear behind does it.
``patches``: what a convolution multiplies, as rows for a linear.

``kernels.expert_ops`` has mixtures of experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.build import get_threads
from kernels.launches import launch
from kernels.layer_kernels import layer_kernel
from kernels.lowerings.add import LONG_TOKENS
from kernels.operators import operator

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
        launch(kernel, qkv.contiguous().view(images, tokens, 3, heads, head_dim), conv, out)
    return out.view(images, tokens, heads * head_dim)


def _angular_attention_fake(qkv: Tensor, conv: Tensor, alphabet: str) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3)


def _code_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, alphabet: str, scale: float
) -> Tensor:
    out = _code_attention_fake(q, k, v, bias, alphabet, scale)
    if out.numel():
        fixed = (q.shape[-1], v.shape[-1], alphabet, scale, bias is not None)
        given = [q, k, v] if bias is None else [q, k, v, bias.expand(*q.shape[:-1], k.shape[-2])]
        kernel = layer_kernel("code_attention", *fixed)
        launch(kernel, *map(_in_rows, given), out.transpose(1, 2))
    return out


def _code_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, alphabet: str, scale: float
) -> Tensor:
    images, heads, queries, _ = q.shape
    # As attentions put their heads together: that is then a view.
    return q.new_empty(images, queries, heads, v.shape[-1]).transpose(1, 2)


def _code_scores(q: Tensor, k: Tensor, alphabet: str) -> Tensor:
    out = _code_scores_fake(q, k, alphabet)
    if out.numel():
        kernel = layer_kernel("code_scores", q.shape[-1], alphabet)
        launch(kernel, _in_rows(q), _in_rows(k), out)
    return out


def _code_scores_fake(q: Tensor, k: Tensor, alphabet: str) -> Tensor:
    return q.new_empty(*q.shape[:-1], k.shape[-2])


def _in_rows(x: Tensor) -> Tensor:
    """A tensor whose last dimension lies together, also where it is of one element alone."""
    return x if x.stride(-1) == 1 else x.clone(memory_format=torch.contiguous_format)


def _depthwise_gelu(x: Tensor, weight: Tensor, bias: Tensor, height: int, gelu: bool) -> Tensor:
    images, tokens, channels = x.shape
    grid = x.contiguous().view(images, height, tokens // height, channels)
    out = torch.empty_like(grid)
    launch(layer_kernel("depthwise_gelu", channels, gelu), grid, weight, bias, out)
    return out.view(x.shape)


def _depthwise_gelu_fake(
    x: Tensor, weight: Tensor, bias: Tensor, height: int, gelu: bool
) -> Tensor:
    return x.new_empty(x.shape)


def _layer_norm(x: Tensor, norm: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    out = torch.empty_like(rows)
    if out.numel():
        launch(layer_kernel("layer_norm", rows.shape[1]), rows, norm, out)
    return out.view(x.shape)


def _layer_norm_fake(x: Tensor, norm: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _patches(x: Tensor, side: int, stride: int, padding: int) -> Tensor:
    out = _patches_fake(x, side, stride, padding)
    if out.numel():
        channels = x.shape[1]
        windows = out.view(*out.shape[:3], channels, side, side)
        launch(layer_kernel("patches", side, stride, padding), x.contiguous(), windows)
    return out


def _patches_fake(x: Tensor, side: int, stride: int, padding: int) -> Tensor:
    images, channels, height, width = x.shape
    rows, columns = ((n + 2 * padding - side) // stride + 1 for n in (height, width))
    return x.new_empty(images, rows, columns, channels * side * side)


angular_attention = operator(
    "angular_attention(Tensor qkv, Tensor conv, str alphabet) -> Tensor",
    _angular_attention,
    _angular_attention_fake,
)
code_attention = operator(
    "code_attention(Tensor q, Tensor k, Tensor v, Tensor? bias, str alphabet, float scale)"
    " -> Tensor",
    _code_attention,
    _code_attention_fake,
)
code_scores = operator(
    "code_scores(Tensor q, Tensor k, str alphabet) -> Tensor", _code_scores, _code_scores_fake
)
depthwise_gelu = operator(
    "depthwise_gelu(Tensor x, Tensor weight, Tensor bias, int height, bool gelu) -> Tensor",
    _depthwise_gelu,
    _depthwise_gelu_fake,
)
layer_norm = operator("layer_norm(Tensor x, Tensor norm) -> Tensor", _layer_norm, _layer_norm_fake)
patches = operator(
    "patches(Tensor x, int side, int stride, int padding) -> Tensor", _patches, _patches_fake
)

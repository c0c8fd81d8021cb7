"""Linear-angular attention around the products with binary codes, in one kernel.

What lies around the two products costs a deployed model more than they do where each step is an
operator of its own: cutting queries, keys and values apart, scaling, normalising, the convolution
along the tokens, putting the heads together again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.lowerings.add import Rows, add_attention
from kernels.lowerings.code_groups import groups_of
from kernels.lowerings.emit import (
    SIGN_BITS,
    argument,
    at,
    fill,
    lanes_total,
    local,
    program,
    spans,
)
from kernels.targets import KernelTarget

# F.normalize divides by no less.
_LEAST_LENGTH = 1e-12


def angular_attention(
    head_dim: int,
    window: int,
    alphabet: str,
    split: bool,
    group_bits: int,
    target: KernelTarget,
) -> tirx.PrimFunc:
    """``normalise(v/2 + q(kᵀv) / (π head_dim √tokens)) + conv(v)``: ``main(qkv, conv, out)``.

    Shapes: qkv ``(images, tokens, 3, heads, head_dim)``, conv ``(heads, window)``, out
    ``(images, tokens, heads, head_dim)``; all fp32. The codes of a head are the signs of its
    queries and keys, a bit for each feature.

    Args:
        head_dim: Features of a head.
        window: Tokens under the convolution, odd.
        alphabet: ``pm1`` or ``01``.
        split: Cut each sequence into chunks, for fewer heads than threads.
        group_bits: Of ``kernels.lowerings.add``.
        target: The CPU.

    Source:
        Castling-ViT, arXiv 2211.10526; ShiftAddViT, arXiv 2306.06446.
    """
    groups = groups_of(head_dim, group_bits)

    def body() -> None:
        images, tokens, heads = T.int32(), T.int32(), T.int32()
        qkv = argument("qkv", (images, tokens, 3, heads, head_dim), "float32")
        conv = argument("conv", (heads, window), "float32")
        out = argument("out", (images, tokens, heads, head_dim), "float32")

        def sequence(batch: Any) -> tuple[Rows, Rows, Rows]:
            image, head = tirx.floordiv(batch, heads), tirx.floormod(batch, heads)

            def part(index: int) -> Rows:
                return Rows(qkv, lambda token: [image, token, index, head])

            return part(0), part(1), part(2)

        def finish(batch: Any) -> Callable:
            values = sequence(batch)[2]
            image, head = tirx.floordiv(batch, heads), tirx.floormod(batch, heads)

            def normalised(token: Any, sums: list[tuple[Any, int, Any]]) -> None:
                factor = T.float32(1 / (math.pi * head_dim)) / tirx.sqrt(
                    tirx.Cast("float32", tokens)
                )
                taps = _taps(conv, head, token, tokens, window)
                angular, length = local(head_dim), local(2)
                T.buffer_store(length, T.float32(0), [0])
                for where, lanes, total in sums:
                    half = qkv[(*values.place(token), where)] * fill(T.float32(0.5), lanes)
                    T.buffer_store(angular, half + total * fill(factor, lanes), [where])
                _length(angular, head_dim, length)
                for where, lanes, _ in sums:
                    value = angular[where] * fill(length[0], lanes)
                    for place, weight in taps:
                        near = qkv[(*values.place(place), where)]
                        value = value + near * fill(weight, lanes)
                    T.buffer_store(out, value, [image, token, head, where])

            return normalised

        add_attention(sequence, finish, groups, alphabet == "pm1", images * heads, tokens, split)

    return program(body, SIGN_BITS)


def _taps(conv: Any, head: Any, token: Any, tokens: Any, window: int) -> list[tuple[Any, Any]]:
    """Tokens under the convolution and their weights; one beyond an end weighs nothing."""
    found = []
    weights = local(window)
    for tap in range(window):
        place = token + (tap - window // 2)
        inside = tirx.And(place >= 0, place < tokens)
        weight = tirx.Select(inside, conv[head, tap], T.float32(0))
        T.buffer_store(weights, weight, [tap])
        near = tirx.max(tirx.min(place, tokens - 1), tirx.const(0, "int32"))
        found.append((near, weights[tap]))
    return found


def _length(vector: Any, width: int, length: Any) -> None:
    """Writes the inverse of a vector's length into ``length[0]``."""
    parts = list(spans(width))
    widest = parts[0][1]
    squares = local(widest)
    for offset, lanes in parts:
        value = vector[at(offset, lanes)]
        own = at(0, lanes)
        square = value * value
        T.buffer_store(squares, squares[own] + square if offset else square, [own])
    T.buffer_store(length, tirx.sqrt(lanes_total(squares, widest)), [1])
    inverse = T.float32(1) / tirx.max(length[1], T.float32(_LEAST_LENGTH))
    T.buffer_store(length, inverse, [0])

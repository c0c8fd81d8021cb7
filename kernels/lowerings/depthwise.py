"""Depthwise 3 × 3 convolution of tokens on a grid, with bias and GELU, in one pass."""

from __future__ import annotations

from itertools import product
from typing import Any

import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.lowerings.emit import (
    LANES,
    argument,
    at,
    fill,
    gelu,
    inside,
    local,
    near,
    prefetch,
    program,
)
from kernels.targets import KernelTarget

SIDE = 3
# Columns at a time: a token that several of them see is loaded once, and so is a weight.
_COLUMNS = 7


def depthwise_gelu(channels: int, activated: bool, target: KernelTarget) -> tirx.PrimFunc:
    """``main(x, weight, bias, out)``; tokens stay rows, so that nothing is transposed.

    Shapes: x and out ``(images, height, width, channels)``, weight ``(9, channels)`` in the order
    of rows of the window, bias ``(channels,)``; all fp32, the image padded with zeros.

    Args:
        channels: A multiple of 16.
        activated: Whether a GELU follows.
        target: The CPU.
    """

    def body() -> None:
        images, height, width = T.int32(), T.int32(), T.int32()
        x = argument("x", (images, height, width, channels), "float32")
        weight = argument("weight", (SIDE * SIDE, channels), "float32")
        bias = argument("bias", (channels,), "float32")
        out = argument("out", (images, height, width, channels), "float32")

        def block(image: Any, line: Any, first: Any, columns: int) -> None:
            with T.serial(0, channels // LANES) as vector:
                where, own = at(vector * LANES, LANES), at(0, LANES)
                kept, held = local((SIDE * SIDE, LANES)), local((columns, LANES))
                value, scratch = local(LANES), local((3, LANES))
                for tap in range(SIDE * SIDE):
                    within = inside(line + (tap // SIDE - 1), height)
                    factor = fill(tirx.Select(within, T.float32(1), T.float32(0)), LANES)
                    T.buffer_store(kept, weight[tap, where] * factor, [tap, own])
                for column in range(columns):
                    # Of the next line: too many columns at once for the hardware's own prefetch.
                    prefetch(x, [image, line + SIDE - 1, first + column, vector * LANES])
                    T.buffer_store(held, bias[where], [column, own])
                for seen, down in product(range(-1, columns + 1), range(SIDE)):
                    place = first + seen
                    token = x[image, near(line + (down - 1), height), near(place, width), where]
                    if not 0 <= seen < columns:
                        nothing = fill(T.float32(0), LANES)
                        token = tirx.Select(fill(inside(place, width), LANES), token, nothing)
                    T.buffer_store(value, token, [own])
                    for column in range(max(0, seen - 1), min(columns, seen + 2)):
                        tap = down * SIDE + (seen - column + 1)
                        total = held[column, own] + value[own] * kept[tap, own]
                        T.buffer_store(held, total, [column, own])
                for column in range(columns):
                    total = held[column, own]
                    done = gelu(total, scratch) if activated else total
                    T.buffer_store(out, done, [image, line, first + column, where])

        with T.parallel(0, images * height) as task:
            image, line = tirx.floordiv(task, height), tirx.floormod(task, height)
            blocks = tirx.floordiv(width + (_COLUMNS - 1), _COLUMNS)
            with T.If(width >= _COLUMNS):
                with T.Then(), T.serial(0, blocks) as index:
                    # The last ones may be done twice: the same again.
                    block(image, line, tirx.min(index * _COLUMNS, width - _COLUMNS), _COLUMNS)
                with T.Else(), T.serial(0, width) as column:
                    block(image, line, column, 1)

    return program(body)

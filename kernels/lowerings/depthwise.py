"""Depthwise 3 × 3 convolution of tokens on a grid, with bias and GELU, in one pass."""

from __future__ import annotations

from typing import Any

import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.lowerings.emit import LANES, argument, at, fill, gelu, inside, local, program
from kernels.targets import KernelTarget

SIDE = 3


def depthwise_gelu(channels: int, activated: bool, target: KernelTarget) -> tirx.PrimFunc:
    """``main(x, weight, bias, out)``; tokens stay rows, so that nothing is transposed.

    Shapes: x and out ``(images, height, width, channels)``, weight ``(9, channels)`` in the order
    of rows of the window, bias ``(channels,)``; all fp32, the image padded with zeros.

    Args:
        channels: A multiple of 16.
        activated: Whether a GELU follows.
        target: The CPU.
    """
    vectors = channels // LANES

    def body() -> None:
        images, height, width = T.int32(), T.int32(), T.int32()
        x = argument("x", (images, height, width, channels), "float32")
        weight = argument("weight", (SIDE * SIDE, channels), "float32")
        bias = argument("bias", (channels,), "float32")
        out = argument("out", (images, height, width, channels), "float32")

        with T.parallel(0, images * height) as task:
            image, line = tirx.floordiv(task, height), tirx.floormod(task, height)
            scratch, held = local((3, LANES)), local(LANES)
            own = at(0, LANES)
            with T.serial(0, vectors) as vector:
                where = at(vector * LANES, LANES)
                kept = local((SIDE * SIDE, LANES))
                for tap in range(SIDE * SIDE):
                    within = inside(line + (tap // SIDE - 1), height)
                    factor = tirx.Select(within, T.float32(1), T.float32(0))
                    T.buffer_store(kept, weight[tap, where] * fill(factor, LANES), [tap, own])
                with T.serial(0, width) as column:
                    T.buffer_store(held, bias[where], [own])
                    for right in range(SIDE):
                        place = column + (right - 1)
                        with T.If(inside(place, width)), T.Then():
                            total = held[own]
                            for down in range(SIDE):
                                above = line + (down - 1)
                                near = tirx.max(tirx.min(above, height - 1), _i32(0))
                                value = x[image, near, place, where]
                                total = total + value * kept[down * SIDE + right, own]
                            T.buffer_store(held, total, [own])
                    value = gelu(held[own], scratch) if activated else held[own]
                    T.buffer_store(out, value, [image, line, column, where])

    return program(body)


def _i32(value: int) -> Any:
    return tirx.const(value, "int32")

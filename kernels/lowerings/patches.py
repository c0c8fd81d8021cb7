"""The patches that a convolution multiplies, as rows: after it the convolution is a linear."""

from __future__ import annotations

from typing import Any

import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.lowerings.emit import argument, inside, near, program
from kernels.targets import KernelTarget


def patches(side: int, stride: int, padding: int, target: KernelTarget) -> tirx.PrimFunc:
    """``main(x, out)``: windows of an image as rows, in the order of a convolution's weight.

    Shapes: x ``(images, channels, height, width)``, out ``(images, rows, columns, channels, side,
    side)``; both fp32, the image padded with zeros.

    Args:
        side, stride, padding: Of the window, in both directions.
        target: The CPU.
    """

    def body() -> None:
        images, channels, height, width = T.int32(), T.int32(), T.int32(), T.int32()
        rows, columns = T.int32(), T.int32()
        x = argument("x", (images, channels, height, width), "float32")
        out = argument("out", (images, rows, columns, channels, side, side), "float32")

        with T.parallel(0, images * rows) as task:
            image, row = tirx.floordiv(task, rows), tirx.floormod(task, rows)
            window = (T.serial(0, columns), T.serial(0, channels), T.serial(0, side))
            with window[0] as column, window[1] as channel, window[2] as down:
                line = row * stride + down - padding
                for right in range(side):
                    place = column * stride + (right - padding)
                    value = x[image, channel, _within(line, height), _within(place, width)]
                    if padding:
                        both = tirx.And(inside(line, height), inside(place, width))
                        value = tirx.Select(both, value, T.float32(0))
                    T.buffer_store(out, value, [image, row, column, channel, down, right])

    def _within(place: Any, size: Any) -> Any:
        return near(place, size) if padding else place

    return program(body)

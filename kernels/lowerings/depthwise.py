"""Depthwise 3 × 3 convolution of tokens on a grid, with bias and GELU, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.lowerings.emit import (
    LANES,
    argument,
    at,
    fill,
    held,
    inside,
    local,
    near,
    prefetch,
    program,
)
from kernels.lowerings.gelu import gelu
from kernels.lowerings.mixture import Put, Sizes, Tokens, through_experts
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

    activation = gelu(target) if activated else None

    def body() -> None:
        grid = tuple(T.int32() for _ in range(3))
        x, weight, bias = _arguments(grid, channels)
        out = argument("out", (*grid, channels), "float32")

        with T.parallel(0, _blocks(grid)) as index:
            block = _Block.at(index, grid)

            def store(vector: Any, column: Any, value: Any) -> None:
                where = at(vector * LANES, LANES)
                T.buffer_store(out, value, [block.image, block.line, block.first + column, where])

            _convolved(x, weight, bias, grid, block, activation, store)

    return program(body)


def depthwise_mixture(sizes: Sizes, target: KernelTarget) -> tirx.PrimFunc:
    """The same with a GELU, and the linear, or mixture of linears, behind it.

    ``main(x, weight, bias, [gate, gate_bias,] w, scale, bias, offset, …, [residual,] out)``. What
    the convolution makes of a token stays in a cache of its core.

    Shapes: x, weight and bias as for ``depthwise_gelu``; the rest as for
    ``kernels.lowerings.mixture.mixture``.

    Args:
        sizes: And forms that quantise; k, the channels, is a multiple of 16.
        target: The CPU.
    """

    def declare(images: Any, tokens: Any) -> Callable[[], Tokens]:
        grid, channels = (images, T.int32(), T.int32()), sizes.k
        x, weight, bias = _arguments(grid, channels)

        def emit(first: Any, count: Any, put: Put) -> None:
            done = local((_COLUMNS, channels))

            def store(vector: Any, column: Any, value: Any) -> None:
                T.buffer_store(done, value, [column, at(vector * LANES, LANES)])

            with T.serial(0, count) as offset:
                block = _Block.at(first + offset, grid)
                _convolved(x, weight, bias, grid, block, gelu(target), store)
                with T.serial(0, block.columns - block.fresh) as column:
                    put(done, block.fresh + column, block.token + column)

        return lambda: Tokens(_blocks(grid), _COLUMNS, emit)

    return through_experts(sizes, target, declare)


def _arguments(grid: tuple[Any, ...], channels: int) -> tuple[Any, Any, Any]:
    return (
        argument("x", (*grid, channels), "float32"),
        argument("weight", (SIDE * SIDE, channels), "float32"),
        argument("bias", (channels,), "float32"),
    )


def _blocks(grid: tuple[Any, ...]) -> Any:
    """Of some columns of a line each, in all images."""
    images, height, width = grid
    return images * height * _blocks_of_line(width)


def _blocks_of_line(width: Any) -> Any:
    return tirx.floordiv(width + (_COLUMNS - 1), _COLUMNS)


@dataclass(frozen=True)
class _Block:
    """Some columns of a line, the last of which begin where they are as many as the others.

    Attributes:
        image, line, first: Where it begins.
        columns: ``_COLUMNS``, or the whole of a line that is shorter.
        fresh: Those before are in the block before as well.
        token: The number of the first one that is fresh.
    """

    image: Any
    line: Any
    first: Any
    columns: Any
    fresh: Any
    token: Any

    @classmethod
    def at(cls, index: Any, grid: tuple[Any, ...]) -> _Block:
        """Emits where one of ``_blocks`` lies."""
        _, height, width = grid
        each = _blocks_of_line(width)
        number = held(tirx.floordiv(index, each))
        image, line = held(tirx.floordiv(number, height)), held(tirx.floormod(number, height))
        begin = held(tirx.floormod(index, each) * _COLUMNS)
        columns = held(tirx.min(width, tirx.const(_COLUMNS, "int32")))
        first = held(tirx.min(begin, width - columns))
        return cls(image, line, first, columns, begin - first, number * width + begin)


def _convolved(
    x: Any,
    weight: Any,
    bias: Any,
    grid: tuple[Any, ...],
    block: _Block,
    activation: Callable[[Any], Any] | None,
    store: Callable[[Any, Any, Any], None],
) -> None:
    """Emits a block; ``store(vector, column, value)`` takes what comes out."""

    def columns(first: Any, count: int, begin: Any) -> None:
        with T.serial(0, int(x.shape[3]) // LANES) as vector:

            def finish(column: int, value: Any) -> None:
                store(vector, begin + column, activation(value) if activation else value)

            place = (block.image, block.line, first)
            _columns(x, weight, bias, grid, place, count, vector, finish)

    with T.If(block.columns == _COLUMNS):
        with T.Then():
            columns(block.first, _COLUMNS, 0)
        with T.Else(), T.serial(0, block.columns) as column:
            columns(block.first + column, 1, column)


def _columns(
    x: Any,
    weight: Any,
    bias: Any,
    grid: tuple[Any, ...],
    place: tuple[Any, Any, Any],
    columns: int,
    vector: Any,
    store: Callable[[int, Any], None],
) -> None:
    """Emits 16 channels of some neighbours; ``store(column, value)`` takes them."""
    (_, height, width), (image, line, first) = grid, place
    where, own = at(vector * LANES, LANES), at(0, LANES)
    kept, sums = local((SIDE * SIDE, LANES)), local((columns, LANES))
    value = local(LANES)
    for tap in range(SIDE * SIDE):
        within = inside(line + (tap // SIDE - 1), height)
        factor = fill(tirx.Select(within, T.float32(1), T.float32(0)), LANES)
        T.buffer_store(kept, weight[tap, where] * factor, [tap, own])
    for column in range(columns):
        # Of the next line: too many columns at once for the hardware's own prefetch.
        prefetch(x, [image, line + SIDE - 1, first + column, vector * LANES])
        T.buffer_store(sums, bias[where], [column, own])
    for seen, down in product(range(-1, columns + 1), range(SIDE)):
        column_seen = first + seen
        token = x[image, near(line + (down - 1), height), near(column_seen, width), where]
        if not 0 <= seen < columns:
            nothing = fill(T.float32(0), LANES)
            token = tirx.Select(fill(inside(column_seen, width), LANES), token, nothing)
        T.buffer_store(value, token, [own])
        for column in range(max(0, seen - 1), min(columns, seen + 2)):
            tap = down * SIDE + (seen - column + 1)
            total = sums[column, own] + value[own] * kept[tap, own]
            T.buffer_store(sums, total, [column, own])
    for column in range(columns):
        store(column, sums[column, own])

"""Depthwise 3 × 3 convolution of tokens on a grid, with bias and GELU, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.lowerings.activations import quantise_row
from kernels.lowerings.emit import (
    LANES,
    argument,
    at,
    fill,
    inside,
    local,
    near,
    prefetch,
    program,
)
from kernels.lowerings.gelu import gelu
from kernels.lowerings.mixture import Router, Sizes, Tokens, codes_of, through_experts
from kernels.lowerings.routing import Order, choose
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

        def block(image: Any, line: Any, first: Any, columns: int) -> None:
            def store(vector: Any, column: int, value: Any) -> None:
                where = at(vector * LANES, LANES)
                T.buffer_store(out, value, [image, line, first + column, where])

            place = (image, line, first, columns)
            _convolved(x, weight, bias, grid, place, activation, store)

        _each_block(grid, block)

    return program(body)


def depthwise_mixture(sizes: Sizes, target: KernelTarget) -> tirx.PrimFunc:
    """The same with a GELU, and the linear, or mixture of linears, behind it.

    ``main(x, weight, bias, [gate, gate_bias,] w, scale, bias, offset, …, [residual,] out)``. What
    the convolution makes of a token stays in a cache of its core and is written as codes alone.

    Shapes: x, weight and bias as for ``depthwise_gelu``; the rest as for
    ``kernels.lowerings.mixture.mixture``.

    Args:
        sizes: And forms that quantise; k, the channels, is a multiple of 16.
        target: The CPU.
    """

    def declare(images: Any, tokens: Any) -> Callable[[], Tokens]:
        grid, channels, m = (images, T.int32(), T.int32()), sizes.k, images * tokens
        x, weight, bias = _arguments(grid, channels)
        router = Router.declared(sizes)
        _, height, width = grid

        def emit() -> Tokens:
            order = None if router is None else Order.workspace(m, sizes.experts)
            codes, scale = codes_of(m, channels)

            def block(image: Any, line: Any, first: Any, columns: int) -> None:
                done = local((columns, channels))

                def store(vector: Any, column: int, value: Any) -> None:
                    T.buffer_store(done, value, [column, at(vector * LANES, LANES)])

                place = (image, line, first, columns)
                _convolved(x, weight, bias, grid, place, gelu(target), store)
                with T.serial(0, columns) as column:
                    token = (image * height + line) * width + first + column
                    if router is not None and order is not None:
                        choose(done, column, channels, router.gate, router.bias, order, token)
                    quantise_row(done, column, channels, codes, token, scale)

            _each_block(grid, block)
            if order is not None:
                order.finish()
            return Tokens(codes, None, scale, order)

        return emit

    return through_experts(sizes, target, declare)


def _arguments(grid: tuple[Any, ...], channels: int) -> tuple[Any, Any, Any]:
    return (
        argument("x", (*grid, channels), "float32"),
        argument("weight", (SIDE * SIDE, channels), "float32"),
        argument("bias", (channels,), "float32"),
    )


def _each_block(grid: tuple[Any, ...], block: Callable[[Any, Any, Any, int], None]) -> None:
    """Calls ``block(image, line, first column, columns)`` for all of some images, in parallel."""
    images, height, width = grid
    with T.parallel(0, images * height) as task:
        image, line = tirx.floordiv(task, height), tirx.floormod(task, height)
        blocks = tirx.floordiv(width + (_COLUMNS - 1), _COLUMNS)
        with T.If(width >= _COLUMNS):
            with T.Then(), T.serial(0, blocks) as index:
                # The last ones may be done twice: the same again.
                block(image, line, tirx.min(index * _COLUMNS, width - _COLUMNS), _COLUMNS)
            with T.Else(), T.serial(0, width) as column:
                block(image, line, column, 1)


def _convolved(
    x: Any,
    weight: Any,
    bias: Any,
    grid: tuple[Any, ...],
    place: tuple[Any, Any, Any, int],
    activation: Callable[[Any], Any] | None,
    store: Callable[[Any, int, Any], None],
) -> None:
    """Emits some columns of a line; ``store(vector, column, value)`` takes what comes out."""
    (_, height, width), (image, line, first, columns) = grid, place
    with T.serial(0, int(x.shape[3]) // LANES) as vector:
        where, own = at(vector * LANES, LANES), at(0, LANES)
        kept, held = local((SIDE * SIDE, LANES)), local((columns, LANES))
        value = local(LANES)
        for tap in range(SIDE * SIDE):
            within = inside(line + (tap // SIDE - 1), height)
            factor = fill(tirx.Select(within, T.float32(1), T.float32(0)), LANES)
            T.buffer_store(kept, weight[tap, where] * factor, [tap, own])
        for column in range(columns):
            # Of the next line: too many columns at once for the hardware's own prefetch.
            prefetch(x, [image, line + SIDE - 1, first + column, vector * LANES])
            T.buffer_store(held, bias[where], [column, own])
        for seen, down in product(range(-1, columns + 1), range(SIDE)):
            column_seen = first + seen
            token = x[image, near(line + (down - 1), height), near(column_seen, width), where]
            if not 0 <= seen < columns:
                nothing = fill(T.float32(0), LANES)
                token = tirx.Select(fill(inside(column_seen, width), LANES), token, nothing)
            T.buffer_store(value, token, [own])
            for column in range(max(0, seen - 1), min(columns, seen + 2)):
                tap = down * SIDE + (seen - column + 1)
                total = held[column, own] + value[own] * kept[tap, own]
                T.buffer_store(held, total, [column, own])
        for column in range(columns):
            total = held[column, own]
            store(vector, column, total if activation is None else activation(total))

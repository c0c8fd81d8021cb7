"""Rows times a panel by vectors: the sums of a tile stay in registers over the whole of k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.lowerings.emit import LANES, at, fill, local, rolled, row_blocks
from kernels.lowerings.panel_product import VECTORS, PanelProduct, Rows
from kernels.packing import PANEL
from kernels.targets import KernelTarget


def largest_tile_rows(target: KernelTarget, vectors: int = VECTORS) -> int:
    """Rows of accumulators that fit the registers beside one row of weights and an activation.

    Args:
        target: The CPU.
        vectors: Of a panel, that are summed at once.
    """
    registers_a_row = vectors * LANES * 32 // target.vector_bits
    return max(1, (target.vector_registers - registers_a_row - 2) // registers_a_row)


def multiply(
    product: PanelProduct,
    rows: Rows,
    panel: Any,
    vectors: int,
    finish: Callable[[Any, list[Any]], None],
) -> None:
    """Calls ``finish(row, vectors)`` for each row; fewer than a whole tile are cut into blocks.

    Args:
        product: Whose unit works on vectors.
        rows: Their tile has as many as the registers hold sums of.
        panel: Which one.
        vectors: How many of the panel's, from the first.
        finish: Writes the results of a row, counted from the first.
    """

    def tile(count: int, start: Any) -> None:
        planes = [
            _sums(product, rows, start, count, panel, vectors, plane)
            for plane in range(len(product.stored.planes))
        ]
        for r in range(count):
            own = start + r
            finish(own, product.row(panel, [plane[r] for plane in planes], rows, own))

    def some(start: Any, remaining: Any) -> None:
        with T.If(remaining >= rows.tile):
            with T.Then():
                tile(rows.tile, start)
            with T.Else():
                for condition, offset, count in row_blocks(remaining, rows.tile):
                    with T.If(condition), T.Then():
                        tile(count, start + offset)

    if rows.most == rows.tile:
        some(tirx.const(0, "int32"), rows.count)
        return
    with T.serial(0, tirx.floordiv(rows.count + (rows.tile - 1), rows.tile)) as index:
        some(index * rows.tile, rows.count - index * rows.tile)


def _sums(
    product: PanelProduct,
    rows: Rows,
    start: Any,
    count: int,
    panel: Any,
    vectors: int,
    plane: int,
) -> list[list[Any]]:
    """A tile's sums by row and vector; a vector of weights is loaded once for all rows.

    Of rows whose sums do not fit the registers, a panel's vectors are summed one after the other:
    twice the rows share what is loaded and decoded.
    """
    unit, width = product.unit, LANES * product.unit.group
    sums, weights = local(count * PANEL, unit.total), local(VECTORS * width, unit.weights)
    every = range(vectors)
    where = [[at(r * PANEL + v * LANES, LANES) for v in every] for r in range(count)]
    for r in range(count):
        for v in every:
            T.buffer_store(sums, fill(tirx.const(0, unit.total), LANES), [where[r][v]])
    for at_once in [tuple(every)] if count <= rows.fit else [(v,) for v in every]:
        with T.serial(0, rolled(product.steps)) as step:
            if rows.fetch is not None and at_once[0] == 0:
                rows.fetch(count, step)
            for v in at_once:
                value = product.weights(plane, panel, step, v)
                T.buffer_store(weights, value, [at(v * width, width)])
            for r in range(count):
                inputs = rows.buffer[rows.first + start + r, at(step * unit.group, unit.group)]
                inputs = tirx.reinterpret("int32", inputs) if unit.group > 1 else inputs
                inputs = fill(inputs, LANES)
                for v in at_once:
                    value = unit.multiply(sums[where[r][v]], inputs, weights[at(v * width, width)])
                    T.buffer_store(sums, value, [where[r][v]])
    return [[sums[where[r][v]] for v in every] for r in range(count)]

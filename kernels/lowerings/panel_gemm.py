"""The CPU schedules that mult and shift share, so that only the weights differ between them.

Weights come packed in panels of 32 output channels (``kernels.packing.pack_panels``). A tile of
rows × one panel is accumulated in registers over the whole of k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.lowerings.activations import copy_row, normalise_row, quantise_row, round_row
from kernels.lowerings.emit import (
    LANES,
    argument,
    at,
    fill,
    gelu,
    local,
    prefetch,
    program,
    spans,
    tiles,
)
from kernels.lowerings.inner_product import Unit
from kernels.packing import BF16_GROUP, DOT_GROUP, PANEL
from kernels.targets import KernelTarget
from kernels.workload import Workload

VECTORS = PANEL // LANES

# Above this many bytes of weights a panel is kept hot and the rows are streamed past it.
_STREAM_WEIGHT_BYTES = 512 * 1024
# Rows are quantised or rounded as many at a time as stay in a cache until they are multiplied.
_PREPARED_BYTES = 512 * 1024
_PAGE_BYTES = 4096


@dataclass(frozen=True)
class Stored:
    """How a weight lies in memory.

    Attributes:
        dtype: Element type of the packed weights.
        width: Elements that make one vector of ``LANES * group`` weights.
        planes: A decoder each: a loaded vector into the unit's weights. The result is the sum over
            planes of ``factor ** index`` times the plane's product; the first plane is the least.
        factor: Between one plane and the next.
    """

    dtype: str
    width: int
    planes: tuple[Callable[[Any], Any], ...] = (lambda weights: weights,)
    factor: float = 1.0


def largest_tile_rows(target: KernelTarget) -> int:
    """Rows of accumulators that fit the registers beside one row of weights and an activation."""
    registers_a_row = VECTORS * LANES * 32 // target.vector_bits
    return max(1, (target.vector_registers - registers_a_row - 2) // registers_a_row)


def schedule_space(target: KernelTarget) -> dict[str, tuple[int, ...]]:
    """What may be chosen: ``tile_rows``, and ``panels_outer`` (1: keep a panel of weights hot)."""
    largest = largest_tile_rows(target)
    return {"tile_rows": tuple(range(max(1, largest // 3), largest + 1)), "panels_outer": (0, 1)}


def default_schedule(workload: Workload, target: KernelTarget) -> dict[str, int]:
    """The schedule of a shape that nobody has tuned."""
    largest = largest_tile_rows(target)
    # Half of the registers hide the latency of a multiply-add already. The rest would go in ragged
    # rows: 7 divides the 49 * 4^i tokens of images of 224 x 224 pixels.
    rows = max(largest // 2, min(largest, 4))
    if workload.alphabet == "pow2" and workload.x_dtype == "float32":
        # A weight is decoded once for all rows of a tile, which takes as long as some of them.
        # Rows of x that lie whole pages apart share one set of the first cache: ten at a time took
        # 6 to 14 % less than thirteen on Zen 4, at k of 1024, 2048 and 3072.
        rows = max(rows, largest - (4 if workload.k * 4 % _PAGE_BYTES == 0 else 1))
    return {
        "tile_rows": rows,
        "panels_outer": int(workload.weight_bytes > _STREAM_WEIGHT_BYTES),
    }


class _Operands(NamedTuple):
    """Arguments of a launch; None for what the workload has not."""

    x: Any
    w: Any
    scale: Any
    bias: Any
    offset: Any
    x_scale: Any
    norm: Any
    residual: Any
    rows: Any
    row_weight: Any
    out: Any


def linear_panels(
    workload: Workload,
    target: KernelTarget,
    schedule: Mapping[str, int],
    unit: Unit,
    stored: Stored,
) -> tirx.PrimFunc:
    """A linear: ``main(x, w, [scale,] bias, [offset,] [x_scale | norm,] [residual,]
    [rows, [weight,]] out)``.

    Activations that are normalised, quantised or rounded first (``workload.fused``) go through a
    workspace, a block of rows at a time; codes are read where they lie. int8 codes are multiplied
    as unsigned bytes; what the shift by 128 adds, ``offset[plane, n]``, is taken off at the end.

    Args:
        workload: A linear; its m is taken from x, or from rows where there are any, at each launch.
        target: The CPU.
        schedule: Of ``schedule_space``.
        unit: Multiplies and adds.
        stored: The weights.
    """
    panels, steps = -(-workload.n // PANEL), -(-workload.k // unit.group)
    cut = (schedule["tile_rows"], bool(schedule["panels_outer"]))

    def body() -> None:
        m = T.int32()
        given = _declare(workload, unit, stored, m)

        def product(rows: int, panel: Any, activation: Callable) -> list:
            def load(decode: Callable, step: Any, v: int) -> Any:
                return decode(given.w[panel, step, at(v * stored.width, stored.width)])

            return [
                _accumulate(rows, steps, unit, partial(load, decode), activation)
                for decode in stored.planes
            ]

        def finish(rows: int, first: Any, panel: Any, sums: list, x_scale: Any) -> None:
            activated = "gelu" in workload.fused
            scratch, done = local((3, LANES)), local(PANEL)
            for r in range(rows):
                vectors = []
                for v in range(VECTORS):
                    channel = at(panel * PANEL + v * LANES, LANES)
                    value = _joined([p[r][v] for p in sums], stored, given.offset, channel, panels)
                    if x_scale is not None:
                        value = value * (fill(x_scale(r), LANES) * given.scale[channel])
                    elif given.scale is not None:
                        value = value * given.scale[channel]
                    value = value + given.bias[channel]
                    if activated:
                        T.buffer_store(done, gelu(value, scratch), [at(v * LANES, LANES)])
                        value = done[at(v * LANES, LANES)]
                    if given.row_weight is not None:
                        value = value * fill(given.row_weight[first + r], LANES)
                    vectors.append(value)
                row = first + r
                if given.row_weight is not None:
                    row = given.rows[row]
                _store_row(given.out, given.residual, row, panel, workload.n, vectors)

        def direct(rows: int, first: Any, panel: Any) -> None:
            def activation(r: int, kk: Any) -> Any:
                if r == 0:
                    _fetch_next_tile(given.x, first + rows, rows * kk)
                return given.x[first + r, kk]

            finish(rows, first, panel, product(rows, panel, activation), None)

        def from_codes(rows: int, first: Any, panel: Any) -> None:
            places = local(rows, "int32")
            for r in range(rows):
                place = given.rows[first + r] if "gather" in workload.fused else first + r
                T.buffer_store(places, place, [r])

            def activation(r: int, step: Any) -> Any:
                group = given.x[places[r], at(step * unit.group, unit.group)]
                return tirx.reinterpret("int32", group)

            sums = product(rows, panel, activation)
            finish(rows, first, panel, sums, lambda r: given.x_scale[places[r]])

        if "codes" in workload.fused:
            tiles(m, panels, *cut, from_codes)
            return
        if not {"quantise", "cast", "layer_norm", "gather"} & set(workload.fused):
            tiles(m, panels, *cut, direct)
            return
        for start, rows_here, prepared, row_scale in _prepared(workload, unit, given, m, cut[0]):

            def from_workspace(rows: int, first: Any, panel: Any) -> None:
                def activation(r: int, step: Any) -> Any:
                    group = prepared[first + r, at(step * unit.group, unit.group)]  # noqa: B023
                    return tirx.reinterpret("int32", group) if unit.group > 1 else group

                sums = product(rows, panel, activation)
                x_scale = None if row_scale is None else lambda r: row_scale[first + r]  # noqa: B023
                finish(rows, start + first, panel, sums, x_scale)  # noqa: B023

            tiles(rows_here, panels, *cut, from_workspace)

    return program(body, unit.llvm)


def _declare(workload: Workload, unit: Unit, stored: Stored, m: Any) -> _Operands:
    k, n, fused = workload.k, workload.n, workload.fused
    panels, steps = -(-n // PANEL), -(-k // unit.group)
    padded = panels * PANEL

    x_type, width = ("uint8", steps * unit.group) if "codes" in fused else ("float32", k)

    def if_fused(step: str, name: str, shape: tuple[Any, ...], dtype: str = "float32") -> Any:
        return argument(name, shape, dtype) if step in fused else None

    indexed = "scatter" if "scatter" in fused else "gather"
    sources = T.int32() if "gather" in fused else m
    places = T.int32() if "scatter" in fused else m
    return _Operands(
        x=argument("x", (sources, width), x_type),
        w=argument("w", (panels, steps, VECTORS * stored.width), stored.dtype),
        scale=if_fused("scale", "scale", (padded,)),
        bias=argument("bias", (padded,), "float32"),
        offset=if_fused("quantise", "offset", (len(stored.planes) * padded,), "int32"),
        x_scale=if_fused("codes", "x_scale", (sources,)),
        norm=if_fused("layer_norm", "norm", (2 * k + 1,)),
        residual=if_fused("residual", "residual", (places, n)),
        rows=if_fused(indexed, "rows", (m,), "int32"),
        row_weight=if_fused("scatter", "row_weight", (m,)),
        out=argument("out", (places, n), "float32"),
    )


def _prepared(
    workload: Workload, unit: Unit, given: _Operands, m: Any, tile_rows: int
) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Within a loop over blocks: (first row, rows, workspace, scales of its rows or None)."""
    k, fused = workload.k, workload.fused
    padded = -(-k // unit.group) * unit.group
    element, width = {1: ("float32", 4), BF16_GROUP: ("int16", 2), DOT_GROUP: ("uint8", 1)}[
        unit.group
    ]
    block = max(1, _PREPARED_BYTES // (padded * width * tile_rows)) * tile_rows
    prepared = T.alloc_buffer((block, padded), element, scope="global")
    row_scale: Any = None
    if "quantise" in fused:
        row_scale = T.alloc_buffer((block,), "float32", scope="global")
    with T.serial(0, tirx.floordiv(m + (block - 1), block)) as index:
        start = index * block
        rows_here = tirx.min(m - start, tirx.const(block, "int32"))
        with T.parallel(0, rows_here) as slot:
            source, row = given.x, start + slot
            if "gather" in fused:
                held = local(1, "int32")
                T.buffer_store(held, given.rows[row], [0])
                row = held[0]
            if "layer_norm" in fused:
                source, row = normalise_row(source, row, k, given.norm), tirx.const(0, "int32")
            if "quantise" in fused:
                quantise_row(source, row, k, prepared, slot, row_scale)
            elif "cast" in fused:
                round_row(source, row, k, prepared, slot)
            else:
                copy_row(source, row, k, prepared, slot)
        yield start, rows_here, prepared, row_scale


def _accumulate(
    rows: int,
    steps: int,
    unit: Unit,
    load: Callable[[Any, int], Any],
    activation: Callable[[int, Any], Any],
) -> list[list[Any]]:
    """Sums a tile over k in registers; returns the vectors of each row.

    Args:
        rows: Rows of the tile.
        steps: Passes over k.
        unit: Multiplies and adds.
        load: ``load(step, v)``: vector v of the weights, once for all rows.
        activation: ``activation(row, step)``: one row's group of inputs.
    """
    width = LANES * unit.group
    sums, weights = local(rows * PANEL, unit.total), local(VECTORS * width, unit.weights)
    where = [[at(r * PANEL + v * LANES, LANES) for v in range(VECTORS)] for r in range(rows)]
    for r in range(rows):
        for v in range(VECTORS):
            T.buffer_store(sums, fill(tirx.const(0, unit.total), LANES), [where[r][v]])
    with T.serial(0, steps) as step:
        for v in range(VECTORS):
            T.buffer_store(weights, load(step, v), [at(v * width, width)])
        for r in range(rows):
            inputs = fill(activation(r, step), LANES)
            for v in range(VECTORS):
                value = unit.multiply(sums[where[r][v]], inputs, weights[at(v * width, width)])
                T.buffer_store(sums, value, [where[r][v]])
    return [[sums[where[r][v]] for v in range(VECTORS)] for r in range(rows)]


def _fetch_next_tile(x: Any, row: Any, element: Any) -> None:
    """Asks, a step at a time, for the rows of the tile that comes after this one.

    They lie side by side, but the hardware's own prefetch begins anew at each page.
    """
    prefetch(x, [row, element])


def _joined(sums: list[Any], stored: Stored, offset: Any, channel: Any, panels: int) -> Any:
    """The planes' sums as one fp32 vector, rid of what unsigned activations have added."""
    total = None
    for index, plane in enumerate(sums):
        if offset is not None:
            own = channel + index * panels * PANEL if index else channel
            plane = tirx.Cast(f"float32x{LANES}", plane - offset[own])
        weighted = plane * fill(T.float32(stored.factor**index), LANES) if index else plane
        total = weighted if total is None else total + weighted
    return total


def _store_row(out: Any, residual: Any, row: Any, panel: Any, n: int, vectors: list[Any]) -> None:
    """Writes one row of a panel; the last panel of a ragged n is cut to its channels."""

    def store(value: Any, offset: int, lanes: int) -> None:
        index = [row, at(panel * PANEL + offset, lanes)]
        if residual is not None:
            value = value + residual[tuple(index)]
        T.buffer_store(out, value, index)

    def whole() -> None:
        for v, vector in enumerate(vectors):
            store(vector, v * LANES, LANES)

    def cut() -> None:
        # A copy, so that no scalar access keeps the accumulators themselves out of registers.
        copy = local(PANEL)
        for v, vector in enumerate(vectors):
            T.buffer_store(copy, vector, [at(v * LANES, LANES)])
        for offset, lanes in spans(n % PANEL):
            store(copy[at(offset, lanes)], offset, lanes)

    if n % PANEL == 0:
        whole()
    elif n < PANEL:
        cut()
    else:
        with T.If((panel + 1) * PANEL <= n):
            with T.Then():
                whole()
            with T.Else():
                cut()

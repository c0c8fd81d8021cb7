"""The CPU schedules that mult and shift share, so that only the weights differ between them.

Weights come packed in panels of 32 output channels (``kernels.packing.pack_panels``). A task is
some rows × one panel, or by AMX several, over the whole of k (``kernels.lowerings.panel_rows``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import tvm.script.ir_builder.tirx as T
from tvm import DataType, tirx

from kernels.lowerings import panel_rows
from kernels.lowerings.activations import prepare_row
from kernels.lowerings.amx import BLOCK_ROWS
from kernels.lowerings.arithmetic import ARITHMETIC
from kernels.lowerings.emit import LANES, ROLLED, argument, prefetch, program, tiles, workspace
from kernels.lowerings.gelu import gelu
from kernels.lowerings.panel_product import (
    Arithmetic,
    PanelProduct,
    Rows,
    store_row,
)
from kernels.lowerings.register_tiles import largest_tile_rows
from kernels.packing import DOT_GROUP, NIBBLE_BITS, PANEL
from kernels.targets import KernelTarget
from kernels.workload import Workload

# Where fewer of whole panels fit the registers, a tile is of half panels.
_FEW_ROWS = 4
# Above this many bytes of weights a panel is kept hot and the rows are streamed past it.
_STREAM_WEIGHT_BYTES = 512 * 1024
# As many stay in a core's own cache, of 2 MiB, beside the rows.
RESIDENT_WEIGHT_BYTES = 1280 * 1024
# Of a task by AMX.
_MOST_BLOCKS, _MOST_PANELS = 4, 8
# Rows are quantised or rounded as many at a time as stay in a cache until they are multiplied.
_PREPARED_BYTES = 512 * 1024
_PAGE_BYTES = 4096
_LINE_BYTES = 64
# Lines of results, and of what is added to them, are asked for so many tiles before: in the order
# of addresses and into the second level. Beyond the caches, on Zen 4 with few inputs, up to 1.8
# times as fast as row by row into the first level, with a residual up to 2.5; within them alike.
# All lines of a tile in one go would gain a quarter to two fifths less.
_TILES_AHEAD = 2


def schedule_space(target: KernelTarget) -> dict[str, tuple[int, ...]]:
    """What may be chosen: ``tile_rows``, and ``panels_outer`` (1: keep a panel of weights hot)."""
    whole = largest_tile_rows(target)
    most = largest_tile_rows(target, vectors=1) if whole < _FEW_ROWS else whole
    return {"tile_rows": tuple(range(max(1, whole // 3), most + 1)), "panels_outer": (0, 1)}


def default_schedule(workload: Workload, target: KernelTarget) -> dict[str, int]:
    """The schedule of a shape that nobody has tuned."""
    return {
        "tile_rows": default_tile_rows(workload, target),
        "panels_outer": int(workload.weight_bytes > _STREAM_WEIGHT_BYTES),
    }


def default_tile_rows(workload: Workload, target: KernelTarget) -> int:
    """Rows of a tile of a shape that nobody has tuned."""
    largest = largest_tile_rows(target)
    if largest < _FEW_ROWS:
        return _rows_of_half_panels(ARITHMETIC[workload.form](target), target) or largest
    # Half of the registers hide the latency of a multiply-add already. The rest would go in ragged
    # rows: 7 divides the 49 * 4^i tokens of images of 224 x 224 pixels.
    rows = max(largest // 2, min(largest, 4))
    if workload.alphabet == "pow2" and workload.x_dtype == "float32":
        # A weight is decoded once for all rows of a tile, which takes as long as some of them.
        # Rows of x that lie whole pages apart share one set of the first cache: ten at a time took
        # 6 to 14 % less than thirteen on Zen 4, at k of 1024, 2048 and 3072.
        rows = max(rows, largest - (4 if workload.k * 4 % _PAGE_BYTES == 0 else 1))
    return rows


def _rows_of_half_panels(arithmetic: Arithmetic, target: KernelTarget) -> int | None:
    """Rows of a tile where a panel's vectors are summed one by one; None where that is no gain.

    On sixteen registers of 256 bits twice the rows then share what is loaded and decoded. In turns
    with whole panels on Zen 3, four shapes each: fp32 1.04 to 1.2 times as fast for mult and 1.36
    to 1.39 for shift, bf16 1.04 to 1.15 and 1.29 to 1.38, wide shifts 1.4 to 1.7, shifts of four
    bits 1.06 to 1.09; int8, whose weights are operands in memory, 0.92 to 1.02.
    """
    unit, stored = arithmetic
    if unit.group == 1:
        return largest_tile_rows(target, vectors=1)
    if unit.group == DOT_GROUP and not stored.is_decoded:
        return None
    # Decoding, or multiplying by several instructions, takes registers of its own.
    return max(1, largest_tile_rows(target, vectors=1) * 2 // 3)


def amx_schedule_space(target: KernelTarget) -> dict[str, tuple[int, ...]]:
    """The same for AMX, whose registers hold the sums of ``BLOCK_ROWS``: how many a task has.

    And ``panels``: by up to as many a task multiplies its rows, so that results of a row lie side
    by side and the registers get their shapes less often.
    """
    rows = tuple(BLOCK_ROWS << power for power in range(4))
    return {"tile_rows": rows, "panels_outer": (0, 1), "panels": (1, 4, 8, 16)}


def amx_default_schedule(workload: Workload, target: KernelTarget) -> dict[str, int]:
    """The schedule of a shape that nobody has tuned, for AMX.

    Against 128 rows by one panel, in turns on an Intel Xeon (``tests/prove/schedules.py``): on one
    thread 1.14 times as fast with more than 256 outputs (48 shapes at random, 95 % of 1.10 to 1.18)
    and 1.02 with others (48; 1.00 to 1.03), on two 1.11 and 1.02; the slowest shape 0.90.
    """
    if workload.weight_bytes > RESIDENT_WEIGHT_BYTES or workload.code_bits == NIBBLE_BITS:
        # Each task brings its weights from afar, or decodes them: for many rows at once.
        blocks = _MOST_BLOCKS
    else:
        # Results of few rows stay in the nearest cache until lines of them are whole, and threads
        # get the same to do. But a task has to be long against the 50 ns in which the registers
        # get their shapes.
        blocks = min(_MOST_BLOCKS, max(1, _MOST_PANELS // -(-workload.n // PANEL)))
    return {"tile_rows": BLOCK_ROWS * blocks, "panels_outer": 0, "panels": _MOST_PANELS}


def panel_groups(panels: int, at_most: int) -> tuple[int, int]:
    """How many panels a task multiplies its rows by, up to ``at_most``, and how many such groups.

    As a rule an even number of groups: two threads then have the same to do even with a single tile
    of rows.
    """
    groups = 2 * -(-panels // (2 * at_most))
    at_once = -(-panels // groups)
    return at_once, -(-panels // at_once)


def line_of_tile(rows: int, panel: Any, row: Any, vectors: int, vector: int) -> Any:
    """Where in a tile of whole rows begins what a vector of a row asks for: line after line.

    A panel itself reaches for two lines of each row, one row after the other: no pattern that the
    hardware's own prefetch goes by. Whole rows lie side by side.

    Args:
        rows: Of the tile.
        panel: Which one; all before it are whole.
        row: Of the tile.
        vectors: Of the panel.
        vector: Which of them.
    """
    return panel * rows * PANEL + (row * vectors + vector) * LANES


class _Operands(NamedTuple):
    """Arguments of a launch; None for what the workload has not."""

    x: Any
    product: PanelProduct
    norm: Any
    residual: Any
    out: Any


def linear_panels(
    arithmetic: Callable[[KernelTarget], Arithmetic],
    workload: Workload,
    target: KernelTarget,
    schedule: Mapping[str, int],
) -> tirx.PrimFunc:
    """A linear: ``main(x, w, [scale,] bias, [offset,] [norm,] [residual,] out)``.

    Activations that are normalised, quantised or rounded first (``workload.fused``) go through a
    workspace, a block of rows at a time.

    Args:
        arithmetic: Of its form, for a target.
        workload: A linear; its m is taken from x at each launch.
        target: The CPU.
        schedule: Of ``schedule_space``.
    """
    own = arithmetic(target)
    most, outer = schedule["tile_rows"], bool(schedule["panels_outer"])
    at_most = schedule.get("panels", 1)

    def body() -> None:
        m = T.int32()
        given = _declare(workload, own, m)
        product = given.product
        at_once, groups = panel_groups(product.panels, at_most)

        def task(rows: Rows, first: Any, group: Any) -> None:
            memory = panel_rows.workspace([product])
            with (
                panel_rows.at_work(product),
                _each_panel(group, at_once, product.panels) as panel,
            ):

                def finish(r: Any, vectors: list[Any]) -> None:
                    if not own.unit.amx:
                        ask_for(first, r, panel, len(vectors))
                    store_row(given.out, given.residual, first + r, panel, workload.n, vectors)

                panel_rows.multiply(product, memory, rows, panel, finish)

        def ask_for(first: Any, r: Any, panel: Any, vectors: int) -> None:
            for v in range(vectors):
                if outer:
                    line = [first + most + r, panel * PANEL + v * LANES]
                    prefetch(given.out, line, to_write=True)
                    continue
                line = [first + _TILES_AHEAD * most, line_of_tile(most, panel, r, vectors, v)]
                prefetch(given.out, line, level=2)
                if given.residual is not None:
                    prefetch(given.residual, line, level=2)

        def direct(count: Any, first: Any, group: Any) -> None:
            def fetch(rows: int, step: Any) -> None:
                # They lie side by side, but the hardware's own prefetch begins anew at each page.
                prefetch(given.x, [first + rows, rows * step])

            task(Rows(given.x, first, count, **tile, fetch=fetch), first, group)

        tile: dict[str, Any] = {
            "most": most,
            "tile": most,
            "fit": largest_tile_rows(target),
            "activation": gelu(target) if "gelu" in workload.fused else None,
        }
        if not {"quantise", "cast", "layer_norm"} & set(workload.fused):
            tiles(m, groups, most, outer, direct)
            return
        for start, rows_here, prepared, row_scale in _prepared(workload, given, m, most):

            def from_workspace(count: Any, first: Any, group: Any) -> None:
                scale = None if row_scale is None else lambda r: row_scale[first + r]  # noqa: B023
                rows = Rows(prepared, first, count, **tile, scale=scale)  # noqa: B023
                task(rows, start + first, group)  # noqa: B023

            tiles(rows_here, groups, most, outer, from_workspace)

    return program(body, ROLLED + (own.unit.llvm or ""))


@contextmanager
def _each_panel(group: Any, at_once: int, panels: int) -> Iterator[Any]:
    """Emits a loop over the panels of a group; of one panel without a loop."""
    if at_once == 1:
        yield group
        return
    first = group * at_once
    there = tirx.min(tirx.const(panels, "int32") - first, tirx.const(at_once, "int32"))
    with T.serial(0, there) as one:
        yield first + one


def _declare(workload: Workload, arithmetic: Arithmetic, m: Any) -> _Operands:
    k, n, fused = workload.k, workload.n, workload.fused
    return _Operands(
        x=argument("x", (m, k), "float32"),
        product=PanelProduct.declared(k, n, arithmetic, fused),
        norm=argument("norm", (2 * k + 1,), "float32") if "layer_norm" in fused else None,
        residual=argument("residual", (m, n), "float32") if "residual" in fused else None,
        out=argument("out", (m, n), "float32"),
    )


def _prepared(
    workload: Workload, given: _Operands, m: Any, tile_rows: int
) -> Iterator[tuple[Any, Any, Any, Any]]:
    """Within a loop over blocks: (first row, rows, workspace, scales of its rows or None)."""
    k, fused, padded = workload.k, workload.fused, given.product.padded_k
    element, width = given.product.unit.inputs, DataType(given.product.unit.inputs).itemsize
    # An odd number of cache lines apart, neighbouring rows share no set of the first cache: 1024³
    # by AMX took 10 % less so.
    lines = -(-padded * width // _LINE_BYTES)
    padded = (lines + 1 - lines % 2) * _LINE_BYTES // width
    block = max(1, _PREPARED_BYTES // (padded * width * tile_rows)) * tile_rows
    prepared = workspace((block, padded), element)
    row_scale: Any = None
    if "quantise" in fused:
        row_scale = T.alloc_buffer((block,), "float32", scope="global")
    with T.serial(0, tirx.floordiv(m + (block - 1), block)) as index:
        start = index * block
        rows_here = tirx.min(m - start, tirx.const(block, "int32"))
        with T.parallel(0, rows_here) as slot:
            prepare_row(given.x, start + slot, k, fused, given.norm, prepared, slot, row_scale)
        yield start, rows_here, prepared, row_scale

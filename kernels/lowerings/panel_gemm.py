"""The CPU schedules that mult and shift share, so that only the weights differ between them.

Weights come packed in panels of 32 output channels (``kernels.packing.pack_panels``). A tile of
rows × one panel is accumulated in registers over the whole of k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.lowerings.emit import (
    LANES,
    argument,
    at,
    fill,
    local,
    program,
    spans,
    tiles,
    vector_type,
)
from kernels.packing import DOT_GROUP, INT8_MAX, PANEL
from kernels.targets import KernelTarget
from kernels.workload import Workload

VECTORS = PANEL // LANES

# Above this many bytes of weights a panel is kept hot and the rows are streamed past it.
_STREAM_WEIGHT_BYTES = 512 * 1024


_chosen: ContextVar[Mapping[str, int] | None] = ContextVar("schedule", default=None)


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
    return {
        # Half of the registers hide the latency of a multiply-add already. The rest would go in
        # spills where weights are decoded, and in ragged rows: 7 divides the 49 * 4^i tokens of
        # images of 224 x 224 pixels.
        "tile_rows": max(largest // 2, min(largest, 4)),
        "panels_outer": int(workload.weight_bytes > _STREAM_WEIGHT_BYTES),
    }


@contextmanager
def scheduled(schedule: Mapping[str, int]) -> Iterator[None]:
    """Within it, lowerings of this module are defined with that schedule."""
    token = _chosen.set(schedule)
    try:
        yield
    finally:
        _chosen.reset(token)


def _store_row(out: Any, row: Any, panel: Any, n: int, vectors: list[Any]) -> None:
    """Writes one row of a panel; the last panel of a ragged n is cut to its channels."""

    def whole() -> None:
        for v, vector in enumerate(vectors):
            T.buffer_store(out, vector, [row, at(panel * PANEL + v * LANES, LANES)])

    def cut() -> None:
        # A copy, so that no scalar access keeps the accumulators themselves out of registers.
        copy = local(PANEL)
        for v, vector in enumerate(vectors):
            T.buffer_store(copy, vector, [at(v * LANES, LANES)])
        for offset, lanes in spans(n % PANEL):
            value = copy[at(offset, lanes)]
            T.buffer_store(out, value, [row, at(panel * PANEL + offset, lanes)])

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


def _accumulate(
    rows: int,
    steps: int,
    dtype: str,
    run: tuple[str, int],
    load: Callable[[Any, int], Any],
    multiply: Callable[[Any, int, Any, Any], Any],
) -> list[list[Any]]:
    """Sums a tile over k in registers; returns the vectors of each row.

    Args:
        rows: Rows of the tile.
        steps: Passes over k.
        dtype: Of the sums.
        run: Type and length of one vector of decoded weights.
        load: ``load(step, v)``: vector v of the weights, once for all rows.
        multiply: ``multiply(sum, row, step, weights)``: the sum with one more step.
    """
    sums, weights = local(rows * PANEL, dtype), local(VECTORS * run[1], run[0])
    where = [[at(r * PANEL + v * LANES, LANES) for v in range(VECTORS)] for r in range(rows)]
    for r in range(rows):
        for v in range(VECTORS):
            T.buffer_store(sums, fill(tirx.const(0, dtype), LANES), [where[r][v]])
    with T.serial(0, steps) as step:
        for v in range(VECTORS):
            T.buffer_store(weights, load(step, v), [at(v * run[1], run[1])])
        for r in range(rows):
            for v in range(VECTORS):
                value = multiply(sums[where[r][v]], r, step, weights[at(v * run[1], run[1])])
                T.buffer_store(sums, value, [where[r][v]])
    return [[sums[where[r][v]] for v in range(VECTORS)] for r in range(rows)]


def fma_panels(
    workload: Workload, target: KernelTarget, w_dtype: str, decode: Callable[[Any], Any]
) -> tirx.PrimFunc:
    """fp32 accumulation by fused multiply-add: ``main(x, w, [scale,] bias, out)``.

    Args:
        workload: A linear; its m is taken from x at each launch.
        target: The CPU.
        w_dtype: Stored type of a weight.
        decode: Turns a vector of stored weights into fp32, once a panel row and tile.
    """
    schedule = _chosen.get() or default_schedule(workload, target)
    k, n = workload.k, workload.n
    panels = -(-n // PANEL)
    scaled = "scale" in workload.fused

    def body() -> None:
        m = T.int32()
        x = argument("x", (m, k), "float32")
        w = argument("w", (panels, k, PANEL), w_dtype)
        scale = argument("scale", (panels * PANEL,), "float32") if scaled else None
        bias = argument("bias", (panels * PANEL,), "float32")
        out = argument("out", (m, n), "float32")

        def tile(rows: int, first: Any, panel: Any) -> None:
            def load(kk: Any, v: int) -> Any:
                return decode(w[panel, kk, at(v * LANES, LANES)])

            def multiply(total: Any, r: int, kk: Any, weights: Any) -> Any:
                return total + fill(x[first + r, kk], LANES) * weights

            sums = _accumulate(rows, k, "float32", ("float32", LANES), load, multiply)
            for r in range(rows):
                vectors = []
                for v, value in enumerate(sums[r]):
                    channel = at(panel * PANEL + v * LANES, LANES)
                    vectors.append(
                        (value if scale is None else value * scale[channel]) + bias[channel]
                    )
                _store_row(out, first + r, panel, n, vectors)

        tiles(m, panels, schedule["tile_rows"], bool(schedule["panels_outer"]), tile)

    return program(body)


def dot_groups(target: KernelTarget, sums: Any, codes: Any, weights: Any) -> Any:
    """``sums[16] + sum_g codes[g] * weights[16, g]``: int32 += uint8 × int8, four a lane.

    Args:
        target: Decides on the instruction.
        sums: int32x16.
        codes: Four uint8 activations as one int32.
        weights: int8x64.

    Source:
        Intel SDM, VPDPBUSD (products of a group are summed without saturation).
    """
    if target.dot_product == "vpdpbusd.512":
        spread = tirx.reinterpret("uint8x64", fill(codes, LANES))
        return T.call_llvm_pure_intrin(
            "int32x16", "llvm.x86.avx512.vpdpbusd.512", sums, spread, weights
        )
    lanes = tirx.reinterpret("int32x16", weights)
    for g in range(DOT_GROUP):
        code = tirx.bitwise_and(tirx.shift_right(codes, tirx.const(8 * g, "int32")), 255)
        up = tirx.shift_left(lanes, fill(tirx.const(24 - 8 * g, "int32"), LANES))
        sums = sums + fill(code, LANES) * tirx.shift_right(up, fill(tirx.const(24, "int32"), LANES))
    return sums


def _quantise_row(x: Any, row: Any, k: int, codes: Any, row_scale: Any) -> None:
    """Emits ``kernels.packing.quantise_rows`` for one row; codes are stored plus 128.

    Magnitudes are compared as whole numbers, in which the bits of non-negative fp32 numbers have
    the same order, since a reduction of floats would have to look out for NaN at each step.
    """
    magnitudes = local(LANES, "int32")
    largest = local(1, "int32")
    whole = k // LANES

    def magnitude(offset: Any, lanes: int) -> Any:
        bits = tirx.reinterpret(vector_type("int32", lanes), x[row, at(offset, lanes)])
        return tirx.bitwise_and(bits, fill(tirx.const(0x7FFFFFFF, "int32"), lanes))

    T.buffer_store(magnitudes, fill(tirx.const(0, "int32"), LANES), [at(0, LANES)])
    with T.serial(0, whole) as c:
        value = tirx.max(magnitudes[at(0, LANES)], magnitude(c * LANES, LANES))
        T.buffer_store(magnitudes, value, [at(0, LANES)])
    reduced = T.call_llvm_pure_intrin(
        "int32", "llvm.vector.reduce.smax.v16i32", magnitudes[at(0, LANES)]
    )
    T.buffer_store(largest, reduced, [0])
    for offset in range(whole * LANES, k):
        T.buffer_store(largest, tirx.max(largest[0], magnitude(offset, 1)), [0])
    inverse = local(1)
    top = tirx.reinterpret("float32", largest[0])
    ratio = tirx.Select(largest[0] > 0, T.float32(INT8_MAX) / top, T.float32(0))
    T.buffer_store(inverse, ratio, [0])
    T.buffer_store(row_scale, top * T.float32(1.0 / INT8_MAX), [row])

    def code(offset: Any, lanes: int) -> None:
        scaled = tirx.nearbyint(x[row, at(offset, lanes)] * fill(inverse[0], lanes))
        shifted = tirx.Cast(vector_type("int32", lanes), scaled) + fill(
            tirx.const(128, "int32"), lanes
        )
        byte = tirx.Cast(vector_type("uint8", lanes), shifted)
        T.buffer_store(codes, byte, [row, at(offset, lanes)])

    with T.serial(0, whole) as c:
        code(c * LANES, LANES)
    for offset, lanes in spans(k % LANES):
        code(whole * LANES + offset, lanes)


def dot_panels(
    workload: Workload,
    target: KernelTarget,
    stored: tuple[str, int] = ("int8", LANES * DOT_GROUP),
    decode: Callable[[Any], Any] = lambda weights: weights,
) -> tirx.PrimFunc:
    """int8 dot products and all around them: ``main(x, w, scale, bias, offset, out)``.

    The rows of x are quantised once into a workspace, then multiplied as unsigned bytes; what the
    shift by 128 adds, ``offset[n]``, is taken off at the end.

    Args:
        workload: An int8 linear; its m is taken from x at each launch.
        target: The CPU.
        stored: Type of the stored weights, and how many elements make one vector of 64 weights.
        decode: Turns these into int8x64, once a panel row and tile.
    """
    schedule = _chosen.get() or default_schedule(workload, target)
    k, n = workload.k, workload.n
    panels, groups = -(-n // PANEL), -(-k // DOT_GROUP)
    dtype, width = stored

    def body() -> None:
        m = T.int32()
        x = argument("x", (m, k), "float32")
        w = argument("w", (panels, groups, VECTORS * width), dtype)
        scale = argument("scale", (panels * PANEL,), "float32")
        bias = argument("bias", (panels * PANEL,), "float32")
        offset = argument("offset", (panels * PANEL,), "int32")
        out = argument("out", (m, n), "float32")
        codes = T.alloc_buffer((m, groups * DOT_GROUP), "uint8", scope="global")
        row_scale = T.alloc_buffer((m,), "float32", scope="global")
        with T.parallel(0, m) as row:
            _quantise_row(x, row, k, codes, row_scale)

        def tile(rows: int, first: Any, panel: Any) -> None:
            def load(g: Any, v: int) -> Any:
                return decode(w[panel, g, at(v * width, width)])

            def multiply(total: Any, r: int, g: Any, weights: Any) -> Any:
                four = tirx.reinterpret("int32", codes[first + r, at(g * DOT_GROUP, DOT_GROUP)])
                return dot_groups(target, total, four, weights)

            run = ("int8", LANES * DOT_GROUP)
            sums = _accumulate(rows, groups, "int32", run, load, multiply)
            for r in range(rows):
                vectors = []
                for v, value in enumerate(sums[r]):
                    channel = at(panel * PANEL + v * LANES, LANES)
                    exact = tirx.Cast("float32x16", value - offset[channel])
                    factor = fill(row_scale[first + r], LANES) * scale[channel]
                    vectors.append(exact * factor + bias[channel])
                _store_row(out, first + r, panel, n, vectors)

        tiles(m, panels, schedule["tile_rows"], bool(schedule["panels_outer"]), tile)

    return program(body)

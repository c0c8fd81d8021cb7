"""Rows of fp32 activations into what an inner product reads: int8 codes or bf16 numbers."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.lowerings.emit import (
    LANES,
    at,
    bf16_bits,
    fill,
    local,
    prefetch,
    row_totals,
    spans,
    vector_type,
)
from kernels.packing import BF16_GROUP, DOT_GROUP, INT8_MAX

# The first pass over a row asks for what comes that much later. The hardware's own prefetch
# begins anew at each page, and main memory would be waited for.
_AHEAD_BYTES = 4096


def _i32(value: int, lanes: int = 1) -> Any:
    return fill(tirx.const(value, "int32"), lanes)


def _largest_magnitude(x: Any, row: Any, k: int) -> Any:
    """Bits of the largest magnitude of a row, as an int32 in a register.

    Magnitudes are compared as whole numbers, in which the bits of non-negative fp32 numbers have
    the same order, since a reduction of floats would have to look out for NaN at each step.
    """
    magnitudes, largest = local(LANES, "int32"), local(1, "int32")
    whole = k // LANES

    def magnitude(offset: Any, lanes: int) -> Any:
        bits = tirx.reinterpret(vector_type("int32", lanes), x[row, at(offset, lanes)])
        return tirx.bitwise_and(bits, _i32(0x7FFFFFFF, lanes))

    T.buffer_store(magnitudes, _i32(0, LANES), [at(0, LANES)])
    with T.serial(0, whole) as c:
        _look_ahead(x, row, k, c * LANES)
        value = tirx.max(magnitudes[at(0, LANES)], magnitude(c * LANES, LANES))
        T.buffer_store(magnitudes, value, [at(0, LANES)])
    reduced = T.call_llvm_pure_intrin(
        "int32", "llvm.vector.reduce.smax.v16i32", magnitudes[at(0, LANES)]
    )
    T.buffer_store(largest, reduced, [0])
    for offset in range(whole * LANES, k):
        T.buffer_store(largest, tirx.max(largest[0], magnitude(offset, 1)), [0])
    return largest


def _look_ahead(x: Any, row: Any, k: int, column: Any) -> None:
    prefetch(x, [row + max(1, _AHEAD_BYTES // (4 * k)), column])


def _each_vector(k: int, emit: Any) -> None:
    """Calls ``emit(offset, lanes)`` in a loop over whole vectors, then for the rest."""
    whole = k // LANES
    with T.serial(0, whole) as c:
        emit(c * LANES, LANES)
    for offset, lanes in spans(k % LANES):
        emit(whole * LANES + offset, lanes)


def quantise_row(x: Any, row: Any, k: int, codes: Any, slot: Any, row_scale: Any) -> None:
    """Emits ``kernels.packing.quantise_rows`` for one row.

    Args:
        x: fp32 ``(m, k)``.
        row: Of x.
        k: Inputs.
        codes: int8, or uint8 for codes plus 128; the row's go to ``codes[slot]``, and 0 to what
            pads it: weights of one bit have no 0.
        slot: Row of the workspace.
        row_scale: fp32, the row's scale goes to ``row_scale[slot]``.
    """
    largest, inverse = _largest_magnitude(x, row, k), local(1)
    top = tirx.reinterpret("float32", largest[0])
    ratio = tirx.Select(largest[0] > 0, T.float32(INT8_MAX) / top, T.float32(0))
    T.buffer_store(inverse, ratio, [0])
    T.buffer_store(row_scale, top * T.float32(1.0 / INT8_MAX), [slot])

    def code(offset: Any, lanes: int) -> None:
        scaled = tirx.nearbyint(x[row, at(offset, lanes)] * fill(inverse[0], lanes))
        whole = tirx.Cast(vector_type("int32", lanes), scaled)
        if codes.dtype == "uint8":
            whole = whole + _i32(128, lanes)
        byte = tirx.Cast(vector_type(codes.dtype, lanes), whole)
        T.buffer_store(codes, byte, [slot, at(offset, lanes)])

    _each_vector(k, code)
    for padding in range(k, -(-k // DOT_GROUP) * DOT_GROUP):
        T.buffer_store(codes, tirx.const(0, codes.dtype), [slot, padding])


def round_row(x: Any, row: Any, k: int, bits: Any, slot: Any) -> None:
    """Rounds one row to bf16, half to even, into ``bits[slot]`` (int16); what pads it gets 0."""

    def rounded(offset: Any, lanes: int) -> None:
        _look_ahead(x, row, k, offset)
        half = bf16_bits(x[row, at(offset, lanes)], lanes)
        T.buffer_store(bits, half, [slot, at(offset, lanes)])

    _each_vector(k, rounded)
    for padding in range(k, -(-k // BF16_GROUP) * BF16_GROUP):
        # Left as it was it could be a NaN, which no weight of 0 makes good.
        T.buffer_store(bits, tirx.const(0, "int16"), [slot, padding])


def normalise_row(x: Any, row: Any, k: int, norm: Any, out: Any, slot: Any) -> None:
    """Layer norm of one row into ``out[slot]``.

    The variance is that of the differences from the mean, in a second pass over the row: of the
    squares it would lose digits.

    Args:
        x: fp32 ``(m, k)``.
        row: Of x.
        k: Inputs.
        norm: ``(2k + 1,)``: weight, bias and epsilon, one after the other.
        out: fp32 ``(rows, k)``.
        slot: Of its rows.

    Source:
        Ba, Kiros, Hinton, Layer Normalization (arXiv 1607.06450), equation 4.
    """
    moments = local(2)

    def mean_of(term: Callable[[Any, int], Any], moment: int) -> None:
        (total,) = row_totals(k, [term])
        T.buffer_store(moments, total * T.float32(1.0 / k), [moment])

    def difference(offset: Any, lanes: int) -> Any:
        return x[row, at(offset, lanes)] - fill(moments[0], lanes)

    mean_of(lambda offset, lanes: x[row, at(offset, lanes)], 0)
    mean_of(lambda offset, lanes: difference(offset, lanes) * difference(offset, lanes), 1)
    inverse = T.float32(1) / tirx.sqrt(moments[1] + norm[2 * k])
    T.buffer_store(moments, inverse, [1])

    def store(offset: Any, lanes: int) -> None:
        _look_ahead(x, row, k, offset)
        where = at(offset, lanes)
        scaled = difference(offset, lanes) * fill(moments[1], lanes)
        value = scaled * norm[at(offset, lanes)] + norm[at(k + offset, lanes)]
        T.buffer_store(out, value, [slot, where])

    _each_vector(k, store)


def normalised(x: Any, row: Any, k: int, norm: Any) -> tuple[Any, Any]:
    """Where a row lies once it is normalised: an array and a row of it; as it is without a norm."""
    if norm is None:
        return x, row
    own, first = local((1, k)), tirx.const(0, "int32")
    normalise_row(x, row, k, norm, own, first)
    return own, first


def copy_row(x: Any, row: Any, k: int, copies: Any, slot: Any) -> None:
    """One row as it is into ``copies[slot]``."""

    def copy(offset: Any, lanes: int) -> None:
        T.buffer_store(copies, x[row, at(offset, lanes)], [slot, at(offset, lanes)])

    _each_vector(k, copy)


def prepare_row(
    x: Any,
    row: Any,
    k: int,
    fused: Collection[str],
    norm: Any,
    prepared: Any,
    slot: Any,
    row_scale: Any,
) -> None:
    """One row as an inner product reads it: normalised, then quantised, rounded or as it is.

    Args:
        x: fp32 ``(m, k)``.
        row: Of x.
        k: Inputs.
        fused: Whether ``quantise`` or ``cast``, as a workload has them.
        norm: Of ``normalised``.
        prepared: The row goes to ``prepared[slot]``.
        slot: Row of the workspace.
        row_scale: Of ``quantise_row``; None where it does not quantise.
    """
    x, row = normalised(x, row, k, norm)
    if "quantise" in fused:
        quantise_row(x, row, k, prepared, slot, row_scale)
    elif "cast" in fused:
        round_row(x, row, k, prepared, slot)
    else:
        copy_row(x, row, k, prepared, slot)

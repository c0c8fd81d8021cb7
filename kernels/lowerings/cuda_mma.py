"""The tile of NVIDIA's tensor cores that the linears and the attention products share.

A warp multiplies by ``mma.sync``, whose operands are 32-bit words of neighbouring inputs in fixed
places of its lanes. The weights or values are its left operand (16 channels), the activations or
codes its right one (8 rows of the result). A sum does not care in which order its terms come, nor a
product in which order its channels are computed: both orders are chosen such that each lane reads
and writes up to 16 neighbouring bytes, and that they are in the right registers already. Nothing is
staged in shared memory: warps of a block that read the same find it in the first-level cache.

Source: PTX ISA, matrix fragments for mma.m8n8k16, mma.m16n8k16 and mma.m16n8k32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import tvm.script.ir_builder.tirx as T
from tvm import DataType, tirx

WARP = 32
# Of a block.
WARPS = 4
THREADS = WARPS * WARP
# Rows of the result that one mma computes, and channels of the two that a warp runs side by side.
TILE_ROWS = 8
CHANNEL_TILES = 2
TILE_CHANNELS = 16 * CHANNEL_TILES
# Lanes that share a row's inputs, and words of them that each brings to an mma.
PARTS = 4
PAIR = 2
# Elements that a lane reads or writes at once: 16 bytes of fp32, int32 or words.
QUAD = 4

# Given the references to a lane's 4 sums and its 4 left and 2 right words, adds their product.
Mma = Callable[[list[Any], list[Any], list[Any]], None]
# A lane's left words by channel tile, and its right words by row tile.
Operands = tuple[list[list[Any]], list[list[Any]]]


def mma_int8(architecture: int) -> Mma:
    """int8 × int8 into int32 (held as uint32): a word is 4 inputs, an mma 32."""

    def multiply(sums: list[Any], left: list[Any], right: list[Any]) -> None:
        if architecture >= 80:
            name = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"
            T.evaluate(T.ptx[name](*sums, *left, *right, *sums))
            return
        for half in range(2):
            some = sums[2 * half : 2 * half + 2]
            for i in range(PAIR):
                name = "mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32"
                T.evaluate(T.ptx[name](*some, left[half + 2 * i], right[i], *some))

    return multiply


def mma_bf16(sums: list[Any], left: list[Any], right: list[Any]) -> None:
    """bf16 × bf16 into fp32: a word is 2 inputs, an mma 16."""
    name = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    T.evaluate(T.ptx[name](*sums, *left, *right, *sums))


@dataclass(frozen=True)
class Lane:
    """A thread's place.

    Attributes:
        warp: Its warp within the block.
        place: 0..31, within the warp.
        line: 0..7: its row of the right operand, and its share of the channels.
        part: 0..3: its share of the inputs, and of the rows of the result.
    """

    warp: Any
    place: Any
    line: Any
    part: Any


def lane_of(thread: Any) -> Lane:
    """The lane of ``threadIdx.x``."""
    place = tirx.floormod(thread, WARP)
    return Lane(tirx.floordiv(thread, WARP), place, place // PARTS, place % PARTS)


def u32(value: int) -> Any:
    """A word."""
    return tirx.const(value, "uint32")


def permute_bytes(low: Any, high: Any, selector: Any) -> Any:
    """Four of the eight bytes of two words, as chosen by the selector's low 16 bits."""
    return T.call_extern("uint32", "__byte_perm", low, high, selector)


def registers(count: int, dtype: str) -> Any:
    """A thread's own array. Every index must be known when it is compiled."""
    return T.alloc_buffer((count,), dtype, scope="local")


def as_words(buffer: Any, dtype: str = "uint32") -> Any:
    """The same memory, its last dimension in words of 32 bits."""
    *outer, last = buffer.shape
    width = int(last) * DataType(buffer.dtype).itemsize // 4
    return T.decl_buffer((*outer, width), dtype, data=buffer.data)


def multiply_tile(
    mma: Mma, dtype: str, row_tiles: int, steps: Any, load: Callable[[Any], list[Operands]]
) -> Any:
    """Sums ``row_tiles × 8`` rows by 32 channels over k in registers.

    Args:
        mma: One of this module's.
        dtype: Of its sums.
        row_tiles: Tiles of 8 rows.
        steps: Passes over k.
        load: Step -> operands whose products are summed. Left words are those of the lane's first
            channel, of its second, and the next word of each.

    Returns:
        The registers, for ``sums_of``.
    """
    sums = registers(row_tiles * CHANNEL_TILES * 4, dtype)
    for i in range(row_tiles * CHANNEL_TILES * 4):
        T.buffer_store(sums, tirx.const(0, dtype), [i])
    with T.serial(0, steps) as step:
        for left, right in load(step):
            for r, row in enumerate(right):
                for c, channels in enumerate(left):
                    first = (r * CHANNEL_TILES + c) * 4
                    mma([sums[first + i] for i in range(4)], channels, row)
    return sums


def sums_of(sums: Any, lane: Lane) -> Iterator[tuple[Any, list[Any]]]:
    """A lane's rows, within those of its warp, and its sums there: two channels of each tile."""
    for r in range(int(sums.shape[0]) // (CHANNEL_TILES * 4)):
        for which in range(2):
            first = [(r * CHANNEL_TILES + c) * 4 + which for c in range(CHANNEL_TILES)]
            found = [sums[i + 2 * half] for i in first for half in range(2)]
            yield r * TILE_ROWS + lane.part * 2 + which, found


def sum_over_warps(sums: Any, lane: Lane, tile: Any, share: Any, tiles: int, shares: int) -> None:
    """Adds up what several warps summed over different inputs, in the one whose share is 0.

    Args:
        sums: A lane's sums.
        lane: The thread's.
        tile, share: Which of the block's tiles its warp works on, and on which share of the inputs.
        tiles, shares: How many there are.
    """
    if shares == 1:
        return
    count = int(sums.shape[0])
    kept = T.alloc_buffer((tiles * (shares - 1), count, WARP), sums.dtype, scope="shared")
    with T.If(share > 0), T.Then():
        for i in range(count):
            T.buffer_store(kept, sums[i], [tile * (shares - 1) + share - 1, i, lane.place])
    T.evaluate(T.tvm_storage_sync("shared"))
    with T.If(share == 0), T.Then():
        for other in range(shares - 1):
            for i in range(count):
                more = kept[tile * (shares - 1) + other, i, lane.place]
                T.buffer_store(sums, sums[i] + more, [i])


def read(buffer: Any, where: list[Any], count: int) -> list[Any]:
    """Reads neighbours of the last dimension at once, all of which exist."""
    held = registers(count, buffer.dtype)
    *outer, first = where
    T.buffer_store(held, buffer[(*outer, tirx.Ramp(first, 1, count))], [tirx.Ramp(0, 1, count)])
    return [held[i] for i in range(count)]


def read_quad(buffer: Any, where: list[Any], valid: Any = None) -> list[Any]:
    """Reads 4 neighbours of the last dimension; 0 beyond its end and where ``valid`` is not."""
    *outer, first = where
    size, dtype = int(buffer.shape[-1]), buffer.dtype
    held, zero = registers(QUAD, dtype), tirx.const(0, dtype)

    def inside(i: int) -> Any:
        return first + i < size if valid is None else tirx.all(valid, first + i < size)

    if size % QUAD == 0:
        value = buffer[(*outer, tirx.Ramp(first, 1, QUAD))]
        value = tirx.if_then_else(inside(0), value, T.broadcast(zero, QUAD))
        T.buffer_store(held, value, [tirx.Ramp(0, 1, QUAD)])
    else:
        for i in range(QUAD):
            value = tirx.if_then_else(inside(i), buffer[(*outer, first + i)], zero)
            T.buffer_store(held, value, [i])
    return [held[i] for i in range(QUAD)]


def write(buffer: Any, where: list[Any], values: list[Any]) -> None:
    """Writes neighbours of the last dimension, as far as it reaches."""
    *outer, first = where
    size, count = int(buffer.shape[-1]), len(values)
    if size % count == 0:
        held = registers(count, buffer.dtype)
        for i, value in enumerate(values):
            T.buffer_store(held, value, [i])
        with T.If(first < size), T.Then():
            whole = held[tirx.Ramp(0, 1, count)]
            T.buffer_store(buffer, whole, [*outer, tirx.Ramp(first, 1, count)])
        return
    for i, value in enumerate(values):
        with T.If(first + i < size), T.Then():
            T.buffer_store(buffer, value, [*outer, first + i])

"""Linears on tensor cores: x ``(m, k)`` times a packed weight, with scale and bias.

The weights come in the CPU's panels of 32 output channels. A word of theirs is 4 (int8) or 2 (bf16)
neighbouring inputs of one channel, which is what a lane of a tensor core holds.

Not yet run on a GPU: the tests compile the text to cubin and emulate it, which shows its arithmetic
but no speed. Default schedules, streams and CUDA graphs are for the first GPU to prove.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import islice
from typing import Any

import tvm.script.ir_builder.tirx as T
from torch import Tensor, int32
from tvm import tirx

from kernels.lowerings.cuda_mma import (
    PAIR,
    PARTS,
    QUAD,
    THREADS,
    TILE_ROWS,
    WARP,
    WARPS,
    Lane,
    Mma,
    as_words,
    lane_of,
    mma_bf16,
    mma_int8,
    multiply_tile,
    permute_bytes,
    read,
    read_quad,
    registers,
    sum_over_warps,
    sums_of,
    u32,
    write,
)
from kernels.lowerings.emit import argument, program
from kernels.packing import BF16_GROUP, DOT_GROUP, INT8_MAX, PANEL
from kernels.targets import KernelTarget
from kernels.workload import Workload

# Two mma a pass, so that a lane reads 16 bytes of a row of int8.
PASS_WORDS = PARTS * QUAD

# Not yet measured on a GPU: warps that keep a large one busy, beyond which sharing a tile's inputs
# only makes more traffic, and the fewest inputs that are worth a warp.
_BUSY_WARPS = 1024
_LEAST_INPUTS = 256


def schedule_space(target: KernelTarget) -> dict[str, tuple[int, ...]]:
    """What may be chosen.

    Returns:
        ``row_tiles``: tiles of 8 rows a warp; ``k_warps``: warps that share a tile's inputs.
    """
    return {"row_tiles": (2, 4, 8), "k_warps": (1, 2, 4)}


def default_schedule(workload: Workload, target: KernelTarget) -> dict[str, int]:
    """The schedule of a shape that nobody has tuned."""
    row_tiles = 4
    tiles = -(-workload.m // (TILE_ROWS * row_tiles)) * -(-workload.n // PANEL)
    shares = WARPS
    while shares > 1 and (tiles * shares > _BUSY_WARPS or workload.k < _LEAST_INPUTS * shares):
        shares //= 2
    return {"row_tiles": row_tiles, "k_warps": shares}


@dataclass(frozen=True)
class _Weights:
    """How a form's weights come from memory.

    Attributes:
        dtype: Type of the packed weight.
        row: Its elements of 32 channels and one word of inputs.
        load: ``load(words, panel, group, lane)``: that word of a lane's four channels.
        channels: Where in the panel they are: runs of neighbours, each as (first, count).
    """

    dtype: str
    row: int
    load: Callable[[Any, Any, Any, Lane], list[Any]]
    channels: Callable[[Lane], list[tuple[Any, int]]]


def _held(value: Any) -> Any:
    """Computes a value once."""
    register = registers(1, "uint32")
    T.buffer_store(register, value, [0])
    return register[0]


def _load_words(words: Any, panel: Any, group: Any, lane: Lane) -> list[Any]:
    # In two halves: each is a pair of registers that the tensor core wants side by side.
    first = lane.line * QUAD
    return [word for i in (0, 2) for word in read(words, [panel, group, first + i], 2)]


def _in_order(lane: Lane) -> list[tuple[Any, int]]:
    return [(lane.line * QUAD, QUAD)]


def _load_pow2(words: Any, panel: Any, group: Any, lane: Lane) -> list[Any]:
    """Pairs of codes ``sign << 7 | (p + 127)``, each the upper byte of a bf16 but for one bit."""
    found = []
    for packed in read(words, [panel, group, lane.line * 2], 2):
        for selector in (0x4140, 0x4342):
            spread = _held(permute_bytes(packed, u32(0), u32(selector)))
            sign = (spread & u32(0x00800080)) << u32(8)
            found.append(_held(sign | (spread & u32(0x007F007F)) << u32(7)))
    return found


def _from_nibbles(packed: Any) -> tuple[Any, Any]:
    """Eight codes ``sign << 3 | p``: the low and the high ones, as words of int8 ±2^p, p = 7 as 0.

    A byte selector has four bits as well, so that the codes themselves look up the powers.
    """
    powers = u32(0x08040201), u32(0x00402010)
    exponents = _held(packed & u32(0x77777777))
    first = _held(permute_bytes(*powers, exponents))
    last = _held(permute_bytes(*powers, exponents >> u32(16)))

    def signed(selector: int, sign_bit: int) -> Any:
        sign = _held((packed >> u32(sign_bit)) & u32(0x01010101))
        power = permute_bytes(first, last, u32(selector))
        # Two's complement byte by byte. No byte carries into the next: a 0 has no sign.
        return _held((power ^ (sign * u32(0xFF))) + sign)

    return signed(0x6420, 3), signed(0x7531, 7)


def _load_nibbles(words: Any, panel: Any, group: Any, lane: Lane) -> list[Any]:
    packed = read(words, [panel, group, lane.line * 2], 2)
    (low, high), (next_low, next_high) = (_from_nibbles(word) for word in packed)
    return [low, next_low, high, next_high]


def _nibble_channels(lane: Lane) -> list[tuple[Any, int]]:
    """By ``kernels.packing.pack_nibbles``, high codes are 8 channels further than low ones."""
    first = lane.line // 4 * 16 + lane.line % 4 * 2
    return [(first, 2), (first + 8, 2)]


_INT8 = _Weights("int8", PANEL * DOT_GROUP, _load_words, _in_order)
_INT4 = _Weights("uint8", PANEL * DOT_GROUP // 2, _load_nibbles, _nibble_channels)
_BF16 = _Weights("int16", PANEL * BF16_GROUP, _load_words, _in_order)
_POW2 = _Weights("int8", PANEL * BF16_GROUP, _load_pow2, _in_order)


def _product(
    out: Any,
    w: Any,
    weights: _Weights,
    schedule: Mapping[str, int],
    mma: Mma,
    dtype: str,
    load_row: Callable[[Any, Any], list[Any]],
    finish: Callable[[Any, int], Callable[[Any, list[Any]], list[Any]]],
) -> None:
    """One launch: a block is a few warps, each with its tile of rows × one panel.

    Args:
        load_row: ``load_row(row, word)``: 4 words of an activation row, zeros beyond k.
        finish: ``finish(channel, count)(row, sums)``: the sums of neighbouring channels to results.
    """
    m = out.shape[0]
    panels, groups = int(w.shape[0]), int(w.shape[1])
    shares, tiles = schedule["k_warps"], WARPS // schedule["k_warps"]
    # Square blocks read the least.
    panel_tiles = min(2, tiles)
    height = TILE_ROWS * schedule["row_tiles"]
    block_height = height * (tiles // panel_tiles)
    with (
        T.launch_thread("blockIdx.x", tirx.ceildiv(m, block_height)) as row_block,
        T.launch_thread("blockIdx.y", -(-panels // panel_tiles)) as panel_block,
        T.launch_thread("threadIdx.x", THREADS) as thread,
    ):
        lane, words = lane_of(thread), as_words(w)
        tile, share = lane.warp // shares, lane.warp % shares
        first_row = row_block * block_height + tile // panel_tiles * height
        panel = panel_block * panel_tiles + tile % panel_tiles
        # What lies beyond the last row, panel or input repeats the last one and is not written, or
        # meets a zero.
        known_panel = tirx.min(panel, panels - 1)

        def load(step: Any) -> Any:
            word = (step * shares + share) * PASS_WORDS + lane.part * QUAD
            rows = [
                load_row(tirx.min(first_row + r * TILE_ROWS + lane.line, m - 1), word)
                for r in range(schedule["row_tiles"])
            ]
            operands = []
            for i in range(0, QUAD, PAIR):
                first, second = (
                    weights.load(words, known_panel, tirx.min(word + i + j, groups - 1), lane)
                    for j in range(PAIR)
                )
                left = [first[c : c + 2] + second[c : c + 2] for c in (0, 2)]
                operands.append((left, [row[i : i + PAIR] for row in rows]))
            return operands

        steps = -(-groups // (PASS_WORDS * shares))
        sums = multiply_tile(mma, dtype, schedule["row_tiles"], steps, load)
        sum_over_warps(sums, lane, tile, share, tiles, shares)
        with T.If(share == 0), T.Then():
            runs = weights.channels(lane)
            finishes = [finish(known_panel * PANEL + first, count) for first, count in runs]
            for within, found in sums_of(sums, lane):
                row, left_over = first_row + within, iter(found)
                with T.If(row < m), T.Then():
                    for (first, count), results in zip(runs, finishes):
                        channels = list(islice(left_over, count))
                        write(out, [row, panel * PANEL + first], results(row, channels))


def code_words(k: int, k_warps: int) -> int:
    """Words of four codes in a row of quantised activations: whole passes of all warps."""
    words = PASS_WORDS * k_warps
    return -(-k // (DOT_GROUP * words)) * words


def _code(value: Any) -> Any:
    """The nearest whole number, halves to even, in the low byte."""
    return T.call_extern("int32", "__float2int_rn", value) & T.int32(255)


def _quantise(x: Any, codes: Any, x_scale: Any) -> None:
    """One launch, a warp a row: int8 codes, four to a word and zeros beyond k, and their scale."""
    m, k = x.shape
    words = int(codes.shape[1])
    with (
        T.launch_thread("blockIdx.x", tirx.ceildiv(m, WARPS)) as block,
        T.launch_thread("threadIdx.x", THREADS) as thread,
    ):
        lane = lane_of(thread)
        row = block * WARPS + lane.warp
        largest, inverse = registers(1, "float32"), registers(1, "float32")
        T.buffer_store(largest, T.float32(0), [0])
        with T.If(row < m), T.Then():
            with T.serial(0, -(-int(k) // (WARP * QUAD))) as step:
                for value in read_quad(x, [row, (step * WARP + lane.place) * QUAD]):
                    T.buffer_store(largest, tirx.max(largest[0], tirx.abs(value)), [0])
            for distance in (16, 8, 4, 2, 1):
                other = T.tvm_warp_shuffle_xor(u32(0xFFFFFFFF), largest[0], distance, WARP, WARP)
                T.buffer_store(largest, tirx.max(largest[0], other), [0])
            # By its name: TVM has nvcc take every / of floats for an approximation.
            exact = T.call_extern("float32", "__fdiv_rn", T.float32(INT8_MAX), largest[0])
            zero = T.float32(0)
            T.buffer_store(inverse, tirx.if_then_else(largest[0] > zero, exact, zero), [0])
            with T.serial(0, -(-words // WARP)) as step:
                word = step * WARP + lane.place
                values = read_quad(x, [row, word * QUAD])
                bytes_ = [_code(v * inverse[0]) << T.int32(8 * i) for i, v in enumerate(values)]
                with T.If(word < words), T.Then():
                    T.buffer_store(codes, reduce(tirx.bitwise_or, bytes_), [row, word])
            with T.If(lane.place == 0), T.Then():
                T.buffer_store(x_scale, largest[0] * T.float32(1 / INT8_MAX), [row])


def _int8(
    workload: Workload, target: KernelTarget, schedule: Mapping[str, int], weights: _Weights
) -> tirx.PrimFunc:
    """``main(x, w, scale, bias, offset, codes, x_scale, out)``; codes and x_scale are memory."""
    k, n = workload.k, workload.n
    panels, groups = -(-n // PANEL), -(-k // DOT_GROUP)

    def body() -> None:
        m = T.int32()
        x = argument("x", (m, k), "float32")
        w = argument("w", (panels, groups, weights.row), weights.dtype)
        scale = argument("scale", (panels * PANEL,), "float32")
        bias = argument("bias", (panels * PANEL,), "float32")
        # Only the unsigned products of x86 need it; one packing serves all targets.
        argument("offset", (panels * PANEL,), "int32")
        codes = argument("codes", (m, code_words(k, schedule["k_warps"])), "int32")
        x_scale = argument("x_scale", (m,), "float32")
        out = argument("out", (m, n), "float32")
        _quantise(x, codes, x_scale)
        words = as_words(codes)

        def finish(channel: Any, count: int) -> Any:
            factors, biases = read(scale, [channel], count), read(bias, [channel], count)

            def results(row: Any, sums: list[Any]) -> list[Any]:
                whole = [T.Cast("float32", T.reinterpret("int32", total)) for total in sums]
                return [
                    total * (x_scale[row] * factor) + add
                    for total, factor, add in zip(whole, factors, biases)
                ]

            return results

        mma = mma_int8(target.architecture)

        def load_row(row: Any, word: Any) -> list[Any]:
            return read(words, [row, word], QUAD)

        _product(out, w, weights, schedule, mma, "uint32", load_row, finish)

    return program(body)


def _bf16(workload: Workload, schedule: Mapping[str, int], weights: _Weights) -> tirx.PrimFunc:
    """``main(x, w, [scale,] bias, out)``: activations are rounded to bf16 as they are read."""
    k, n = workload.k, workload.n
    panels, groups = -(-n // PANEL), -(-k // BF16_GROUP)

    def body() -> None:
        m = T.int32()
        x = argument("x", (m, k), "float32")
        w = argument("w", (panels, groups, weights.row), weights.dtype)
        scaled = "scale" in workload.fused
        scale = argument("scale", (panels * PANEL,), "float32") if scaled else None
        bias = argument("bias", (panels * PANEL,), "float32")
        out = argument("out", (m, n), "float32")

        def load_row(row: Any, word: Any) -> list[Any]:
            rounded, first = registers(QUAD, "uint32"), word * BF16_GROUP
            values = [v for i in (0, QUAD) for v in read_quad(x, [row, first + i])]
            for i, (low, high) in enumerate(zip(values[::2], values[1::2])):
                T.evaluate(T.ptx["cvt.rn.bf16x2.f32"](rounded[i], high, low))
            return [rounded[i] for i in range(QUAD)]

        def finish(channel: Any, count: int) -> Any:
            biases = read(bias, [channel], count)
            factors = [T.float32(1)] * count if scale is None else read(scale, [channel], count)
            return lambda row, sums: [
                total * factor + add for total, factor, add in zip(sums, factors, biases)
            ]

        _product(out, w, weights, schedule, mma_bf16, "float32", load_row, finish)

    return program(body)


def int8(workload: Workload, target: KernelTarget, schedule: Mapping[str, int]) -> tirx.PrimFunc:
    """mult_int8, mult_int7 and shift_int8: the same kernel to the instruction."""
    return _int8(workload, target, schedule, _INT8)


def nibbles(workload: Workload, target: KernelTarget, schedule: Mapping[str, int]) -> tirx.PrimFunc:
    """shift_int4: codes of four bits, looked up in registers on their way to the tensor cores."""
    return _int8(workload, target, schedule, _INT4)


def bf16(workload: Workload, target: KernelTarget, schedule: Mapping[str, int]) -> tirx.PrimFunc:
    """mult_bf16."""
    return _bf16(workload, schedule, _BF16)


def pow2(workload: Workload, target: KernelTarget, schedule: Mapping[str, int]) -> tirx.PrimFunc:
    """shift_bf16: one-byte codes, widened to the bf16 numbers ±2^p in registers."""
    return _bf16(workload, schedule, _POW2)


def memory(
    workload: Workload, schedule: Mapping[str, int], arguments: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """Of the int8 forms: activations as codes, and their scales."""
    x = arguments[0]
    codes = x.new_empty(x.shape[0], code_words(workload.k, schedule["k_warps"]), dtype=int32)
    return codes, x.new_empty(x.shape[0])

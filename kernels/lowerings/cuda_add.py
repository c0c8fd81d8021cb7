"""KᵀV and Q(KᵀV) on tensor cores: sums of values by the signs of queries and keys.

The codes ±1 or {0, 1} are made of fp32 or bf16 numbers on the way to the tensor core, where they
are exact in bf16. An fp32 value is the sum of three bf16 numbers (24 = 3 · 8 bits of significand),
so that its products are exact too and the result is that of sums in fp32. Values must be finite.

Not yet run on a GPU; see ``cuda_linear``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tvm.script.ir_builder.tirx as T
from torch import Tensor, float32
from tvm import tirx

from kernels.lowerings.cuda_mma import (
    CHANNEL_TILES,
    PAIR,
    PARTS,
    QUAD,
    THREADS,
    TILE_CHANNELS,
    TILE_ROWS,
    WARPS,
    Operands,
    lane_of,
    mma_bf16,
    multiply_tile,
    permute_bytes,
    read_quad,
    registers,
    sum_over_warps,
    sums_of,
    u32,
    write,
)
from kernels.lowerings.emit import argument, program
from kernels.targets import KernelTarget
from kernels.workload import Workload

# Tokens of KᵀV, or code bits of Q(KᵀV), that an mma takes.
STEP = PARTS * QUAD
# KᵀV is summed over chunks of a sequence at once, then over the chunks. Not yet tuned on a GPU.
CHUNK_TOKENS = 256
# Row tiles of a warp: code bits of KᵀV at most, and tokens of Q(KᵀV).
_MOST_BIT_TILES = 8
_TOKEN_TILES = 4

_UPPER_HALF = 0xFFFF0000


def _raw(buffer: Any) -> Any:
    """The same memory as whole numbers: a number is positive when they are, also a denormal one."""
    dtype = {"float32": "int32", "bfloat16": "int16"}[buffer.dtype]
    return T.decl_buffer(buffer.shape, dtype, data=buffer.data)


def _codes(numbers: list[Any], plus_minus: bool) -> list[Any]:
    """Codes of 4 raw numbers, as 2 words of bf16."""
    one, minus_one = 0x3F80, 0xBF80 if plus_minus else 0

    def code(number: Any, place: int) -> Any:
        shift = 16 * place
        return tirx.Select(number > 0, u32(one << shift), u32(minus_one << shift))

    found = registers(PAIR, "uint32")
    for i in range(PAIR):
        T.buffer_store(found, code(numbers[2 * i], 0) | code(numbers[2 * i + 1], 1), [i])
    return [found[i] for i in range(PAIR)]


def _terms(values: Any, batch: Any, first: Any, limit: Any, channel: Any) -> list[list[list[Any]]]:
    """Left words of 4 rows of values × 4 channels; of fp32, those of three terms.

    Args:
        values: ``(b, rows, n)``.
        batch, channel: Where.
        first, limit: The first of the rows, and where they end: what is beyond counts as 0.
    """
    is_fp32 = values.dtype == "float32"
    source = values if is_fp32 else _raw(values)
    rows = [
        read_quad(source, [batch, first + i, channel], valid=first + i < limit) for i in range(QUAD)
    ]
    found = []
    for _ in range(3 if is_fp32 else 1):
        words = registers(QUAD * PAIR, "uint32")
        for c in range(QUAD):
            for i in range(PAIR):
                pair = [rows[2 * i + j][c] for j in range(2)]
                if is_fp32:
                    low, high = (T.reinterpret("uint32", value) for value in pair)
                    word = permute_bytes(low, high, u32(0x7632))
                else:
                    low, high = (T.Cast("uint32", value) for value in pair)
                    word = (low & u32(0xFFFF)) | (high << u32(16))
                # By channel tile: the first word of both channels, then the second.
                T.buffer_store(words, word, [c // 2 * 4 + i * 2 + c % 2])
        found.append([[words[c * 4 + i] for i in range(4)] for c in range(CHANNEL_TILES)])
        if is_fp32:
            rows = [_remainders(row) for row in rows]
    return found


def _remainders(values: list[Any]) -> list[Any]:
    """What is left of fp32 values without the upper halves of their words: exact."""
    left = registers(QUAD, "float32")
    for i, value in enumerate(values):
        upper = T.reinterpret("uint32", value) & u32(_UPPER_HALF)
        T.buffer_store(left, value - T.reinterpret("float32", upper), [i])
    return [left[i] for i in range(QUAD)]


def _write(out: Any, where: list[Any], sums: list[Any]) -> None:
    if out.dtype == "float32":
        write(out, where, sums)
        return
    words = registers(2, "uint32")
    for i in range(2):
        T.evaluate(T.ptx["cvt.rn.bf16x2.f32"](words[i], sums[2 * i + 1], sums[2 * i]))
    halves = [words[i] >> u32(16 * half) for i in range(2) for half in range(2)]
    write(_raw(out), where, [T.Cast("int16", half & u32(0xFFFF)) for half in halves])


def _kv(keys: Any, values: Any, parts: Any, plus_minus: bool) -> None:
    """One launch: a block sums the tokens of a chunk, shared among its warps, into ``parts``.

    Shapes: keys ``(b, tokens, bits)``, values ``(b, tokens, n)``, parts ``(b, chunks, bits, n)``.
    """
    b, tokens, bits = keys.shape
    chunks, n = parts.shape[1], int(parts.shape[3])
    tiles = -(-int(bits) // TILE_ROWS)
    groups = -(-tiles // _MOST_BIT_TILES)
    row_tiles = -(-tiles // groups)
    size = tirx.ceildiv(tirx.ceildiv(tokens, STEP), chunks) * STEP
    raw = _raw(keys)
    with (
        T.launch_thread("blockIdx.x", b * chunks) as block,
        T.launch_thread("blockIdx.y", -(-n // TILE_CHANNELS)) as channel_block,
        T.launch_thread("blockIdx.z", groups) as group,
        T.launch_thread("threadIdx.x", THREADS) as thread,
    ):
        lane = lane_of(thread)
        batch, chunk = block // chunks, block % chunks
        channel = channel_block * TILE_CHANNELS + lane.line * QUAD
        first_row = group * (row_tiles * TILE_ROWS)
        first = tirx.min(chunk * size, tokens)
        last = tirx.min(first + size, tokens)

        def load(step: Any) -> list[Operands]:
            token = first + (step * WARPS + lane.warp) * STEP + lane.part * QUAD
            known = [tirx.min(token + i, tokens - 1) for i in range(QUAD)]
            codes = []
            for r in range(row_tiles):
                bit = tirx.min(first_row + r * TILE_ROWS + lane.line, bits - 1)
                codes.append(_codes([raw[batch, t, bit] for t in known], plus_minus))
            return [(left, codes) for left in _terms(values, batch, token, last, channel)]

        steps = tirx.ceildiv(last - first, STEP * WARPS)
        sums = multiply_tile(mma_bf16, "float32", row_tiles, steps, load)
        sum_over_warps(sums, lane, 0, lane.warp, 1, WARPS)
        with T.If(lane.warp == 0), T.Then():
            for within, found in sums_of(sums, lane):
                row = first_row + within
                with T.If(row < bits), T.Then():
                    write(parts, [batch, chunk, row, channel], found)


def _sum_chunks(parts: Any, out: Any) -> None:
    """One launch, a thread for each element of ``out``."""
    b, chunks, bits, n = parts.shape
    size = int(bits) * int(n)
    blocks = -(-size // THREADS)
    with (
        T.launch_thread("blockIdx.x", b * blocks) as block,
        T.launch_thread("threadIdx.x", THREADS) as thread,
    ):
        batch, element = block // blocks, block % blocks * THREADS + thread
        with T.If(element < size), T.Then():
            bit, channel = element // n, element % n
            total = registers(1, "float32")
            T.buffer_store(total, T.float32(0), [0])
            with T.serial(0, chunks) as chunk:
                T.buffer_store(total, total[0] + parts[batch, chunk, bit, channel], [0])
            value = total[0]
            if out.dtype != "float32":
                value = T.Cast(out.dtype, value)
            T.buffer_store(out, value, [batch, bit, channel])


def _qkv(queries: Any, values: Any, out: Any, plus_minus: bool) -> None:
    """One launch: a warp looks at some tokens of one of batch × heads.

    Shapes: queries ``(b, tokens, bits)``, values ``(b, bits, n)``, out ``(b, tokens, n)``.
    """
    b, tokens, bits = queries.shape
    height = TILE_ROWS * _TOKEN_TILES
    blocks = tirx.ceildiv(tokens, height * WARPS)
    raw = _raw(queries)
    with (
        T.launch_thread("blockIdx.x", b * blocks) as block,
        T.launch_thread("blockIdx.y", -(-int(out.shape[2]) // TILE_CHANNELS)) as channel_block,
        T.launch_thread("threadIdx.x", THREADS) as thread,
    ):
        lane = lane_of(thread)
        batch = block // blocks
        first_row = (block % blocks * WARPS + lane.warp) * height
        channel = channel_block * TILE_CHANNELS + lane.line * QUAD

        def load(step: Any) -> list[Operands]:
            bit = step * STEP + lane.part * QUAD
            codes = []
            for r in range(_TOKEN_TILES):
                token = tirx.min(first_row + r * TILE_ROWS + lane.line, tokens - 1)
                codes.append(_codes(read_quad(raw, [batch, token, bit]), plus_minus))
            return [(left, codes) for left in _terms(values, batch, bit, bits, channel)]

        sums = multiply_tile(mma_bf16, "float32", _TOKEN_TILES, -(-int(bits) // STEP), load)
        for within, found in sums_of(sums, lane):
            row = first_row + within
            with T.If(row < tokens), T.Then():
                _write(out, [batch, row, channel], found)


def product(workload: Workload, target: KernelTarget, schedule: Mapping[str, int]) -> tirx.PrimFunc:
    """The program of one product, or of both; ``memory`` makes ``parts`` and ``kv``.

    ``main(k, v, parts, out)`` of KᵀV; ``main(q, kv, out)`` of Q(KᵀV); ``main(q, k, v, parts, kv,
    out)`` of both. Batch × heads, tokens and chunks are taken from the operands at each launch.
    """
    plus_minus, dtype, n = workload.alphabet == "pm1", workload.out_dtype, workload.n
    bits = workload.m if workload.kind == "kv" else workload.k

    def body() -> None:
        b, tokens, chunks = T.int32(), T.int32(), T.int32()
        sums, looks_up = workload.kind != "qkv", workload.kind != "kv"
        queries = argument("q", (b, tokens, bits), dtype) if looks_up else None
        keys = argument("k", (b, tokens, bits), dtype) if sums else None
        values = argument("v", (b, tokens, n), dtype) if sums else None
        parts = argument("parts", (b, chunks, bits, n), "float32") if sums else None
        between = "float32" if sums else dtype
        kv = argument("kv", (b, bits, n), between) if looks_up else None
        out = argument("out", (b, tokens if looks_up else bits, n), dtype)
        total = out if kv is None else kv
        if sums:
            _kv(keys, values, parts, plus_minus)
            # A single part of fp32 is the sum itself, in the same memory.
            needed = chunks > 1 if total.dtype == "float32" else chunks > 0
            with T.If(needed), T.Then():
                _sum_chunks(parts, total)
        if looks_up:
            _qkv(queries, kv, out, plus_minus)

    return program(body)


def memory(
    workload: Workload, schedule: Mapping[str, int], arguments: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """What a launch on ``arguments`` writes on the way to its result."""
    if workload.kind == "qkv":
        return ()
    *_, values, out = arguments
    (b, tokens, n), bits = values.shape, arguments[0].shape[2]
    both = workload.kind == "attention"
    total = values.new_empty(b, bits, n, dtype=float32) if both else out
    chunks = max(1, -(-tokens // CHUNK_TOKENS))
    if chunks == 1 and total.dtype == float32:
        parts = total[:, None]
    else:
        parts = values.new_empty(b, chunks, bits, n, dtype=float32)
    return (parts, total) if both else (parts,)

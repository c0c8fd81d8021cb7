"""Products with binary codes by additions: the method of the Four Russians, on rows.

Codes are the signs of fp32 queries or keys, read in nibbles. KᵀV drops each value row into one of
16 buckets a nibble and combines the buckets once; Q(KᵀV) tabulates the 16 subset sums of each
four rows once and then adds one table row a nibble and token.

Source:
    V. L. Arlazarov, E. A. Dinic, M. A. Kronrod, I. A. Faradzev (1970), as used for matrix
    products over {0, 1}; ±1 by ``2 * sum_{code = 1} - sum``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.lowerings.emit import argument, at, fill, local, program, spans
from kernels.targets import KernelTarget
from kernels.workload import Workload

NIBBLE = 4
SUBSETS = 1 << NIBBLE
# A chunk's own buckets and tables cost some 20 tokens' worth of additions.
CHUNK_TOKENS = 1024
MOST_CHUNKS = 16


def _i32(value: int) -> Any:
    return tirx.const(value, "int32")


def _eight_signs(target: KernelTarget, values: Any) -> Any:
    """Bit i of the result says whether ``values[i] > 0`` (fp32x8, zeros of either sign are not)."""
    bits = tirx.reinterpret("int32x8", values)
    # Negative exactly where the number is not above zero: -0 and 0 included.
    not_positive = tirx.bitwise_or(bits, bits - fill(_i32(1), 8))
    if target.movemask:
        signs = tirx.reinterpret("float32x8", not_positive)
        mask = T.call_llvm_pure_intrin("int32", "llvm.x86.avx.movmsk.ps.256", signs)
    else:
        sign = tirx.bitwise_and(tirx.shift_right(not_positive, fill(_i32(31), 8)), fill(_i32(1), 8))
        placed = tirx.shift_left(sign, tirx.Ramp(_i32(0), _i32(1), 8))
        mask = T.call_llvm_pure_intrin("int32", "llvm.vector.reduce.or.v8i32", placed)
    return tirx.bitwise_xor(mask, _i32(255))


def _signs(target: KernelTarget, source: Any, index: list[Any], offset: int, count: int) -> Any:
    """Up to eight code bits of one token, from ``source[*index, offset:offset + count]``."""
    if count == 8:
        return _eight_signs(target, source[(*index, at(offset, 8))])
    bits = _i32(0)
    for i in range(count):
        positive = tirx.Cast("int32", source[(*index, offset + i)] > T.float32(0))
        bits = tirx.bitwise_or(bits, tirx.shift_left(positive, _i32(i)))
    return bits


def _nibbles(target: KernelTarget, source: Any, index: list[Any], bits: int) -> list[Any]:
    """The code of one token cut into nibbles, each kept in a register."""
    found = []
    for offset in range(0, bits, 8):
        count = min(8, bits - offset)
        byte = local(1, "int32")
        T.buffer_store(byte, _signs(target, source, index, offset, count), [0])
        for start in range(0, count, NIBBLE):
            found.append(tirx.bitwise_and(tirx.shift_right(byte[0], _i32(start)), SUBSETS - 1))
    return found


def _each_group(bits: int, emit: Callable[[Any, int], None]) -> None:
    """Calls ``emit(group, bits of the group)`` in a loop over whole nibbles, then for the rest."""
    whole, rest = divmod(bits, NIBBLE)
    if whole:
        with T.serial(0, whole) as group:
            emit(group, NIBBLE)
    if rest:
        emit(whole, rest)


def _fill_buckets(target: KernelTarget, k: Any, v: Any, batch: Any, first: Any, last: Any) -> Any:
    """Adds the value rows of tokens ``first..last`` to one bucket of each nibble."""
    bits, columns = int(k.shape[2]), list(spans(int(v.shape[2])))
    held = local((-(-bits // NIBBLE) * SUBSETS, int(v.shape[2])))
    with T.serial(0, held.shape[0]) as row:
        for offset, lanes in columns:
            T.buffer_store(held, fill(T.float32(0), lanes), [row, at(offset, lanes)])
    with T.serial(0, last - first) as step:
        t = first + step
        for g, nibble in enumerate(_nibbles(target, k, [batch, t], bits)):
            row = g * SUBSETS + nibble
            for offset, lanes in columns:
                where = at(offset, lanes)
                T.buffer_store(held, held[row, where] + v[batch, t, where], [row, where])
    return held


def _combine_buckets(held: Any, bits: int, plus_minus: bool, store: Callable) -> None:
    """Sums, for each code bit, the buckets that have it: ``store(bit, columns, value)``.

    Each bit halves the buckets: the upper half is its sum, then both halves are added up. That
    takes 26 additions a nibble, where summing eight of sixteen for each bit takes 28 and more.
    """
    columns = list(spans(int(held.shape[1])))

    def combine(group: Any, count: int) -> None:
        for offset, lanes in columns:
            values, sums = local(SUBSETS * lanes), local(NIBBLE * lanes)
            slot = [at(i * lanes, lanes) for i in range(SUBSETS)]
            for i in range(1 << count):
                T.buffer_store(values, held[group * SUBSETS + i, at(offset, lanes)], [slot[i]])
            for place in reversed(range(count)):
                half = 1 << place
                T.buffer_store(sums, values[slot[half]], [slot[place]])
                for i in range(half + 1, 2 * half):
                    T.buffer_store(sums, sums[slot[place]] + values[slot[i]], [slot[place]])
                for i in range(half):
                    T.buffer_store(values, values[slot[i]] + values[slot[half + i]], [slot[i]])
            for place in range(count):
                value = sums[slot[place]]
                value = value + value - values[slot[0]] if plus_minus else value
                store(group * NIBBLE + place, at(offset, lanes), value)

    _each_group(bits, combine)


def _subset_sums(kv: Any, batch: Any, plus_minus: bool) -> Any:
    """Table of the sums (or, for ±1, signed sums) of the rows of each nibble."""
    bits, n = int(kv.shape[1]), int(kv.shape[2])
    table = local((-(-bits // NIBBLE) * SUBSETS, n))

    def tabulate(group: Any, count: int) -> None:
        rows = [group * NIBBLE + place for place in range(count)]
        for offset, lanes in spans(n):
            where = at(offset, lanes)
            start = fill(T.float32(0), lanes)
            if plus_minus:
                for row in rows:
                    start = start - kv[batch, row, where]
            T.buffer_store(table, start, [group * SUBSETS, where])
            for place, row in enumerate(rows):
                step = kv[batch, row, where]
                step = step + step if plus_minus else step
                for subset in range(1 << place):
                    known = group * SUBSETS + subset
                    value = table[known, where] + step
                    T.buffer_store(table, value, [known + (1 << place), where])

    _each_group(bits, tabulate)
    return table


def _look_up(
    target: KernelTarget, q: Any, table: Any, out: Any, batch: Any, first: Any, last: Any
) -> None:
    """Writes, for tokens ``first..last``, the sum of one table row of each nibble."""
    with T.serial(0, last - first) as step:
        t = first + step
        nibbles = _nibbles(target, q, [batch, t], int(q.shape[2]))
        for offset, lanes in spans(int(out.shape[2])):
            where = at(offset, lanes)
            total = local(lanes)
            T.buffer_store(total, table[nibbles[0], where], [at(0, lanes)])
            for g, nibble in enumerate(nibbles[1:], start=1):
                value = total[at(0, lanes)] + table[g * SUBSETS + nibble, where]
                T.buffer_store(total, value, [at(0, lanes)])
            T.buffer_store(out, total[at(0, lanes)], [batch, t, where])


def _chunks(tokens: Any) -> tuple[Any, Any]:
    """Into how many chunks to cut a sequence, and how long each is."""
    wanted = tirx.floordiv(tokens + (CHUNK_TOKENS - 1), CHUNK_TOKENS)
    # Even, so that two threads get the same.
    count = tirx.min(tirx.max(wanted + tirx.floormod(wanted, 2), _i32(2)), _i32(MOST_CHUNKS))
    return count, tirx.floordiv(tokens + count - 1, count)


def _buckets(workload: Workload, target: KernelTarget, split: bool) -> tirx.PrimFunc:
    bits, n = workload.m, workload.n
    plus_minus = workload.alphabet == "pm1"

    def body() -> None:
        b, tokens = T.int32(), T.int32()
        k = argument("k", (b, tokens, bits), "float32")
        v = argument("v", (b, tokens, n), "float32")
        out = argument("out", (b, bits, n), "float32")
        if not split:
            with T.parallel(0, b) as batch:
                held = _fill_buckets(target, k, v, batch, _i32(0), tokens)

                def store(bit: Any, where: Any, value: Any) -> None:
                    T.buffer_store(out, value, [batch, bit, where])

                _combine_buckets(held, bits, plus_minus, store)
            return
        chunks, size = _chunks(tokens)
        parts = T.alloc_buffer((b * MOST_CHUNKS, bits, n), "float32", scope="global")
        with T.parallel(0, b * chunks) as task:
            batch, chunk = tirx.floordiv(task, chunks), tirx.floormod(task, chunks)
            first = tirx.min(chunk * size, tokens)
            last = tirx.min(first + size, tokens)
            held = _fill_buckets(target, k, v, batch, first, last)

            def keep(bit: Any, where: Any, value: Any) -> None:
                T.buffer_store(parts, value, [batch * MOST_CHUNKS + chunk, bit, where])

            _combine_buckets(held, bits, plus_minus, keep)
        with T.serial(0, b) as batch, T.serial(0, bits) as bit:
            for offset, lanes in spans(n):
                where = at(offset, lanes)
                total = local(lanes)
                T.buffer_store(total, parts[batch * MOST_CHUNKS, bit, where], [at(0, lanes)])
                with T.serial(0, chunks - 1) as more:
                    value = total[at(0, lanes)] + parts[batch * MOST_CHUNKS + 1 + more, bit, where]
                    T.buffer_store(total, value, [at(0, lanes)])
                T.buffer_store(out, total[at(0, lanes)], [batch, bit, where])

    return program(body)


def _tables(workload: Workload, target: KernelTarget, split: bool) -> tirx.PrimFunc:
    bits, n = workload.k, workload.n

    def body() -> None:
        b, tokens = T.int32(), T.int32()
        q = argument("q", (b, tokens, bits), "float32")
        kv = argument("kv", (b, bits, n), "float32")
        out = argument("out", (b, tokens, n), "float32")
        chunks, size = _chunks(tokens) if split else (_i32(1), tokens)
        with T.parallel(0, b * chunks) as task:
            batch, chunk = tirx.floordiv(task, chunks), tirx.floormod(task, chunks)
            first = tirx.min(chunk * size, tokens)
            table = _subset_sums(kv, batch, workload.alphabet == "pm1")
            _look_up(target, q, table, out, batch, first, tirx.min(first + size, tokens))

    return program(body)


def buckets(workload: Workload, target: KernelTarget) -> tirx.PrimFunc:
    """KᵀV by buckets: ``main(k, v, out)``, one task for each of batch × heads.

    Shapes: k ``(b, tokens, bits)``, v ``(b, tokens, n)``, out ``(b, bits, n)``.
    Batch × heads and the tokens are taken from the operands at each launch.
    """
    return _buckets(workload, target, split=False)


def buckets_split(workload: Workload, target: KernelTarget) -> tirx.PrimFunc:
    """As ``buckets``, with each sequence cut into chunks: for fewer heads than threads."""
    return _buckets(workload, target, split=True)


def tables(workload: Workload, target: KernelTarget) -> tirx.PrimFunc:
    """Q(KᵀV) by tables: ``main(q, kv, out)``, one task for each of batch × heads.

    Shapes: q ``(b, tokens, bits)``, kv ``(b, bits, n)``, out ``(b, tokens, n)``.
    Batch × heads and the tokens are taken from the operands at each launch.
    """
    return _tables(workload, target, split=False)


def tables_split(workload: Workload, target: KernelTarget) -> tirx.PrimFunc:
    """As ``tables``, with each sequence cut into chunks: for fewer heads than threads."""
    return _tables(workload, target, split=True)

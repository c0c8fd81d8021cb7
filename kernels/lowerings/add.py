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


def each_group(bits: int, emit: Callable[[Any, int], None]) -> None:
    """Calls ``emit(group, bits of the group)`` in a loop over whole nibbles, then for the rest."""
    whole, rest = divmod(bits, NIBBLE)
    if whole:
        with T.serial(0, whole) as group:
            emit(group, NIBBLE)
    if rest:
        emit(whole, rest)


def buckets(workload: Workload, target: KernelTarget) -> tirx.PrimFunc:
    """KᵀV by buckets: ``main(k, v, out)``.

    Shapes: k ``(b, tokens, bits)``, v ``(b, tokens, n)``, out ``(b, bits, n)``.
    Batch × heads and the tokens are taken from the operands at each launch.
    """
    bits, n = workload.m, workload.n
    groups = -(-bits // NIBBLE)
    plus_minus = workload.alphabet == "pm1"
    columns = list(spans(n))

    def body() -> None:
        b, tokens = T.int32(), T.int32()
        k = argument("k", (b, tokens, bits), "float32")
        v = argument("v", (b, tokens, n), "float32")
        out = argument("out", (b, bits, n), "float32")
        with T.parallel(0, b) as batch:
            held = local((groups * SUBSETS, n))
            with T.serial(0, groups * SUBSETS) as row:
                for offset, lanes in columns:
                    T.buffer_store(held, fill(T.float32(0), lanes), [row, at(offset, lanes)])
            with T.serial(0, tokens) as t:
                for g, nibble in enumerate(_nibbles(target, k, [batch, t], bits)):
                    row = g * SUBSETS + nibble
                    for offset, lanes in columns:
                        where = at(offset, lanes)
                        T.buffer_store(held, held[row, where] + v[batch, t, where], [row, where])

            def combine(group: Any, count: int) -> None:
                # A group of fewer bits fills only its lower buckets.
                for place in range(count):
                    for offset, lanes in columns:
                        where = at(offset, lanes)
                        total = local(lanes)
                        T.buffer_store(total, fill(T.float32(0), lanes), [at(0, lanes)])
                        for subset in range(1 << count):
                            row = held[group * SUBSETS + subset, where]
                            if subset >> place & 1:
                                T.buffer_store(total, total[at(0, lanes)] + row, [at(0, lanes)])
                            elif plus_minus:
                                T.buffer_store(total, total[at(0, lanes)] - row, [at(0, lanes)])
                        bit = group * NIBBLE + place
                        T.buffer_store(out, total[at(0, lanes)], [batch, bit, where])

            each_group(bits, combine)

    return program(body)


def tables(workload: Workload, target: KernelTarget) -> tirx.PrimFunc:
    """Q(KᵀV) by tables: ``main(q, kv, out)``.

    Shapes: q ``(b, tokens, bits)``, kv ``(b, bits, n)``, out ``(b, tokens, n)``.
    Batch × heads and the tokens are taken from the operands at each launch.
    """
    bits, n = workload.k, workload.n
    groups = -(-bits // NIBBLE)
    plus_minus = workload.alphabet == "pm1"
    columns = list(spans(n))

    def body() -> None:
        b, tokens = T.int32(), T.int32()
        q = argument("q", (b, tokens, bits), "float32")
        kv = argument("kv", (b, bits, n), "float32")
        out = argument("out", (b, tokens, n), "float32")
        with T.parallel(0, b) as batch:
            table = local((groups * SUBSETS, n))

            def tabulate(group: Any, count: int) -> None:
                rows = [group * NIBBLE + place for place in range(count)]
                for offset, lanes in columns:
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

            each_group(bits, tabulate)
            with T.serial(0, tokens) as t:
                nibbles = _nibbles(target, q, [batch, t], bits)
                for offset, lanes in columns:
                    where = at(offset, lanes)
                    total = local(lanes)
                    T.buffer_store(total, table[nibbles[0], where], [at(0, lanes)])
                    for g, nibble in enumerate(nibbles[1:], start=1):
                        value = total[at(0, lanes)] + table[g * SUBSETS + nibble, where]
                        T.buffer_store(total, value, [at(0, lanes)])
                    T.buffer_store(out, total[at(0, lanes)], [batch, t, where])

    return program(body)

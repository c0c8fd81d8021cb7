"""Products with binary codes by additions: the method of the Four Russians, on rows.

Codes are the signs of queries or keys, read in groups of a few bits. KᵀV drops each value row into
one of the buckets of each group and combines the buckets once; Q(KᵀV) tabulates the subset sums of
each group's rows once and then adds one table row a group and token. A group of g bits has 2^g
buckets or sums: more bits, fewer additions a token, and more to combine or to tabulate.

Source:
    V. L. Arlazarov, E. A. Dinic, M. A. Kronrod, I. A. Faradzev (1970), as used for matrix
    products over {0, 1}; ±1 by ``2 * sum_{code = 1} - sum``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.lowerings.code_groups import Group, each_group, groups_of, row_count, token_codes
from kernels.lowerings.emit import (
    LANES,
    SIGN_BITS,
    argument,
    at,
    bf16_bits,
    fill,
    local,
    program,
    spans,
    vector_type,
    widened,
)
from kernels.targets import KernelTarget
from kernels.workload import Workload

GROUP_BITS = (4, 6, 8)
# From here on, groups of six bits repay their 64 buckets or sums each. Those of eight bits leave
# the first level of the caches, and were slower for 16-bit codes at every length tried.
LONG_TOKENS = 512
# A chunk's own buckets and tables cost some 20 to 300 tokens' worth of additions.
CHUNK_TOKENS = 1024
MOST_CHUNKS = 16


def schedule_space(target: KernelTarget) -> dict[str, tuple[int, ...]]:
    """What may be chosen: ``group_bits``, the most bits of a group."""
    return {"group_bits": GROUP_BITS}


def default_schedule(workload: Workload, target: KernelTarget) -> dict[str, int]:
    """The schedule of a shape that nobody has tuned."""
    return {"group_bits": 6 if workload.tokens >= LONG_TOKENS else 4}


def _i32(value: int) -> Any:
    return tirx.const(value, "int32")


def _load(buffer: Any, index: list[Any], lanes: int) -> Any:
    """A vector as fp32, of a buffer of fp32 or bf16."""
    value = buffer[tuple(index)]
    if buffer.dtype == "float32":
        return value
    return widened(tirx.reinterpret(vector_type("int16", lanes), value), lanes)


def _store(buffer: Any, value: Any, index: list[Any], lanes: int) -> None:
    if buffer.dtype != "float32":
        value = tirx.reinterpret(vector_type("bfloat16", lanes), bf16_bits(value, lanes))
    T.buffer_store(buffer, value, index)


class Rows(NamedTuple):
    """One vector for each token of a sequence.

    Attributes:
        buffer: Where they are.
        place: ``place(token)``: all indices but the last.
    """

    buffer: Any
    place: Callable[[Any], list[Any]]

    @property
    def width(self) -> int:
        """Elements of a vector."""
        return int(self.buffer.shape[-1])


def _rows(buffer: Any, batch: Any) -> Rows:
    """One sequence of a ``(b, tokens, width)`` buffer."""
    return Rows(buffer, lambda token: [batch, token])


def _fill_buckets(k: Rows, v: Rows, groups: list[Group], first: Any, last: Any) -> Any:
    """Adds the value rows of tokens ``first..last`` to one bucket of each group."""
    columns = list(spans(v.width))
    held = local((row_count(groups), v.width))
    with T.serial(0, held.shape[0]) as row:
        for offset, lanes in columns:
            T.buffer_store(held, fill(T.float32(0), lanes), [row, at(offset, lanes)])
    with T.serial(0, last - first) as step:
        token = first + step
        for row in token_codes(k.buffer, k.place(token), groups):
            for offset, lanes in columns:
                where = at(offset, lanes)
                value = held[row, where] + _load(v.buffer, [*v.place(token), where], lanes)
                T.buffer_store(held, value, [row, where])
    return held


def _combine_buckets(held: Any, groups: list[Group], plus_minus: bool, store: Callable) -> None:
    """Sums, for each code bit, the buckets that have it: ``store(bit, where, value, lanes)``.

    Each bit halves the buckets: the upper half is its sum, then both halves are added up. That
    takes two additions a bucket, where summing half of them for each bit takes ``count / 2``.
    """
    sums = local((max(group.size for group in groups), LANES))

    def combine(group: Group) -> None:
        for offset, lanes in spans(int(held.shape[1])):
            where, own = at(offset, lanes), at(0, lanes)
            for place in reversed(range(group.size)):
                half = 1 << place
                T.buffer_store(sums, fill(T.float32(0), lanes), [place, own])
                with T.serial(0, half) as i:
                    lower, upper = group.row + i, held[group.row + half + i, where]
                    T.buffer_store(sums, sums[place, own] + upper, [place, own])
                    T.buffer_store(held, held[lower, where] + upper, [lower, where])
            for place, bit in enumerate(group.bits):
                value = sums[place, own]
                value = value + value - held[group.row, where] if plus_minus else value
                store(bit, where, value, lanes)

    each_group(groups, combine)


def _subset_sums(kv: Any, index: list[Any], groups: list[Group], plus_minus: bool) -> Any:
    """Table of the sums (or, for ±1, signed sums) of the rows of each group."""
    n = int(kv.shape[-1])
    table, step = local((row_count(groups), n)), local(LANES)

    def tabulate(group: Group) -> None:
        for offset, lanes in spans(n):
            where, own = at(offset, lanes), at(0, lanes)
            rows = [_load(kv, [*index, bit, where], lanes) for bit in group.bits]
            start = fill(T.float32(0), lanes)
            for row in rows if plus_minus else ():
                start = start - row
            T.buffer_store(table, start, [group.row, where])
            for place, row in enumerate(rows):
                T.buffer_store(step, row + row if plus_minus else row, [own])
                with T.serial(0, 1 << place) as subset:
                    known = group.row + subset
                    value = table[known, where] + step[own]
                    T.buffer_store(table, value, [known + (1 << place), where])

    each_group(groups, tabulate)
    return table


def _look_up(
    q: Rows, table: Any, groups: list[Group], finish: Callable, first: Any, last: Any
) -> None:
    """Adds, for tokens ``first..last``, one table row of each group.

    The sums of a token go to ``finish(token, sums)``, as ``(where, lanes, sum)`` each.
    """
    with T.serial(0, last - first) as step:
        token = first + step
        rows = token_codes(q.buffer, q.place(token), groups)
        sums = []
        for offset, lanes in spans(int(table.shape[1])):
            where = at(offset, lanes)
            total = table[rows[0], where]
            for row in rows[1:]:
                total = total + table[row, where]
            sums.append((where, lanes, total))
        finish(token, sums)


def _into(out: Any, batch: Any) -> Callable:
    """A ``finish`` of ``_look_up`` that writes the sums as they are."""

    def finish(token: Any, sums: list[tuple[Any, int, Any]]) -> None:
        for where, lanes, total in sums:
            _store(out, total, [batch, token, where], lanes)

    return finish


def _chunks(tokens: Any) -> tuple[Any, Any]:
    """Into how many chunks to cut a sequence, and how long each is."""
    wanted = tirx.floordiv(tokens + (CHUNK_TOKENS - 1), CHUNK_TOKENS)
    # Even, so that two threads get the same.
    count = tirx.min(tirx.max(wanted + tirx.floormod(wanted, 2), _i32(2)), _i32(MOST_CHUNKS))
    return count, tirx.floordiv(tokens + count - 1, count)


def _key_value(
    keys: Callable[[Any], tuple[Rows, Rows]],
    groups: list[Group],
    plus_minus: bool,
    out: Any,
    b: Any,
    tokens: Any,
) -> None:
    """KᵀV with each sequence cut into chunks, whose sums are added up at the end.

    ``keys(batch)`` are the keys and the values of one sequence.
    """
    bits, n = int(out.shape[1]), int(out.shape[2])
    chunks, size = _chunks(tokens)
    parts = T.alloc_buffer((b * MOST_CHUNKS, bits, n), "float32", scope="global")
    with T.parallel(0, b * chunks) as task:
        batch, chunk = tirx.floordiv(task, chunks), tirx.floormod(task, chunks)
        first = tirx.min(chunk * size, tokens)
        held = _fill_buckets(*keys(batch), groups, first, tirx.min(first + size, tokens))

        def keep(bit: Any, where: Any, value: Any, lanes: int) -> None:
            T.buffer_store(parts, value, [batch * MOST_CHUNKS + chunk, bit, where])

        _combine_buckets(held, groups, plus_minus, keep)
    with T.serial(0, b) as batch, T.serial(0, bits) as bit:
        for offset, lanes in spans(n):
            where = at(offset, lanes)
            total = local(lanes)
            T.buffer_store(total, parts[batch * MOST_CHUNKS, bit, where], [at(0, lanes)])
            with T.serial(0, chunks - 1) as more:
                value = total[at(0, lanes)] + parts[batch * MOST_CHUNKS + 1 + more, bit, where]
                T.buffer_store(total, value, [at(0, lanes)])
            _store(out, total[at(0, lanes)], [batch, bit, where], lanes)


def _query(
    queries: Callable[[Any], tuple[Rows, Callable]],
    kv: Any,
    groups: list[Group],
    plus_minus: bool,
    b: Any,
    tokens: Any,
) -> None:
    """Q(KᵀV) with each sequence cut into chunks, each with a table of its own.

    ``queries(batch)`` are the queries of one sequence, and what is done with their sums.
    """
    chunks, size = _chunks(tokens)
    with T.parallel(0, b * chunks) as task:
        batch, chunk = tirx.floordiv(task, chunks), tirx.floormod(task, chunks)
        first = tirx.min(chunk * size, tokens)
        table = _subset_sums(kv, [batch], groups, plus_minus)
        q, finish = queries(batch)
        _look_up(q, table, groups, finish, first, tirx.min(first + size, tokens))


def add_attention(
    sequence: Callable[[Any], tuple[Rows, Rows, Rows]],
    finish: Callable[[Any], Callable],
    groups: list[Group],
    plus_minus: bool,
    b: Any,
    tokens: Any,
    split: bool,
) -> None:
    """Emits Q(KᵀV) of ``b`` sequences in parallel.

    Args:
        sequence: ``sequence(batch)``: queries, keys and values of one.
        finish: ``finish(batch)(token, sums)``: what is done with the sums of a token, which are
            ``(where, lanes, sum)`` each.
        groups: Of the code bits.
        plus_minus: Whether codes are ±1; else {0, 1}.
        b, tokens: Sequences, and the length of each.
        split: Cut each into chunks.
    """
    q, _, v = sequence(_i32(0))
    bits, n = q.width, v.width
    if split:
        kv = T.alloc_buffer((b, bits, n), "float32", scope="global")
        _key_value(lambda batch: sequence(batch)[1:], groups, plus_minus, kv, b, tokens)
        _query(lambda batch: (sequence(batch)[0], finish(batch)), kv, groups, plus_minus, b, tokens)
        return
    with T.parallel(0, b) as batch:
        q, k, v = sequence(batch)
        held = _fill_buckets(k, v, groups, _i32(0), tokens)
        own = local((bits, n))

        def store(bit: Any, where: Any, value: Any, lanes: int) -> None:
            T.buffer_store(own, value, [bit, where])

        _combine_buckets(held, groups, plus_minus, store)
        table = _subset_sums(own, [], groups, plus_minus)
        _look_up(q, table, groups, finish(batch), _i32(0), tokens)


def buckets(
    workload: Workload, target: KernelTarget, schedule: Mapping[str, int], split: bool = False
) -> tirx.PrimFunc:
    """KᵀV by buckets: ``main(k, v, out)``.

    Shapes: k ``(b, tokens, bits)``, v ``(b, tokens, n)``, out ``(b, bits, n)``.

    Args:
        workload: Batch × heads and the tokens are taken from the operands at each launch.
        target: The CPU.
        schedule: Of ``schedule_space``.
        split: Cut each sequence into chunks, for fewer heads than threads; else each of batch ×
            heads is one task.
    """
    bits, n, element = workload.m, workload.n, workload.out_dtype
    groups, plus_minus = groups_of(bits, schedule["group_bits"]), workload.alphabet == "pm1"

    def body() -> None:
        b, tokens = T.int32(), T.int32()
        k = argument("k", (b, tokens, bits), element)
        v = argument("v", (b, tokens, n), element)
        out = argument("out", (b, bits, n), element)
        if split:
            _key_value(
                lambda batch: (_rows(k, batch), _rows(v, batch)), groups, plus_minus, out, b, tokens
            )
            return
        with T.parallel(0, b) as batch:
            held = _fill_buckets(_rows(k, batch), _rows(v, batch), groups, _i32(0), tokens)

            def store(bit: Any, where: Any, value: Any, lanes: int) -> None:
                _store(out, value, [batch, bit, where], lanes)

            _combine_buckets(held, groups, plus_minus, store)

    return program(body, SIGN_BITS)


def tables(
    workload: Workload, target: KernelTarget, schedule: Mapping[str, int], split: bool = False
) -> tirx.PrimFunc:
    """Q(KᵀV) by tables: ``main(q, kv, out)``; arguments as for ``buckets``.

    Shapes: q ``(b, tokens, bits)``, kv ``(b, bits, n)``, out ``(b, tokens, n)``.
    """
    bits, n, element = workload.k, workload.n, workload.out_dtype
    groups, plus_minus = groups_of(bits, schedule["group_bits"]), workload.alphabet == "pm1"

    def body() -> None:
        b, tokens = T.int32(), T.int32()
        q = argument("q", (b, tokens, bits), element)
        kv = argument("kv", (b, bits, n), element)
        out = argument("out", (b, tokens, n), element)
        if split:
            _query(
                lambda batch: (_rows(q, batch), _into(out, batch)),
                kv,
                groups,
                plus_minus,
                b,
                tokens,
            )
            return
        with T.parallel(0, b) as batch:
            table = _subset_sums(kv, [batch], groups, plus_minus)
            _look_up(_rows(q, batch), table, groups, _into(out, batch), _i32(0), tokens)

    return program(body, SIGN_BITS)


def both(
    workload: Workload, target: KernelTarget, schedule: Mapping[str, int], split: bool = False
) -> tirx.PrimFunc:
    """Q(KᵀV) from Q, K and V: ``main(q, k, v, out)``; arguments as for ``buckets``.

    KᵀV stays in the caches of the core that made it. Shapes as for ``buckets`` and ``tables``.
    """
    bits, n, element = workload.k, workload.n, workload.out_dtype
    groups, plus_minus = groups_of(bits, schedule["group_bits"]), workload.alphabet == "pm1"

    def body() -> None:
        b, tokens = T.int32(), T.int32()
        q = argument("q", (b, tokens, bits), element)
        k = argument("k", (b, tokens, bits), element)
        v = argument("v", (b, tokens, n), element)
        out = argument("out", (b, tokens, n), element)

        def sequence(batch: Any) -> tuple[Rows, Rows, Rows]:
            return _rows(q, batch), _rows(k, batch), _rows(v, batch)

        add_attention(
            sequence, lambda batch: _into(out, batch), groups, plus_minus, b, tokens, split
        )

    return program(body, SIGN_BITS)

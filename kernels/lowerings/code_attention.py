"""Attention over all pairs of tokens on binary codes: bits that are equal are counted.

A query and a key are words of bits, and their product is the number of bits in which they agree or
not: two instructions for sixteen keys, whatever the width of a head up to 32. The scores of some
queries stay in the caches until their softmax has weighed the values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.lowerings.emit import (
    LANES,
    SIGN_BITS,
    SOME_LANES,
    argument,
    at,
    fill,
    first_of,
    lanes_total,
    local,
    only_first,
    program,
    row_blocks,
    row_totals,
    sign_bits,
    spans,
    workspace,
)
from kernels.lowerings.exponential import exponential
from kernels.targets import KernelTarget

_WORD_BITS = 32
# Queries of one task: enough that packing the keys for each takes a few percent.
_QUERIES = 64
# Of their sums beside each other, at most.
_MOST_ROWS = 8
# Registers that are left to weights and values.
_OTHERS = 6
# Of a score that no key has: e to it is nothing.
_NOTHING = -1e30


def code_attention(
    head_dim: int, value_dim: int, alphabet: str, scale: float, biased: bool, target: KernelTarget
) -> tirx.PrimFunc:
    """``softmax(scale · codes(q) codes(k)ᵀ · |q| |k|ᵀ + bias) v``: ``main(q, k, v, [bias,] out)``.

    Shapes: q ``(images, heads, queries, head_dim)``, k ``(images, heads, keys, head_dim)``, v
    ``(images, heads, keys, value_dim)``, bias ``(images, heads, queries, keys)``, out ``(images,
    queries, heads, value_dim)``; all fp32, and all but out with any distance between rows. |x| is
    the mean magnitude of the features of x.

    Args:
        head_dim: Features of a query and of a key, a bit each.
        value_dim: Features of a value.
        alphabet: ``pm1`` (a bit is set above 0), or ``01`` (above the mean of the features).
        scale: Of the scores.
        biased: Whether there is a bias, or a mask of numbers.
        target: The CPU.

    Source:
        XNOR-Net, arXiv 1603.05279.
    """

    def body() -> None:
        images, heads, queries, keys = (T.int32() for _ in range(4))
        q = argument("q", (images, heads, queries, head_dim), "float32", in_rows=True)
        k = argument("k", (images, heads, keys, head_dim), "float32", in_rows=True)
        v = argument("v", (images, heads, keys, value_dim), "float32", in_rows=True)
        bias = None
        if biased:
            bias = argument("bias", (images, heads, queries, keys), "float32", in_rows=True)
        out = argument("out", (images, queries, heads, value_dim), "float32")
        rows = _rows_at_once(value_dim, target)
        with _each_block(images, heads, queries) as (head, first, last):
            coded = _packed(k, head, keys, alphabet)
            scores = workspace((rows, coded.padded), "float32")
            inverse = local(rows)
            with T.serial(0, tirx.floordiv(last - first + (rows - 1), rows)) as tile:
                start = first + tile * rows
                count = tirx.min(last - start, tirx.const(rows, "int32"))
                with T.serial(0, count) as row:
                    query = [*head, start + row]
                    largest = _score(q, query, coded, scale, bias, scores, row)
                    _weigh(scores, row, coded, largest, inverse)

                def finish(row: Any, where: Any, lanes: int, total: Any) -> None:
                    image, own = head
                    value = total * fill(inverse[row], lanes)
                    T.buffer_store(out, value, [image, start + row, own, where])

                for condition, offset, some in _whole_or_parts(count, rows):
                    with T.If(condition), T.Then():
                        _values(v, head, keys, scores, offset, some, finish)

    return program(body, SIGN_BITS + SOME_LANES)


def code_scores(head_dim: int, alphabet: str, target: KernelTarget) -> tirx.PrimFunc:
    """``codes(q) codes(k)ᵀ · |q| |k|ᵀ``: ``main(q, k, out)``, as for ``code_attention``.

    Shapes: q ``(images, heads, queries, head_dim)``, k ``(images, heads, keys, head_dim)``, out
    ``(images, heads, queries, keys)``.

    Args:
        head_dim, alphabet, target: As for ``code_attention``.
    """

    def body() -> None:
        images, heads, queries, keys = (T.int32() for _ in range(4))
        q = argument("q", (images, heads, queries, head_dim), "float32", in_rows=True)
        k = argument("k", (images, heads, keys, head_dim), "float32", in_rows=True)
        out = argument("out", (images, heads, queries, keys), "float32")
        with _each_block(images, heads, queries) as (head, first, last):
            coded = _packed(k, head, keys, alphabet)
            scores = workspace((1, coded.padded), "float32")
            none = tirx.const(0, "int32")
            with T.serial(0, last - first) as row:
                query = [*head, first + row]
                _score(q, query, coded, 1.0, None, scores, none)
                whole, left = _vectors(keys)
                with T.serial(0, whole) as vector:
                    where = at(vector * LANES, LANES)
                    T.buffer_store(out, scores[none, where], [*query, where])
                with T.serial(0, left) as rest:
                    key = whole * LANES + rest
                    T.buffer_store(out, scores[none, key], [*query, key])

    return program(body, SIGN_BITS + SOME_LANES)


@dataclass(frozen=True)
class _Coded:
    """The keys of a head.

    Attributes:
        words: int32 ``(words, padded)``, those of one place beside each other.
        magnitudes: fp32 ``(padded,)``.
        keys: How many there are.
        padded: How many fill whole vectors.
        bits: Of a code.
        plus_minus: Whether codes are ±1.
    """

    words: Any
    magnitudes: Any
    keys: Any
    padded: Any
    bits: int
    plus_minus: bool

    def product(self, code: list[Any], where: Any) -> Any:
        """Emits the product of a query's code with those of a vector of keys, in fp32."""
        compare = tirx.bitwise_xor if self.plus_minus else tirx.bitwise_and
        counted = fill(tirx.const(0, "int32"), LANES)
        for place, word in enumerate(code):
            counted = counted + tirx.popcount(compare(self.words[place, where], fill(word, LANES)))
        number = tirx.Cast(f"float32x{LANES}", counted)
        if not self.plus_minus:
            return number
        # ±1 by bits: as many as there are, less two for each that differs.
        return fill(T.float32(self.bits), LANES) - number * fill(T.float32(2), LANES)


def _rows_at_once(value_dim: int, target: KernelTarget) -> int:
    """Queries whose sums over the keys the registers hold, a power of two."""
    registers_a_row = -(-value_dim * 32 // target.vector_bits)
    fit = (target.vector_registers - _OTHERS) // registers_a_row
    return 1 << min(max(fit, 1), _MOST_ROWS).bit_length() - 1


@contextmanager
def _each_block(images: Any, heads: Any, queries: Any) -> Iterator[tuple[list[Any], Any, Any]]:
    """In parallel: the index of a head, and where some of its queries begin and end."""
    blocks = tirx.floordiv(queries + (_QUERIES - 1), _QUERIES)
    with T.parallel(0, images * heads * blocks) as task:
        sequence, block = tirx.floordiv(task, blocks), tirx.floormod(task, blocks)
        first = block * _QUERIES
        last = tirx.min(first + _QUERIES, queries)
        yield [tirx.floordiv(sequence, heads), tirx.floormod(sequence, heads)], first, last


def _vectors(keys: Any) -> tuple[Any, Any]:
    """Whole vectors of keys, and how many keys are left."""
    return tirx.floordiv(keys, LANES), tirx.floormod(keys, LANES)


def _whole_or_parts(count: Any, rows: int) -> Iterator[tuple[Any, Any, int]]:
    yield count == rows, tirx.const(0, "int32"), rows
    for condition, offset, some in row_blocks(count, rows):
        yield tirx.And(count < rows, condition), offset, some


def _features(x: Any, index: list[Any], alphabet: str) -> tuple[list[Any], Any]:
    """The code of a query or a key as words, each computed once, and its mean magnitude."""
    width = int(x.shape[-1])

    def part(offset: Any, lanes: int) -> Any:
        return x[(*index, at(offset, lanes))]

    def magnitude(offset: Any, lanes: int) -> Any:
        return tirx.max(part(offset, lanes), fill(T.float32(0), lanes) - part(offset, lanes))

    if alphabet == "pm1":
        (total,), mean = row_totals(width, [magnitude]), T.float32(0)
    else:
        total, summed = row_totals(width, [magnitude, part])
        mean = summed * T.float32(1 / width)
    words = []
    for start in range(0, width, _WORD_BITS):
        word, found = local(1, "int32"), tirx.const(0, "int32")
        for offset, lanes in spans(min(_WORD_BITS, width - start)):
            values = part(start + offset, lanes)
            if alphabet == "01":
                values = values - fill(mean, lanes)
            signs = sign_bits(values, "float32", lanes)
            found = tirx.bitwise_or(found, tirx.shift_left(signs, tirx.const(offset, "int32")))
        T.buffer_store(word, found, [0])
        words.append(word[0])
    return words, total * T.float32(1 / width)


def _packed(k: Any, head: list[Any], keys: Any, alphabet: str) -> _Coded:
    """Emits the codes and the magnitudes of a head's keys."""
    width = int(k.shape[-1])
    padded = tirx.floordiv(keys + (LANES - 1), LANES) * LANES
    words = workspace((-(-width // _WORD_BITS), padded), "int32")
    magnitudes = workspace((padded,), "float32")
    with T.serial(0, keys) as key:
        code, magnitude = _features(k, [*head, key], alphabet)
        for place, word in enumerate(code):
            T.buffer_store(words, word, [place, key])
        T.buffer_store(magnitudes, magnitude, [key])
    return _Coded(words, magnitudes, keys, padded, width, alphabet == "pm1")


def _score(
    q: Any, query: list[Any], coded: _Coded, scale: float, bias: Any, scores: Any, row: Any
) -> Any:
    """Emits the scores of one query with all keys; returns the largest of each lane.

    Behind the last key, to the end of its vector, they are as good as minus infinity.
    """
    code, magnitude = _features(q, query, "pm1" if coded.plus_minus else "01")
    factor, largest = local(1), local(LANES)
    T.buffer_store(factor, magnitude * T.float32(scale), [0])
    T.buffer_store(largest, fill(T.float32(_NOTHING), LANES), [at(0, LANES)])

    def score(first: Any) -> Any:
        where = at(first, LANES)
        return coded.product(code, where) * coded.magnitudes[where] * fill(factor[0], LANES)

    def store(first: Any, value: Any) -> None:
        own, where = local(LANES), at(0, LANES)
        T.buffer_store(own, value, [where])
        T.buffer_store(scores, own[where], [row, at(first, LANES)])
        T.buffer_store(largest, tirx.max(largest[where], own[where]), [where])

    whole, left = _vectors(coded.keys)
    with T.serial(0, whole) as vector:
        first = vector * LANES
        value = score(first)
        store(first, value if bias is None else value + bias[(*query, at(first, LANES))])
    with T.If(left > 0), T.Then():
        first = whole * LANES
        value = score(first)
        value = value if bias is None else value + first_of(bias, [*query, first], left)
        store(first, only_first(value, left, _NOTHING))
    return largest


def _weigh(scores: Any, row: Any, coded: _Coded, largest: Any, inverse: Any) -> None:
    """Emits e to the scores less the largest, in their place, and one over the sum of that."""
    every, total, most = at(0, LANES), local(LANES), local(1)
    T.buffer_store(total, fill(T.float32(0), LANES), [every])
    T.buffer_store(most, lanes_total(largest, LANES, tirx.max), [0])
    with T.serial(0, tirx.floordiv(coded.padded, LANES)) as vector:
        where = at(vector * LANES, LANES)
        weight = local(LANES)
        below = scores[row, where] - fill(most[0], LANES)
        T.buffer_store(weight, exponential(below, LANES), [every])
        T.buffer_store(scores, weight[every], [row, where])
        T.buffer_store(total, total[every] + weight[every], [every])
    T.buffer_store(inverse, T.float32(1) / lanes_total(total, LANES), [row])


def _values(
    v: Any, head: list[Any], keys: Any, weights: Any, first: Any, rows: int, finish: Callable
) -> None:
    """Emits the weighed sums of a head's values for some rows of weights.

    Args:
        v, head, keys: The values, and whose.
        weights: ``(rows, keys)``.
        first, rows: Which of them.
        finish: ``finish(row, where, lanes, sum)`` is called with each.
    """
    columns = list(spans(int(v.shape[-1])))
    sums = [[(local(lanes), offset, lanes) for offset, lanes in columns] for _ in range(rows)]
    for own in sums:
        for total, _, lanes in own:
            T.buffer_store(total, fill(T.float32(0), lanes), [at(0, lanes)])
    with T.serial(0, keys) as key:
        for place, (offset, lanes) in enumerate(columns):
            every, value = at(0, lanes), local(lanes)
            T.buffer_store(value, v[(*head, key, at(offset, lanes))], [every])
            for row, own in enumerate(sums):
                weighed = fill(weights[first + row, key], lanes) * value[every]
                T.buffer_store(own[place][0], own[place][0][every] + weighed, [every])
    for row, own in enumerate(sums):
        for total, offset, lanes in own:
            finish(first + row, at(offset, lanes), lanes, total[at(0, lanes)])

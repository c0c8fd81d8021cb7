"""Binary codes cut into groups of bits, whose buckets or subset sums lie one after the other."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.lowerings.emit import at, local, sign_bits, spans, vector_type

# Codes are held a word at a time; a group does not straddle two.
WORD_BITS = 32


def _i32(value: int) -> Any:
    return tirx.const(value, "int32")


class Group(NamedTuple):
    """Some neighbouring bits of a code, and as many bits after them, and so on.

    Attributes:
        bit: The first.
        size: How many.
        row: First of its ``2 ** size`` rows among the buckets or sums of all groups.
    """

    bit: Any
    size: int
    row: Any

    def after(self, groups: Any) -> Group:
        """The group that comes that many groups of this size later."""
        return Group(self.bit + groups * self.size, self.size, self.row + groups * self.rows)

    @property
    def rows(self) -> int:
        """Its buckets or sums."""
        return 1 << self.size

    @property
    def bits(self) -> list[Any]:
        """Its bits, the lowest first."""
        return [self.bit + place for place in range(self.size)]


def groups_of(bits: int, largest: int) -> list[Group]:
    """Cuts a code into groups of at most ``largest`` bits, as equal as can be."""
    groups, row = [], 0
    for word in range(0, bits, WORD_BITS):
        size = min(WORD_BITS, bits - word)
        parts = -(-size // largest)
        for part in range(parts):
            first, last = size * part // parts, size * (part + 1) // parts
            groups.append(Group(word + first, last - first, row))
            row += groups[-1].rows
    return groups


def row_count(groups: list[Group]) -> int:
    """Buckets or sums of all groups."""
    return int(groups[-1].row) + groups[-1].rows


def each_group(groups: list[Group], emit: Callable[[Group], None]) -> None:
    """Calls ``emit`` in one loop for each run of groups of the same size."""
    for _, run in itertools.groupby(groups, key=lambda group: group.size):
        same = list(run)
        with T.serial(0, len(same)) as index:
            emit(same[0].after(index))


def token_codes(source: Any, index: list[Any], groups: list[Group]) -> list[Any]:
    """The code of one token cut into its groups: the row of each among their buckets or sums."""
    bits, words = int(source.shape[-1]), []
    for start in range(0, bits, WORD_BITS):
        word = local(1, "int32")
        found = _i32(0)
        for offset, lanes in spans(min(WORD_BITS, bits - start)):
            values, dtype = source[(*index, at(start + offset, lanes))], source.dtype
            if dtype != "float32":
                dtype = "int16"
                values = tirx.reinterpret(vector_type(dtype, lanes), values)
            signs = sign_bits(values, dtype, lanes)
            found = tirx.bitwise_or(found, tirx.shift_left(signs, _i32(offset)))
        T.buffer_store(word, found, [0])
        words.append(word)
    rows = []
    for group in groups:
        word, place = words[group.bit // WORD_BITS], group.bit % WORD_BITS
        code = tirx.bitwise_and(tirx.shift_right(word[0], _i32(place)), _i32((1 << group.size) - 1))
        rows.append(group.row + code)
    return rows

"""Small words in which the CPU lowerings are written, over TVM's IR builder."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tvm.script.ir_builder.tirx as T
from tvm import DataType, tirx
from tvm.ir import StringImm
from tvm.script.ir_builder import IRBuilder

# Widest vector that we write. LLVM splits it where registers are narrower.
LANES = 16
# Added to a small number in fp32, it leaves the nearest whole number in the lowest bits.
ROUNDS = 1.5 * 2.0**23
# As many as hide the latency of an addition.
_RUNNING = 4


def program(body: Callable[[], None], llvm: str | None = None) -> tirx.PrimFunc:
    """Builds the function ``main`` whose arguments and statements ``body`` emits.

    Args:
        body: Emits them.
        llvm: Functions in LLVM's language that it calls by ``T.call_extern``.
    """
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("main")
            T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
            body()
        function = builder.get()
    if llvm is None:
        return function
    functions = tirx.AttrStmt(
        tirx.const(0, "int32"), "pragma_import_llvm", StringImm(llvm), function.body
    )
    return function.with_body(functions)


def argument(name: str, shape: tuple[Any, ...], dtype: str, in_rows: bool = False) -> Any:
    """Declares a buffer argument; a size may be a symbolic variable.

    It may begin at any element: TVM would else take every argument for aligned to 64 bytes, and a
    slice of a tensor would end in a segmentation fault.

    Args:
        name: Of the argument.
        shape, dtype: Of the tensor.
        in_rows: Whether its last dimension alone lies together, and others wherever they are: a
            permuted or an expanded tensor then needs no copy.
    """
    strides = [*(T.int32() for _ in shape[1:]), 1] if in_rows else None
    return T.match_buffer(
        T.arg(name, T.handle()), shape, dtype, strides=strides, align=DataType(dtype).itemsize
    )


def rows_of(tokens: Any) -> Any:
    """An argument ``(images, tokens, n)`` as rows of n, once all arguments are declared.

    A view of each tensor would cost the caller more than a small kernel's router.
    """
    images, each, n = tokens.shape
    return T.decl_buffer((images * each, n), tokens.dtype, data=tokens.data)


def inside(place: Any, size: Any) -> Any:
    """Whether an index lies in an extent."""
    return tirx.And(place >= 0, place < size)


def near(place: Any, size: Any) -> Any:
    """The index of an extent that is next to one that may lie outside."""
    return tirx.max(tirx.min(place, size - 1), tirx.const(0, "int32"))


def local(shape: int | tuple[int, ...], dtype: str = "float32") -> Any:
    """A thread's own array: in registers where it is only met in whole vectors, else on the stack.

    Without the annotation TVM takes it from a heap of workspaces, at each pass of a loop. It is
    declared in vectors because TVM aligns arrays of scalars to 16 bytes at most, and a vector
    across two cache lines is loaded and stored at half speed.
    """
    shape = (shape,) if isinstance(shape, int) else shape
    vectors = T.alloc_buffer(
        (-(-math.prod(shape) // LANES),),
        vector_type(dtype, LANES),
        scope="local",
        annotations={"disable_lower_builtin": True},
    )
    return T.decl_buffer(shape, dtype, data=vectors.data, scope="local")


# In LLVM's language: an instruction that is none, and that it knows nothing of.
ROLLED = """
define linkonce_odr i32 @shiftadd_rolled(i32 %count) alwaysinline {
  %same = call i32 asm "", "=r,0"(i32 %count)
  ret i32 %same
}
"""


def rolled(count: int) -> Any:
    """How often a loop is passed, kept from LLVM, which would write few passes out.

    In a straight line it moves loads up until registers no longer suffice, and the time then goes
    by the addresses that a process happens to have. The program must be given ``ROLLED``.
    """
    return T.call_extern("int32", "shiftadd_rolled", tirx.const(count, "int32"))


def held(value: Any) -> Any:
    """An int32 that is computed once."""
    once = local(1, "int32")
    T.buffer_store(once, value, [0])
    return once[0]


def workspace(shape: tuple[int, ...], dtype: str) -> Any:
    """Memory for a while, larger than a stack should hold.

    It is declared over another array, for TVM would else cut off what it sees nobody touch, and
    move the rows together: a tile is read by its address and the distance of its rows.
    """
    whole = T.alloc_buffer((math.prod(shape),), dtype, scope="global")
    return T.decl_buffer(shape, dtype, data=whole.data)


def at(offset: Any, lanes: int) -> Any:
    """Index of ``lanes`` neighbouring elements."""
    return offset if lanes == 1 else tirx.Ramp(offset, 1, lanes)


def prefetch(buffer: Any, index: list[Any], to_write: bool = False, level: int = 1) -> None:
    """Asks for an element's cache line; it may lie past the buffer's end.

    Args:
        buffer: That has it.
        index: Of the element.
        to_write: Rather than to read; always into the first level.
        level: Of the caches, 1 to 3.
    """
    address = T.address_of(buffer[tuple(index)])
    T.evaluate(tirx.call_intrin("void", "tirx.prefetch", address, int(to_write), 4 - level, 1))


def places(count: int, first: int = 0) -> list[Any]:
    """Of neighbouring elements, as ``tirx.Shuffle`` takes them."""
    return [tirx.const(first + place, "int32") for place in range(count)]


def fill(value: Any, lanes: int) -> Any:
    """A vector of one value."""
    return value if lanes == 1 else T.broadcast(value, lanes)


def lanes_total(vector: Any, lanes: int, join: Callable[[Any, Any], Any] = operator.add) -> Any:
    """Sum of the first ``lanes`` elements of an fp32 array, halved at each step.

    One after the other the additions would wait for each other, longer than a short row takes.

    Args:
        vector: A ``local`` array.
        lanes: A power of two.
        join: What makes one of two, where it is not their sum.
    """
    while lanes > 1:
        lanes //= 2
        half = local(lanes)
        joined = join(vector[at(0, lanes)], vector[at(lanes, lanes)])
        T.buffer_store(half, joined, [at(0, lanes)])
        vector = half
    return vector[0]


def row_totals(k: int, terms: Sequence[Callable[[Any, int], Any]]) -> list[Any]:
    """Emits sums over a row, all in one pass; what does not fill a vector comes last.

    Each has several running sums, for one would wait for its last addition at each step.

    Args:
        k: Elements.
        terms: ``term(offset, lanes)``, fp32, of each sum.
    """
    whole = k // LANES
    # A power of two, and no more than there are vectors.
    running = 1 << min(_RUNNING, max(whole, 1)).bit_length() - 1
    width = running * LANES
    sums = [local(width) for _ in terms]
    for own in sums:
        for place in range(running):
            T.buffer_store(own, fill(T.float32(0), LANES), [at(place * LANES, LANES)])

    def add(vector: Any, place: int) -> None:
        for own, term in zip(sums, terms):
            where = at(place * LANES, LANES)
            T.buffer_store(own, own[where] + term(vector * LANES, LANES), [where])

    with T.serial(0, whole // running) as step:
        for place in range(running):
            add(step * running + place, place)
    for place in range(whole % running):
        add(whole // running * running + place, place)
    totals = []
    for own, term in zip(sums, terms):
        total = local(1)
        T.buffer_store(total, lanes_total(own, width), [0])
        for offset in range(whole * LANES, k):
            T.buffer_store(total, total[0] + term(offset, 1), [0])
        totals.append(total[0])
    return totals


def vector_type(dtype: str, lanes: int) -> str:
    """TVM's name of a vector type."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def bf16_bits(value: Any, lanes: int) -> Any:
    """fp32 rounded to bf16, half to even, as int16 bits.

    In whole numbers, for TVM's own cast goes through a function call on some targets: half of the
    last place kept, a little less where that place is even, carries into it.
    """

    def every(number: int) -> Any:
        return fill(tirx.const(number, "int32"), lanes)

    wide = tirx.reinterpret(vector_type("int32", lanes), value)
    last = tirx.bitwise_and(tirx.shift_right(wide, every(16)), every(1))
    carried = tirx.shift_right(wide + last + every(0x7FFF), every(16))
    return tirx.Cast(vector_type("int16", lanes), carried)


def widened(bits: Any, lanes: int) -> Any:
    """bf16 as int16 bits into fp32."""
    wide = tirx.Cast(vector_type("int32", lanes), bits)
    moved = tirx.shift_left(wide, fill(tirx.const(16, "int32"), lanes))
    return tirx.reinterpret(vector_type("float32", lanes), moved)


def sign_bits(values: Any, dtype: str, lanes: int) -> Any:
    """int32 whose bit i says whether ``values[i] > 0``; float32, or bf16 as int16 bits.

    The program must be given ``SIGN_BITS``.
    """
    return T.call_extern("int32", f"shiftadd_signs_{dtype}_{lanes}", values)


def _sign_bits_function(dtype: str, lanes: int) -> str:
    element, compare = {"float32": ("float", "fcmp ogt"), "int16": ("i16", "icmp sgt")}[dtype]
    vector = element if lanes == 1 else f"<{lanes} x {element}>"
    mask = "i1" if lanes == 1 else f"<{lanes} x i1>"
    zero = "zeroinitializer" if lanes > 1 else "0.0" if dtype == "float32" else "0"
    return f"""
define linkonce_odr i32 @shiftadd_signs_{dtype}_{lanes}({vector} %values) alwaysinline {{
  %positive = {compare} {vector} %values, {zero}
  %bits = bitcast {mask} %positive to i{lanes}
  %word = zext i{lanes} %bits to i32
  ret i32 %word
}}
"""


# In LLVM's language, since TVM has no word for the step from a vector of truths to a number.
SIGN_BITS = "".join(
    _sign_bits_function(dtype, 1 << power) for dtype in ("float32", "int16") for power in range(5)
)


def first_of(buffer: Any, index: list[Any], count: Any) -> Any:
    """A vector of ``LANES`` fp32, of which only the first ``count`` are read; 0 behind them.

    The program must be given ``SOME_LANES``.
    """
    address = T.address_of(buffer[tuple(index)])
    return T.call_extern(f"float32x{LANES}", "shiftadd_first_of", address, count)


def only_first(vector: Any, count: Any, other: float) -> Any:
    """A vector of ``LANES`` fp32 with ``other`` behind the first ``count``.

    The program must be given ``SOME_LANES``.
    """
    return T.call_extern(
        f"float32x{LANES}", "shiftadd_only_first", vector, count, fill(T.float32(other), LANES)
    )


_LANE_NUMBERS = ", ".join(f"i32 {lane}" for lane in range(LANES))
_BEFORE = f"""
  %one = insertelement <{LANES} x i32> poison, i32 %count, i64 0
  %all = shufflevector <{LANES} x i32> %one, <{LANES} x i32> poison, <{LANES} x i32> zeroinitializer
  %before = icmp slt <{LANES} x i32> <{_LANE_NUMBERS}>, %all
"""
# TVM has no word for a load that leaves out what lies behind the end of a tensor.
SOME_LANES = f"""
declare <{LANES} x float> @llvm.masked.load.v{LANES}f32.p0(
    ptr, i32, <{LANES} x i1>, <{LANES} x float>)
define linkonce_odr <{LANES} x float> @shiftadd_first_of(ptr %from, i32 %count) alwaysinline {{
{_BEFORE}
  %found = call <{LANES} x float> @llvm.masked.load.v{LANES}f32.p0(
      ptr %from, i32 4, <{LANES} x i1> %before, <{LANES} x float> zeroinitializer)
  ret <{LANES} x float> %found
}}
define linkonce_odr <{LANES} x float> @shiftadd_only_first(
    <{LANES} x float> %vector, i32 %count, <{LANES} x float> %other) alwaysinline {{
{_BEFORE}
  %found = select <{LANES} x i1> %before, <{LANES} x float> %vector, <{LANES} x float> %other
  ret <{LANES} x float> %found
}}
"""


def spans(width: int, widest: int = LANES) -> Iterator[tuple[int, int]]:
    """Cuts ``width`` elements into vectors of falling powers of two: (offset, lanes)."""
    offset, lanes = 0, widest
    while offset < width:
        while lanes > width - offset:
            lanes //= 2
        yield offset, lanes
        offset += lanes


def row_blocks(remaining: Any, largest: int) -> Iterator[tuple[Any, Any, int]]:
    """Cuts fewer than ``largest`` rows by the bits of their count: (condition, offset, rows)."""
    block = 1 << ((largest - 1).bit_length() - 1) if largest > 1 else 0
    while block:
        offset = tirx.floordiv(remaining, 2 * block) * (2 * block)
        yield tirx.floormod(tirx.floordiv(remaining, block), 2) == 1, offset, block
        block //= 2


def tiles(rows: Any, panels: int, tile_rows: int, panels_outer: bool, emit_tile: Callable) -> None:
    """Visits all tiles of a ``rows × panels`` output in parallel.

    Args:
        rows: Symbolic row count, possibly 0.
        panels: Column panels.
        tile_rows: Rows of a full tile.
        panels_outer: Keep a panel of weights hot and stream the rows, rather than the reverse.
        emit_tile: Called as ``emit_tile(count, first_row, panel)``; the last tile of a panel may
            have fewer rows.
    """
    row_tiles = tirx.floordiv(rows + (tile_rows - 1), tile_rows)
    with T.parallel(0, row_tiles * panels) as tile:
        if panels_outer:
            panel, row_tile = tirx.floordiv(tile, row_tiles), tirx.floormod(tile, row_tiles)
        else:
            row_tile, panel = tirx.floordiv(tile, panels), tirx.floormod(tile, panels)
        first = row_tile * tile_rows
        emit_tile(tirx.min(rows - first, tirx.const(tile_rows, "int32")), first, panel)

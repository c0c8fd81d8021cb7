"""Small words in which the CPU lowerings are written, over TVM's IR builder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import tvm.script.ir_builder.tirx as T
from tvm import tirx
from tvm.script.ir_builder import IRBuilder

# Widest vector that we write. LLVM splits it where registers are narrower.
LANES = 16


def program(body: Callable[[], None]) -> tirx.PrimFunc:
    """Builds the function ``main`` whose arguments and statements ``body`` emits."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_name("main")
            T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
            body()
        return builder.get()


def argument(name: str, shape: tuple[Any, ...], dtype: str) -> Any:
    """Declares a buffer argument; a size may be a symbolic variable."""
    return T.match_buffer(T.arg(name, T.handle()), shape, dtype)


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


def at(offset: Any, lanes: int) -> Any:
    """Index of ``lanes`` neighbouring elements."""
    return offset if lanes == 1 else tirx.Ramp(offset, 1, lanes)


def fill(value: Any, lanes: int) -> Any:
    """A vector of one value."""
    return value if lanes == 1 else T.broadcast(value, lanes)


def vector_type(dtype: str, lanes: int) -> str:
    """TVM's name of a vector type."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


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
    """Visits all tiles of a ``rows × panels`` output in parallel, ragged rows included.

    Args:
        rows: Symbolic row count, possibly 0.
        panels: Column panels.
        tile_rows: Rows of a full tile.
        panels_outer: Keep a panel of weights hot and stream the rows, rather than the reverse.
        emit_tile: Called as ``emit_tile(tile_rows, first_row, panel)``.
    """
    row_tiles = tirx.floordiv(rows + (tile_rows - 1), tile_rows)
    with T.parallel(0, row_tiles * panels) as tile:
        if panels_outer:
            panel, row_tile = tirx.floordiv(tile, row_tiles), tirx.floormod(tile, row_tiles)
        else:
            row_tile, panel = tirx.floordiv(tile, panels), tirx.floormod(tile, panels)
        first = row_tile * tile_rows
        with T.If(first + tile_rows <= rows):
            with T.Then():
                emit_tile(tile_rows, first, panel)
            with T.Else():
                for condition, offset, block in row_blocks(rows - first, tile_rows):
                    with T.If(condition), T.Then():
                        emit_tile(block, first + offset, panel)

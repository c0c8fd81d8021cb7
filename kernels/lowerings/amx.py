"""Rows times a panel by AMX: tiles of 16 rows of 64 bytes, multiplied by one instruction.

Two tiles of rows and the two halves of a panel make four tiles of sums, which leaves one register
each for inputs and weights; the machine renames them. What k leaves over 64 bytes has tiles of its
own shape. Weights lie as for dot products of vectors: a step's group of each channel side by side.

Source:
    Intel SDM, LDTILECFG, TILELOADD, TDPBUSD and TDPBF16PS (rounds to nearest even, takes
    denormals for zero).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import tvm.script.ir_builder.tirx as T
from tvm import DataType, tirx

from kernels.lowerings.emit import LANES, at, local, workspace
from kernels.lowerings.panel_product import VECTORS, PanelProduct, Rows
from kernels.packing import PANEL

TILE_ROWS = 16
TILE_BYTES = 64
# Rows whose sums the registers hold beside one tile of inputs and one of weights.
BLOCK_ROWS = 2 * TILE_ROWS
_STEP_BYTES = 4
_STEPS = TILE_BYTES // _STEP_BYTES
_ROW_TILES = BLOCK_ROWS // TILE_ROWS
_SUM_BYTES = PANEL * 4
# Registers: sums by tile of rows and half of the panel, then inputs and weights.
_INPUTS, _WEIGHTS = 4, 5
_REST = 2
# Multiply-accumulates of a block's products over one tile of inputs.
MACS = {
    "tdpbusd": BLOCK_ROWS * PANEL * TILE_BYTES,
    "tdpbf16ps": BLOCK_ROWS * PANEL * TILE_BYTES // 2,
}


def _instruction(name: str, *operands: Any) -> None:
    T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{name}", *operands))


def _register(number: int) -> Any:
    return tirx.const(number, "int8")


def _bytes(count: Any) -> Any:
    return tirx.const(count, "int64")


@dataclass(frozen=True)
class Workspace:
    """A task's own memory: sums of a block of rows by type, and decoded weights by type."""

    sums: dict[str, Any]
    decoded: dict[str, Any]

    @classmethod
    def of(cls, products: Collection[PanelProduct]) -> Workspace:
        """Emits as much as the largest of some products needs."""
        sums: dict[str, int] = {}
        decoded: dict[str, int] = {}
        for product in products:
            unit, planes = product.unit, product.stored.planes
            sums[unit.total] = max(sums.get(unit.total, 0), len(planes))
            if product.stored.is_decoded:
                elements = len(planes) * product.steps * PANEL * unit.group
                decoded[unit.weights] = max(decoded.get(unit.weights, 0), elements)
        return cls(
            {
                dtype: local((planes, BLOCK_ROWS, PANEL), dtype)
                for dtype, planes in sorted(sums.items())
            },
            {dtype: workspace((elements,), dtype) for dtype, elements in sorted(decoded.items())},
        )


def begin(product: PanelProduct) -> None:
    """Gives the registers the shapes for a product; it takes as long as a small product."""
    _shape(product.steps % _STEPS)


def _shape(rest: int) -> None:
    rows, widths = [TILE_ROWS] * 8, [TILE_BYTES] * 8
    if rest:
        widths[_INPUTS + _REST] = rest * _STEP_BYTES
        rows[_WEIGHTS + _REST] = rest
    palette = [1, 0, 0, 0]
    words = palette + _words(widths, 16) + [0] * 4 + _words(rows, 8) + [0] * 2
    shapes = local(LANES, "int32")
    value = tirx.Shuffle(
        [tirx.const(word, "int32") for word in words],
        [tirx.const(place, "int32") for place in range(LANES)],
    )
    T.buffer_store(shapes, value, [at(0, LANES)])
    _instruction("ldtilecfg", T.address_of(shapes[0]))


def _words(values: list[int], bits: int) -> list[int]:
    """Small numbers side by side in words of 32 bits."""
    each = 32 // bits
    return [
        sum(value << bits * place for place, value in enumerate(values[start:][:each]))
        for start in range(0, len(values), each)
    ]


def end() -> None:
    """Empties the registers, which a switch of threads would else save."""
    _instruction("tilerelease")


def only_multiply(instruction: str, times: int, address: Any) -> None:
    """Emits nothing but a block's products, ``MACS[instruction]`` each time.

    Args:
        instruction: Of a unit.
        times: How often.
        address: Of 64 bytes that make each row of the inputs and of the weights.
    """
    _shape(0)
    for register in (_INPUTS, _WEIGHTS):
        _instruction("tileloadd64", _register(register), address, _bytes(0))
    with T.serial(0, times):
        for total in range(_ROW_TILES * VECTORS):
            _instruction(instruction, *map(_register, (total, _INPUTS, _WEIGHTS)))
    end()


def multiply(
    product: PanelProduct,
    memory: Workspace,
    rows: Rows,
    panel: Any,
    finish: Callable[[Any, list[Any]], None],
) -> None:
    """Calls ``finish(row, vectors)`` for each row; between ``begin`` and ``end``.

    Args:
        product: Whose unit is AMX's.
        memory: Of the task.
        rows: Their buffer goes on to whole blocks.
        panel: Which one.
        finish: Writes the results of a row, counted from the first.
    """
    weights = _weights(product, memory, panel)

    def block(start: Any, remaining: Any) -> None:
        sums = memory.sums[product.unit.total]
        for tiles in (1, _ROW_TILES):
            fits = remaining <= TILE_ROWS if tiles == 1 else remaining > TILE_ROWS
            with T.If(fits), T.Then():
                for plane, address in enumerate(weights):
                    _add_up(product, rows, start, tiles, address)
                    for tile, half in _places(tiles):
                        there = sums[plane, tile * TILE_ROWS, half * LANES]
                        register = _register(tile * VECTORS + half)
                        _instruction(
                            "tilestored64", register, T.address_of(there), _bytes(_SUM_BYTES)
                        )
        with T.serial(0, tirx.min(remaining, tirx.const(BLOCK_ROWS, "int32"))) as r:
            found = [
                [sums[plane, r, at(v * LANES, LANES)] for v in range(VECTORS)]
                for plane in range(len(weights))
            ]
            finish(start + r, product.row(panel, found, rows, start + r))

    if rows.most <= BLOCK_ROWS:
        block(tirx.const(0, "int32"), rows.count)
        return
    with T.serial(0, tirx.floordiv(rows.count + (BLOCK_ROWS - 1), BLOCK_ROWS)) as index:
        block(index * BLOCK_ROWS, rows.count - index * BLOCK_ROWS)


def _weights(
    product: PanelProduct, memory: Workspace, panel: Any
) -> list[Callable[[Any, int], Any]]:
    """By plane: ``address(step, half)`` of a panel's weights as the unit takes them."""
    width = LANES * product.unit.group

    def given(step: Any, half: int) -> Any:
        return T.address_of(product.w[panel, step, half * width])

    if not product.stored.is_decoded:
        return [given]
    decoded = memory.decoded[product.unit.weights]

    def place(plane: int, step: Any, half: int) -> Any:
        return ((plane * product.steps + step) * VECTORS + half) * width

    with T.serial(0, product.steps) as step:
        for plane in range(len(product.stored.planes)):
            for half in range(VECTORS):
                value = product.weights(plane, panel, step, half)
                T.buffer_store(decoded, value, [at(place(plane, step, half), width)])

    def of_plane(plane: int) -> Callable[[Any, int], Any]:
        return lambda step, half: T.address_of(decoded[place(plane, step, half)])

    return [of_plane(plane) for plane in range(len(product.stored.planes))]


def _places(tiles: int) -> Iterator[tuple[int, int]]:
    """Tiles of rows and halves of the panel, in an order in which neighbours share one."""
    for tile in range(tiles):
        halves = range(VECTORS)
        for half in halves if tile % 2 == 0 else reversed(halves):
            yield tile, half


def _add_up(
    product: PanelProduct,
    rows: Rows,
    start: Any,
    tiles: int,
    address: Callable[[Any, int], Any],
) -> None:
    """Sums of some tiles of rows over k, in registers 0 to 3."""
    unit, inputs = product.unit, rows.buffer
    stride = int(inputs.shape[1]) * DataType(inputs.dtype).itemsize
    whole, rest = divmod(product.steps, _STEPS)
    for tile, half in _places(tiles):
        _instruction("tilezero", _register(tile * VECTORS + half))

    def steps_from(step: Any, own: int) -> None:
        loaded: dict[int, Any] = {}

        def load(register: int, what: int, where: Callable[[], Any], apart: int) -> None:
            if loaded.get(register) != what:
                loaded[register] = what
                _instruction("tileloadd64", _register(register), where(), _bytes(apart))

        for tile, half in _places(tiles):
            row = rows.first + start + tile * TILE_ROWS
            column = step * unit.group
            load(_INPUTS + own, tile, lambda: T.address_of(inputs[row, column]), stride)  # noqa: B023
            load(
                _WEIGHTS + own,
                half,
                lambda: address(step, half),  # noqa: B023
                VECTORS * TILE_BYTES,
            )
            total, x, w = (tile * VECTORS + half, _INPUTS + own, _WEIGHTS + own)
            _instruction(str(unit.amx), _register(total), _register(x), _register(w))

    if whole:
        with T.serial(0, whole) as chunk:
            steps_from(chunk * _STEPS, 0)
    if rest:
        steps_from(tirx.const(whole * _STEPS, "int32"), _REST)

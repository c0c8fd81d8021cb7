"""A tile of rows times one panel of a linear's packed weights, and what follows in registers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.lowerings.emit import LANES, argument, at, fill, gelu, local, spans
from kernels.lowerings.inner_product import Unit
from kernels.packing import BF16_GROUP, DOT_GROUP, PANEL

VECTORS = PANEL // LANES
# What a unit reads its inputs as, by the size of its group: type and bytes.
PREPARED: dict[int, tuple[str, int]] = {
    1: ("float32", 4),
    BF16_GROUP: ("int16", 2),
    DOT_GROUP: ("uint8", 1),
}


@dataclass(frozen=True)
class Stored:
    """How a weight lies in memory.

    Attributes:
        dtype: Element type of the packed weights.
        width: Elements that make one vector of ``LANES * group`` weights.
        planes: A decoder each: a loaded vector into the unit's weights. The result is the sum over
            planes of ``factor ** index`` times the plane's product; the first plane is the least.
        factor: Between one plane and the next.
    """

    dtype: str
    width: int
    planes: tuple[Callable[[Any], Any], ...] = (lambda weights: weights,)
    factor: float = 1.0


class Arithmetic(NamedTuple):
    """What tells one form of linear from another: what multiplies, and what it multiplies by."""

    unit: Unit
    stored: Stored


@dataclass(frozen=True)
class PanelProduct:
    """A linear of k inputs and n outputs whose weights are arguments of a kernel.

    int8 codes are multiplied as unsigned bytes; what the shift by 128 adds, ``offset[plane, n]``,
    is taken off at the end.

    Attributes:
        k, n: Inputs and outputs.
        unit: Multiplies and adds.
        stored: The weights.
        w: Packed panels.
        scale, bias, offset: One for each output of the padded panels; scale and offset may be None.
    """

    k: int
    n: int
    unit: Unit
    stored: Stored
    w: Any
    scale: Any
    bias: Any
    offset: Any

    @classmethod
    def declared(
        cls, k: int, n: int, arithmetic: Arithmetic, fused: Collection[str], suffix: str = ""
    ) -> PanelProduct:
        """Its arguments in the order of ``kernels.packing.pack_linear``.

        Args:
            k, n: Inputs and outputs.
            arithmetic: Of its form.
            fused: Whether there are ``scale`` and ``quantise``.
            suffix: Of the arguments' names.
        """
        unit, stored = arithmetic
        panels, steps = -(-n // PANEL), -(-k // unit.group)
        padded = panels * PANEL

        def if_fused(step: str, name: str, size: int, dtype: str) -> Any:
            return argument(name + suffix, (size,), dtype) if step in fused else None

        return cls(
            k=k,
            n=n,
            unit=unit,
            stored=stored,
            w=argument(f"w{suffix}", (panels, steps, VECTORS * stored.width), stored.dtype),
            scale=if_fused("scale", "scale", padded, "float32"),
            bias=argument(f"bias{suffix}", (padded,), "float32"),
            offset=if_fused("quantise", "offset", len(stored.planes) * padded, "int32"),
        )

    @property
    def panels(self) -> int:
        """Of ``kernels.packing.PANEL`` outputs, the last one perhaps padded."""
        return -(-self.n // PANEL)

    @property
    def padded_k(self) -> int:
        """Inputs in whole groups."""
        return -(-self.k // self.unit.group) * self.unit.group

    def sums(self, rows: int, panel: Any, group: Callable[[int, Any], Any]) -> list[Any]:
        """Sums of a tile over k, in registers: by plane, row and vector.

        Args:
            rows: Of the tile.
            panel: Which one.
            group: ``group(row, step)``: one row's inputs of a step, fp32 or as int32 bits.
        """

        def load(decode: Callable, step: Any, v: int) -> Any:
            width = self.stored.width
            return decode(self.w[panel, step, at(v * width, width)])

        steps = -(-self.k // self.unit.group)
        return [
            _accumulated(rows, steps, self.unit, partial(load, decode), group)
            for decode in self.stored.planes
        ]

    def results(
        self,
        panel: Any,
        sums: list[Any],
        x_scale: Callable[[int], Any] | None,
        activated: bool,
        weight: Callable[[int], Any] | None,
    ) -> Iterator[tuple[int, list[Any]]]:
        """Each row of a tile and its vectors: scaled, with bias, activated, weighted.

        Args:
            panel: Which one.
            sums: Of it.
            x_scale: Of a row, where it was quantised.
            activated: Whether a GELU follows.
            weight: Of a row.
        """
        scratch, done = local((3, LANES)), local(PANEL)
        for r in range(len(sums[0])):
            vectors = []
            for v in range(VECTORS):
                channel = at(panel * PANEL + v * LANES, LANES)
                value = self._joined([plane[r][v] for plane in sums], channel)
                if x_scale is not None:
                    value = value * (fill(x_scale(r), LANES) * self.scale[channel])
                elif self.scale is not None:
                    value = value * self.scale[channel]
                value = value + self.bias[channel]
                if activated:
                    T.buffer_store(done, gelu(value, scratch), [at(v * LANES, LANES)])
                    value = done[at(v * LANES, LANES)]
                if weight is not None:
                    value = value * fill(weight(r), LANES)
                vectors.append(value)
            yield r, vectors

    def _joined(self, sums: list[Any], channel: Any) -> Any:
        """The planes' sums as one fp32 vector, rid of what unsigned activations have added."""
        total = None
        for index, plane in enumerate(sums):
            if self.offset is not None:
                own = channel + index * self.panels * PANEL if index else channel
                plane = tirx.Cast(f"float32x{LANES}", plane - self.offset[own])
            weighted = plane
            if index:
                weighted = plane * fill(T.float32(self.stored.factor**index), LANES)
            total = weighted if total is None else total + weighted
        return total


def prepared_group(prepared: Any, unit: Unit, row: Any, step: Any) -> Any:
    """A step's inputs of a prepared row, as ``PanelProduct.sums`` takes them.

    Args:
        prepared: Rows of the type in ``PREPARED``.
        unit: That reads them.
        row: Which one.
        step: Which group.
    """
    group = prepared[row, at(step * unit.group, unit.group)]
    return tirx.reinterpret("int32", group) if unit.group > 1 else group


def store_row(out: Any, residual: Any, row: Any, panel: Any, n: int, vectors: list[Any]) -> None:
    """Writes one row of a panel; the last panel of a ragged n is cut to its channels.

    Args:
        out: ``(rows, n)``.
        residual: Added to it; None where there is none.
        row: Of both.
        panel: Which one.
        n: Outputs.
        vectors: Of ``PanelProduct.results``.
    """

    def store(value: Any, offset: int, lanes: int) -> None:
        index = [row, at(panel * PANEL + offset, lanes)]
        if residual is not None:
            value = value + residual[tuple(index)]
        T.buffer_store(out, value, index)

    def whole() -> None:
        for v, vector in enumerate(vectors):
            store(vector, v * LANES, LANES)

    def cut() -> None:
        # A copy, so that no scalar access keeps the accumulators themselves out of registers.
        copy = local(PANEL)
        for v, vector in enumerate(vectors):
            T.buffer_store(copy, vector, [at(v * LANES, LANES)])
        for offset, lanes in spans(n % PANEL):
            store(copy[at(offset, lanes)], offset, lanes)

    if n % PANEL == 0:
        whole()
    elif n < PANEL:
        cut()
    else:
        with T.If((panel + 1) * PANEL <= n):
            with T.Then():
                whole()
            with T.Else():
                cut()


def _accumulated(
    rows: int,
    steps: int,
    unit: Unit,
    load: Callable[[Any, int], Any],
    group: Callable[[int, Any], Any],
) -> list[list[Any]]:
    """Sums a tile over k; ``load(step, v)`` is vector v of the weights, once for all rows."""
    width = LANES * unit.group
    sums, weights = local(rows * PANEL, unit.total), local(VECTORS * width, unit.weights)
    where = [[at(r * PANEL + v * LANES, LANES) for v in range(VECTORS)] for r in range(rows)]
    for r in range(rows):
        for v in range(VECTORS):
            T.buffer_store(sums, fill(tirx.const(0, unit.total), LANES), [where[r][v]])
    with T.serial(0, steps) as step:
        for v in range(VECTORS):
            T.buffer_store(weights, load(step, v), [at(v * width, width)])
        for r in range(rows):
            inputs = fill(group(r, step), LANES)
            for v in range(VECTORS):
                value = unit.multiply(sums[where[r][v]], inputs, weights[at(v * width, width)])
                T.buffer_store(sums, value, [where[r][v]])
    return [[sums[where[r][v]] for v in range(VECTORS)] for r in range(rows)]

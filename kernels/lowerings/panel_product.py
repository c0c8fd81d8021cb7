"""A panel of a linear's packed weights, and what follows its product with some rows."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.lowerings.emit import LANES, argument, at, fill, local, spans
from kernels.lowerings.inner_product import Unit
from kernels.packing import PANEL

VECTORS = PANEL // LANES


@dataclass(frozen=True)
class Stored:
    """How a weight lies in memory.

    Attributes:
        dtype: Element type of the packed weights.
        width: Elements that make one vector of ``LANES * group`` weights.
        planes: A decoder each: a loaded vector into the unit's weights; None where they lie as the
            unit takes them. The result is the sum over planes of ``factor ** index`` times the
            plane's product; the first plane is the least.
        factor: Between one plane and the next.
    """

    dtype: str
    width: int
    planes: tuple[Callable[[Any], Any] | None, ...] = (None,)
    factor: float = 1.0

    @property
    def is_decoded(self) -> bool:
        """Whether the weights are stored otherwise than the unit takes them."""
        return self.planes != (None,)


class Arithmetic(NamedTuple):
    """What tells one form of linear from another: what multiplies, and what it multiplies by."""

    unit: Unit
    stored: Stored


@dataclass(frozen=True)
class Rows:
    """Rows that are multiplied with a panel, and what follows; each is counted from the first.

    Attributes:
        buffer: Where they lie, as the unit reads them, in whole groups.
        first: Of them.
        count: How many, symbolic.
        most: How many there can be.
        tile: How many at a time, where sums are in vector registers.
        fit: Of how many a whole panel's sums fit there.
        scale: ``scale(row)``, where they were quantised.
        activation: Of a vector of results, where one follows.
        weight: ``weight(row)``, a factor of the result.
        fetch: ``fetch(rows, step)`` asks for what lies behind so many rows; emitted at each step.
    """

    buffer: Any
    first: Any
    count: Any
    most: int
    tile: int
    fit: int
    scale: Callable[[Any], Any] | None = None
    activation: Callable[[Any], Any] | None = None
    weight: Callable[[Any], Any] | None = None
    fetch: Callable[[int, Any], None] | None = None


@dataclass(frozen=True)
class PanelProduct:
    """A linear of k inputs and n outputs whose weights are arguments of a kernel.

    Most units multiply codes as unsigned bytes, 128 more than they are; what that adds,
    ``offset[plane, n]``, is taken off at the end.

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
    def last_vectors(self) -> int:
        """Of the last panel, those that any output is in."""
        return -(-(self.n - (self.panels - 1) * PANEL) // LANES)

    @property
    def padded_k(self) -> int:
        """Inputs in whole groups."""
        return self.steps * self.unit.group

    @property
    def steps(self) -> int:
        """Groups of inputs."""
        return -(-self.k // self.unit.group)

    def weights(self, plane: int, panel: Any, step: Any, v: int) -> Any:
        """Vector v of a step's weights, as the unit takes them."""
        decode, width = self.stored.planes[plane], self.stored.width
        loaded = self.w[panel, step, at(v * width, width)]
        return loaded if decode is None else decode(loaded)

    def row(self, panel: Any, sums: list[list[Any]], rows: Rows, r: Any) -> list[Any]:
        """A row's vectors of a panel: scaled, with bias, activated, weighted.

        Args:
            panel: Which one.
            sums: Of the row, by plane and vector.
            rows: What follows.
            r: Which of them.
        """
        done, vectors = local(PANEL), []
        for v in range(len(sums[0])):
            channel = at(panel * PANEL + v * LANES, LANES)
            value = self._joined([plane[v] for plane in sums], channel)
            if rows.scale is not None:
                value = value * (fill(rows.scale(r), LANES) * self.scale[channel])
            elif self.scale is not None:
                value = value * self.scale[channel]
            value = value + self.bias[channel]
            if rows.activation is not None:
                T.buffer_store(done, rows.activation(value), [at(v * LANES, LANES)])
                value = done[at(v * LANES, LANES)]
            if rows.weight is not None:
                value = value * fill(rows.weight(r), LANES)
            vectors.append(value)
        return vectors

    def _joined(self, sums: list[Any], channel: Any) -> Any:
        """The planes' sums as one fp32 vector, rid of what unsigned activations have added."""
        total = None
        for index, plane in enumerate(sums):
            if self.offset is not None:
                own = channel + index * self.panels * PANEL if index else channel
                exact = plane - self.offset[own] if self.unit.inputs == "uint8" else plane
                plane = tirx.Cast(f"float32x{LANES}", exact)
            weighted = plane
            if index:
                weighted = plane * fill(T.float32(self.stored.factor**index), LANES)
            total = weighted if total is None else total + weighted
        return total


def store_row(out: Any, residual: Any, row: Any, panel: Any, n: int, vectors: list[Any]) -> None:
    """Writes one row of a panel; the last panel of a ragged n is cut to its channels.

    Args:
        out: ``(rows, n)``.
        residual: Added to it; None where there is none.
        row: Of both.
        panel: Which one.
        n: Outputs.
        vectors: Of ``PanelProduct.row``; of the last panel perhaps only those with outputs.
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
    elif n < PANEL or len(vectors) < VECTORS:
        cut()
    else:
        with T.If((panel + 1) * PANEL <= n):
            with T.Then():
                whole()
            with T.Else():
                cut()

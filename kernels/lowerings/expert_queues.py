"""A queue of tokens for each expert, each token as that one reads it.

A thread has its own: they stay in its caches, and it need not wait until other threads' tokens are
routed and sorted.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.lowerings.activations import copy_row, prepare_row
from kernels.lowerings.emit import LANES, argument, at, held, local, workspace
from kernels.lowerings.panel_product import PanelProduct
from kernels.lowerings.routing import choose, probability, remembered


@dataclass(frozen=True)
class Router:
    """Gates as arguments: ``(experts, k)`` and ``(experts,)``."""

    gate: Any
    bias: Any

    @classmethod
    def declared(cls, experts: int, k: int) -> Router | None:
        """None where there is nothing to choose."""
        if experts == 1:
            return None
        gate = argument("gate", (experts, k), "float32")
        return cls(gate, argument("gate_bias", (experts,), "float32"))


@dataclass(frozen=True)
class Linear:
    """One of an expert's linears: its product, what it does with its input, rows of a tile."""

    product: PanelProduct
    fused: Collection[str]
    tile_rows: int

    @property
    def dtype(self) -> str:
        """Type of what it reads."""
        return self.product.unit.inputs


@dataclass(frozen=True)
class ExpertQueues:
    """A thread's own; the places of one expert follow those of the one before.

    Attributes:
        capacity: Tokens that each has room for.
        router: None where there is one expert.
        readers: The experts' first linears.
        count: Tokens in each.
        token, scale: Of each place: which token it is, and the scale of its codes.
        behind: Of each place, what ``routing.probability`` takes; nothing without a router.
        prepared: Inputs by type, ``(places, padded k)``.
    """

    capacity: int
    router: Router | None
    readers: Sequence[Linear]
    count: Any
    token: Any
    scale: Any
    behind: Sequence[Any]
    prepared: dict[str, Any]

    @classmethod
    def empty(cls, capacity: int, router: Router | None, readers: Sequence[Linear]) -> ExpertQueues:
        """Emits them."""
        experts, places = len(readers), len(readers) * capacity
        count = local(experts, "int32")
        for expert in range(experts):
            T.buffer_store(count, tirx.const(0, "int32"), [expert])
        behind = 0 if router is None else remembered(experts)
        width = -(-max(reader.product.padded_k for reader in readers) // LANES) * LANES
        types = sorted({reader.dtype for reader in readers})
        return cls(
            capacity,
            router,
            readers,
            count,
            workspace((places,), "int32"),
            workspace((places,), "float32"),
            # Read in vectors, the last of which may begin at the last place.
            [workspace((places + LANES,), "float32") for _ in range(behind)],
            {dtype: workspace((places, width), dtype) for dtype in types},
        )

    def put(self, x: Any, row: Any, token: Any) -> None:
        """Emits the choice of a token, and puts it at the end of that expert's queue.

        Args:
            x: fp32 ``(rows, k)``, normalised where the layer does so.
            row: Of x.
            token: Which one it is.
        """
        k, expert = self.readers[0].product.k, tirx.const(0, "int32")
        behind: Sequence[Any] = ()
        if self.router is not None:
            expert, behind = choose(x, row, k, self.router.gate, self.router.bias)
        place = held(expert * self.capacity + self.count[expert])
        T.buffer_store(self.count, self.count[expert] + 1, [expert])
        T.buffer_store(self.token, token, [place])
        for buffer, value in zip(self.behind, behind):
            T.buffer_store(buffer, value, [place])
        for dtype, buffer in self.prepared.items():
            own = [index for index, reader in enumerate(self.readers) if reader.dtype == dtype]
            fused = self.readers[own[0]].fused

            def prepare(fused: Collection[str] = fused, buffer: Any = buffer) -> None:
                prepare_row(x, row, k, fused, None, buffer, place, self.scale)

            if len(own) == len(self.readers):
                prepare()
            else:
                with T.If(reduce(tirx.Or, (expert == index for index in own))), T.Then():
                    prepare()

    def drop(self, expert: int, taken: Any) -> None:
        """Emits that the first ones of a queue are gone, and the others in their place."""
        first = expert * self.capacity
        left = held(self.count[expert] - taken)
        T.buffer_store(self.count, left, [expert])
        prepared = self.prepared[self.readers[expert].dtype]
        width = int(prepared.shape[1])
        with T.If(taken > 0), T.Then(), T.serial(0, left) as offset:
            old, new = held(first + taken + offset), held(first + offset)
            copy_row(prepared, old, width, prepared, new)
            for buffer in (self.token, self.scale, *self.behind):
                T.buffer_store(buffer, buffer[old], [new])

    def weights(self, place: Any, some: Any, into: Any) -> None:
        """Emits the probabilities of some places' experts, and of what fills the last vector."""
        with T.serial(0, tirx.floordiv(some + (LANES - 1), LANES)) as vector:
            own = at(place + vector * LANES, LANES)
            value = probability([buffer[own] for buffer in self.behind], LANES)
            T.buffer_store(into, value, [at(vector * LANES, LANES)])

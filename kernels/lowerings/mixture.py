"""A mixture of experts from its layer norm to the residual in one program, or one expert alone.

A thread routes a block of its tokens, then takes those of each expert through all of its linears,
some at a time: nothing of it leaves its caches, and threads meet once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.forms import FORMS
from kernels.lowerings import amx, panel_rows
from kernels.lowerings.activations import normalised, prepare_row
from kernels.lowerings.arithmetic import fastest
from kernels.lowerings.emit import LANES, ROLLED, argument, at, held, program, rows_of, workspace
from kernels.lowerings.expert_queues import ExpertQueues, Linear, Router
from kernels.lowerings.gelu import gelu
from kernels.lowerings.panel_product import PanelProduct, Rows, store_row
from kernels.lowerings.register_tiles import largest_tile_rows
from kernels.packing import PANEL
from kernels.targets import KernelTarget

Put = Callable[[Any, Any, Any], None]


@dataclass(frozen=True)
class Sizes:
    """What a mixture's program is built for.

    Attributes:
        block_rows: Tokens, at most, that a thread routes before it goes on with the experts.
        task_rows: Of them, as many at a time as go through all of an expert's linears.
        tile_rows: Of them, as many at a time as vector registers hold sums of: by linear, the
            first expert's first.
        threads: That share the tokens.
        k: Features of a token.
        widths: Outputs of each of an expert's linears, one or two, in turn.
        forms: Of the linears, those of the first expert first.
        layer_norm: Whether x is normalised first.
        gelu: Whether there is one behind an expert's first linear.
        residual: Whether something is added to the result.
    """

    block_rows: int
    task_rows: int
    tile_rows: tuple[int, ...]
    threads: int
    k: int
    widths: tuple[int, ...]
    forms: tuple[str, ...]
    layer_norm: bool
    gelu: bool
    residual: bool

    @property
    def experts(self) -> int:
        """How many."""
        return len(self.forms) // len(self.widths)


@dataclass(frozen=True)
class Tokens:
    """What routers and experts read.

    Attributes:
        chunks: Of some neighbours each.
        most: Tokens, at most, of one.
        emit: ``emit(first, count, put)`` calls ``put(x, row, token)`` for each token of some
            chunks: x is fp32 ``(rows, k)``, normalised where the layer does so.
    """

    chunks: Any
    most: int
    emit: Callable[[Any, Any, Put], None]


@dataclass(frozen=True)
class _Memory:
    """A thread's own, for a task at a time.

    Attributes:
        hidden: What lies between two linears.
        prepared, row_scale: The same by type, as the second one reads it, and scales of its codes.
        weight: Of the results, where there is a router.
        products: What AMX's products need.
    """

    hidden: Any
    prepared: dict[str, Any]
    row_scale: Any
    weight: Any
    products: amx.Workspace


def mixture(sizes: Sizes, target: KernelTarget) -> tirx.PrimFunc:
    """``main(x, [norm,] [gate, gate_bias,] w, [scale,] bias, [offset,] …, [residual,] out)``.

    Shapes: x ``(images, tokens, k)``; norm ``(2k + 1,)`` as for
    ``kernels.lowerings.activations.normalise_row``; gate ``(experts, k)`` and gate_bias
    ``(experts,)`` where there are several experts; for each linear what
    ``kernels.packing.pack_linear`` makes; residual and out ``(images, tokens, n)``.

    Each token passes through the expert that its router prefers, and is weighted by that one's
    probability; through a single expert without either.

    Args:
        sizes: And forms.
        target: The CPU.
    """

    def declare(images: Any, tokens: Any) -> Callable[[], Tokens]:
        given = argument("x", (images, tokens, sizes.k), "float32")
        norm = argument("norm", (2 * sizes.k + 1,), "float32") if sizes.layer_norm else None

        def emit(first: Any, count: Any, put: Put) -> None:
            with T.serial(0, count) as offset:
                token = first + offset
                put(*normalised(rows_of(given), token, sizes.k, norm), token)

        return lambda: Tokens(images * tokens, 1, emit)

    return through_experts(sizes, target, declare)


def through_experts(
    sizes: Sizes, target: KernelTarget, declare: Callable[[Any, Any], Callable[[], Tokens]]
) -> tirx.PrimFunc:
    """A program that ends in experts.

    ``main(…, [gate, gate_bias,] w, [scale,] bias, [offset,] …, [residual,] out)``.

    Args:
        sizes: And forms.
        target: The CPU.
        declare: ``declare(images, tokens)`` declares the arguments in front, and returns what makes
            the tokens of them.
    """
    arithmetic = {form: fastest(form, target) for form in sizes.forms}
    llvm = {ROLLED} | {unit.llvm for unit, _ in arithmetic.values() if unit.llvm}

    def body() -> None:
        images, each = T.int32(), T.int32()
        tokens_of = declare(images, each)
        router = Router.declared(sizes.experts, sizes.k)
        linears = []
        for place, form in enumerate(sizes.forms):
            step = place % len(sizes.widths)
            inputs, n = (sizes.k, *sizes.widths)[step], sizes.widths[step]
            fused = FORMS[form]["fused"]
            own = PanelProduct.declared(inputs, n, arithmetic[form], fused, f"_{place}")
            linears.append(Linear(own, fused, sizes.tile_rows[place]))
        shape = (images, each, sizes.widths[-1])
        added = argument("residual", shape, "float32") if sizes.residual else None
        out = argument("out", shape, "float32")
        tokens = tokens_of()
        residual = None if added is None else rows_of(added)
        activation = gelu(target) if sizes.gelu else None
        fit = largest_tile_rows(target)
        experts = _Experts(sizes, router, linears, fit, activation, residual, rows_of(out))
        share = tirx.floordiv(tokens.chunks + (sizes.threads - 1), sizes.threads)
        with T.parallel(0, sizes.threads) as thread:
            first = held(thread * share)
            experts.emit(tokens, first, held(tirx.min(tokens.chunks - first, share)))

    return program(body, "\n".join(sorted(llvm)))


@dataclass(frozen=True)
class _Experts:
    """Their linears, of how many rows sums fit, what follows, and where the last of them writes."""

    sizes: Sizes
    router: Router | None
    linears: Sequence[Linear]
    fit: int
    activation: Callable[[Any], Any] | None
    residual: Any
    out: Any

    def emit(self, tokens: Tokens, first: Any, chunks: Any) -> None:
        """Emits a thread's tokens, a block after the other: into queues, then through experts.

        What fills no task waits for more, but in the last block.
        """
        sizes, depth = self.sizes, len(self.sizes.widths)
        each = max(1, sizes.block_rows // tokens.most)
        room = (-(-each * tokens.most // sizes.task_rows) + 1) * sizes.task_rows
        queues = ExpertQueues.empty(room, self.router, self.linears[::depth])
        memory = self._memory()
        with T.serial(0, tirx.floordiv(chunks + (each - 1), each)) as block:
            left = held(chunks - block * each)
            some = held(tirx.min(left, tirx.const(each, "int32")))
            tokens.emit(first + block * each, some, queues.put)
            for expert in range(sizes.experts):
                own = self.linears[expert * depth :][:depth]
                self._expert(own, expert, queues, memory, left == some)

    def _expert(
        self, own: Sequence[Linear], expert: int, queues: ExpertQueues, memory: _Memory, ends: Any
    ) -> None:
        """Emits a queue's way through its expert, some tokens at a time."""
        rows = self.sizes.task_rows
        count = held(queues.count[expert])
        tasks = held(tirx.floordiv(count + tirx.Select(ends, rows - 1, 0), rows))
        with T.serial(0, tasks) as task:
            some = held(tirx.min(count - task * rows, tirx.const(rows, "int32")))
            self._task(own, queues, memory, held(expert * queues.capacity + task * rows), some)
        queues.drop(expert, held(tirx.min(tasks * rows, count)))

    def _memory(self) -> _Memory:
        """Emits it."""
        rows, depth = self.sizes.task_rows, len(self.sizes.widths)
        products = panel_rows.workspace([linear.product for linear in self.linears])
        weight = workspace((-(-rows // LANES) * LANES,), "float32") if self.router else None
        if depth == 1:
            return _Memory(None, {}, None, weight, products)
        hidden = workspace((rows, -(-self.sizes.widths[0] // PANEL) * PANEL), "float32")
        second = self.linears[1::depth]
        width = -(-max(linear.product.padded_k for linear in second) // LANES) * LANES
        types = sorted({linear.dtype for linear in second} - {"float32"})
        prepared = {dtype: workspace((rows, width), dtype) for dtype in types}
        return _Memory(hidden, prepared, workspace((rows,), "float32"), weight, products)

    def _task(
        self, own: Sequence[Linear], queues: ExpertQueues, memory: _Memory, place: Any, some: Any
    ) -> None:
        """Emits an expert's linears on some tokens of its queue, one after the other."""
        if self.router:
            queues.weights(place, some, memory.weight)
        for linear in own:
            is_first, is_last = linear is own[0], linear is own[-1]
            inputs, first, scale = queues.prepared[linear.dtype], place, queues.scale
            if not is_first:
                inputs, first = _read_hidden(linear, memory, some), tirx.const(0, "int32")
                scale = memory.row_scale
            rows = Rows(
                inputs,
                first,
                some,
                self.sizes.task_rows,
                linear.tile_rows,
                self.fit,
                partial(_from, scale, first) if "quantise" in linear.fused else None,
                self.activation if is_first else None,
                memory.weight.__getitem__ if is_last and self.router else None,
            )
            write = partial(_keep, memory)
            if is_last:
                write = partial(self._write, linear, queues, place)
            with (
                panel_rows.at_work(linear.product),
                T.serial(0, linear.product.panels) as panel,
            ):
                finish = partial(write, panel)
                panel_rows.multiply(linear.product, memory.products, rows, panel, finish)

    def _write(
        self, linear: Linear, queues: ExpertQueues, place: Any, panel: Any, slot: Any, vectors: Any
    ) -> None:
        row = held(queues.token[place + slot])
        store_row(self.out, self.residual, row, panel, linear.product.n, vectors)


def _from(buffer: Any, first: Any, slot: Any) -> Any:
    return buffer[first + slot]


def _read_hidden(linear: Linear, memory: _Memory, some: Any) -> Any:
    product, hidden = linear.product, memory.hidden
    if product.unit.group == 1:
        return hidden
    prepared = memory.prepared[linear.dtype]
    with T.serial(0, some) as slot:
        prepare_row(hidden, slot, product.k, linear.fused, None, prepared, slot, memory.row_scale)
    return prepared


def _keep(memory: _Memory, panel: Any, slot: Any, vectors: list[Any]) -> None:
    for v, vector in enumerate(vectors):
        T.buffer_store(memory.hidden, vector, [slot, at(panel * PANEL + v * LANES, LANES)])

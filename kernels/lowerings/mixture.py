"""A mixture of experts from its layer norm to the residual in one program, or one expert alone.

A task is some tokens of one expert. Its thread takes them through all of the expert's linears,
so that what lies between them never leaves its caches, and waits for no other: threads meet once
behind the router and once at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.forms import FORMS, quantises
from kernels.lowerings import amx, panel_rows
from kernels.lowerings.activations import copy_row, normalised, prepare_row, quantise_row
from kernels.lowerings.arithmetic import fastest
from kernels.lowerings.emit import LANES, argument, at, local, program, rows_of, workspace
from kernels.lowerings.gelu import gelu
from kernels.lowerings.panel_product import PREPARED, PanelProduct, Rows, store_row
from kernels.lowerings.routing import Order, choose
from kernels.packing import PANEL
from kernels.targets import KernelTarget


@dataclass(frozen=True)
class Sizes:
    """What a mixture's program is built for.

    Attributes:
        task_rows: Tokens of a task.
        tile_rows: Of them, as many at a time as vector registers hold sums of.
        k: Features of a token.
        widths: Outputs of each of an expert's linears, one or two, in turn.
        forms: Of the linears, those of the first expert first.
        layer_norm: Whether x is normalised first.
        gelu: Whether there is one behind an expert's first linear.
        residual: Whether something is added to the result.
    """

    task_rows: int
    tile_rows: int
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

    @property
    def all_quantise(self) -> bool:
        """Whether every expert reads codes."""
        return all(quantises(form) for form in self.forms[:: len(self.widths)])


@dataclass(frozen=True)
class _Linear:
    """One of an expert's linears, and what it does beside its product."""

    product: PanelProduct
    fused: tuple[str, ...]


@dataclass(frozen=True)
class Tokens:
    """What the tasks read.

    Attributes:
        x: Tokens, or codes of all of them.
        norm: Of tokens that are not normalised yet; None of others.
        scale: Of codes; None of tokens.
        order: Of the experts; None where there is one.
    """

    x: Any
    norm: Any = None
    scale: Any = None
    order: Order | None = None


@dataclass(frozen=True)
class Router:
    """Gates as arguments: ``(experts, k)`` and ``(experts,)``."""

    gate: Any
    bias: Any

    @classmethod
    def declared(cls, sizes: Sizes) -> Router | None:
        """None where there is nothing to choose."""
        if sizes.experts == 1:
            return None
        gate = argument("gate", (sizes.experts, sizes.k), "float32")
        return cls(gate, argument("gate_bias", (sizes.experts,), "float32"))


@dataclass(frozen=True)
class _Memory:
    """A task's own: what lies between two linears, and inputs by type, with scales of the rows."""

    hidden: Any
    prepared: dict[str, Any]
    row_scale: Any
    products: amx.Workspace


def mixture(sizes: Sizes, target: KernelTarget) -> tirx.PrimFunc:
    """``main(x, [norm,] [gate, gate_bias,] w, [scale,] bias, [offset,] …, [residual,] out)``.

    Shapes: x ``(images, tokens, k)``; norm ``(2k + 1,)`` as for
    ``kernels.lowerings.activations.normalise_row``; gate ``(experts, k)`` and gate_bias
    ``(experts,)`` where there are several experts; for each linear what
    ``kernels.packing.pack_linear`` makes; residual and out ``(images, tokens, n)``.

    Each token passes through the expert that its router prefers, and is weighted by that one's
    probability; through a single expert without either. Where all experts quantise what they read,
    the router's pass over the tokens does it.

    Args:
        sizes: And forms.
        target: The CPU.
    """

    def declare(images: Any, tokens: Any) -> Callable[[], Tokens]:
        m, k = images * tokens, sizes.k
        given = argument("x", (images, tokens, k), "float32")
        norm = argument("norm", (2 * k + 1,), "float32") if sizes.layer_norm else None
        router = Router.declared(sizes)

        def emit() -> Tokens:
            x = rows_of(given)
            if router is None:
                return Tokens(x, norm)
            order = Order.workspace(m, sizes.experts)
            codes, scale = codes_of(m, k) if sizes.all_quantise else (None, None)
            with T.parallel(0, m) as token:
                source, row = normalised(x, token, k, norm)
                choose(source, row, k, router.gate, router.bias, order, token)
                if codes is not None:
                    quantise_row(source, row, k, codes, token, scale)
            order.finish()
            if codes is None:
                return Tokens(x, norm, None, order)
            return Tokens(codes, None, scale, order)

        return emit

    return through_experts(sizes, target, declare)


def codes_of(m: Any, k: int) -> tuple[Any, Any]:
    """Room for codes of all tokens and their scales."""
    codes = T.alloc_buffer((m, -(-k // LANES) * LANES), "uint8", scope="global")
    return codes, T.alloc_buffer((m,), "float32", scope="global")


def through_experts(
    sizes: Sizes, target: KernelTarget, declare: Callable[[Any, Any], Callable[[], Tokens]]
) -> tirx.PrimFunc:
    """A program that ends in experts: ``main(…, w, [scale,] bias, [offset,] …, [residual,] out)``.

    Args:
        sizes: And forms.
        target: The CPU.
        declare: ``declare(images, tokens)`` declares the arguments in front, and returns what emits
            the tokens.
    """
    arithmetic = {form: fastest(form, target) for form in sizes.forms}
    llvm = {unit.llvm for unit, _ in arithmetic.values() if unit.llvm}

    def body() -> None:
        images, each = T.int32(), T.int32()
        emit_tokens = declare(images, each)
        linears = []
        for place, form in enumerate(sizes.forms):
            step = place % len(sizes.widths)
            inputs, n = (sizes.k, *sizes.widths)[step], sizes.widths[step]
            fused = FORMS[form]["fused"]
            own = PanelProduct.declared(inputs, n, arithmetic[form], fused, f"_{place}")
            linears.append(_Linear(own, fused))
        shape = (images, each, sizes.widths[-1])
        added = argument("residual", shape, "float32") if sizes.residual else None
        out = argument("out", shape, "float32")
        tokens = emit_tokens()
        residual = None if added is None else rows_of(added)
        activation = gelu(target) if sizes.gelu else None
        experts = _Experts(sizes, linears, activation, tokens, residual, rows_of(out))
        _each_task(experts, images * each)

    return program(body, "\n".join(sorted(llvm)) or None)


def _each_task(experts: _Experts, m: Any) -> None:
    """Emits all tasks: one after the other those of the first expert, then the next one's."""
    sizes, order = experts.sizes, experts.tokens.order
    number, rows = sizes.experts, sizes.task_rows
    begin, tasks = local(number + 1, "int32"), local(number + 1, "int32")
    for limit in (begin, tasks):
        T.buffer_store(limit, tirx.const(0, "int32"), [0])
    for expert in range(number):
        count = m if order is None else order.counts[expert]
        T.buffer_store(begin, begin[expert] + count, [expert + 1])
        own = tirx.floordiv(count + (rows - 1), rows)
        T.buffer_store(tasks, tasks[expert] + own, [expert + 1])
    with T.parallel(0, tasks[number]) as task:
        memory = experts.memory()
        for expert in range(number):
            mine = tirx.And(task >= tasks[expert], task < tasks[expert + 1])
            with T.If(mine), T.Then():
                first = _held(begin[expert] + (task - tasks[expert]) * rows)
                some = _held(tirx.min(begin[expert + 1] - first, tirx.const(rows, "int32")))
                experts.emit(expert, memory, first, some)


def _held(value: Any) -> Any:
    """A number that is computed once."""
    held = local(1, "int32")
    T.buffer_store(held, value, [0])
    return held[0]


@dataclass(frozen=True)
class _Experts:
    """Their linears, what follows the first, what they read and where the last of them writes."""

    sizes: Sizes
    linears: Sequence[_Linear]
    activation: Callable[[Any], Any] | None
    tokens: Tokens
    residual: Any
    out: Any

    def memory(self) -> _Memory:
        """Emits a task's own."""
        rows, products = self.sizes.task_rows, [linear.product for linear in self.linears]
        width = -(-max(product.padded_k for product in products) // LANES) * LANES
        hidden = None
        if len(self.sizes.widths) > 1:
            padded = -(-self.sizes.widths[0] // PANEL) * PANEL
            hidden = T.alloc_buffer((rows, padded), "float32", scope="global")
        types = sorted({PREPARED[product.unit.group][0] for product in products})
        prepared = {name: workspace((rows, width), name) for name in types}
        return _Memory(hidden, prepared, local(rows), panel_rows.workspace(products))

    def emit(self, expert: int, memory: _Memory, first: Any, some: Any) -> None:
        """Emits an expert: its linears on some tokens from the first on, one after the other."""
        depth = len(self.sizes.widths)
        own = self.linears[expert * depth :][:depth]
        for linear in own:
            is_first, is_last = linear is own[0], linear is own[-1]
            if is_first:
                inputs = self._read(linear, memory, first, some)
            else:
                inputs = _read_hidden(linear, memory, some)
            rows = Rows(
                inputs,
                tirx.const(0, "int32"),
                some,
                self.sizes.task_rows,
                self.sizes.tile_rows,
                memory.row_scale.__getitem__ if "quantise" in linear.fused else None,
                self.activation if is_first else None,
                self._weight(first) if is_last else None,
            )
            write = partial(self._write, linear, first) if is_last else partial(_keep, memory)
            with (
                panel_rows.at_work(linear.product),
                T.serial(0, linear.product.panels) as panel,
            ):
                finish = partial(write, panel)
                panel_rows.multiply(linear.product, memory.products, rows, panel, finish)

    def _read(self, linear: _Linear, memory: _Memory, first: Any, some: Any) -> Any:
        """Some tokens side by side, as a first linear reads them."""
        tokens, product = self.tokens, linear.product
        prepared = memory.prepared[PREPARED[product.unit.group][0]]
        with T.serial(0, some) as slot:
            row = _held(self._place(first + slot))
            if tokens.scale is None:
                prepare_row(
                    tokens.x,
                    row,
                    product.k,
                    linear.fused,
                    tokens.norm,
                    prepared,
                    slot,
                    memory.row_scale,
                )
            else:
                copy_row(tokens.x, row, product.padded_k, prepared, slot)
                T.buffer_store(memory.row_scale, tokens.scale[row], [slot])
        return prepared

    def _place(self, token: Any) -> Any:
        order = self.tokens.order
        return token if order is None else order.rows[token]

    def _weight(self, first: Any) -> Callable[[Any], Any] | None:
        order = self.tokens.order
        return None if order is None else lambda slot: order.probability[first + slot]

    def _write(
        self, linear: _Linear, first: Any, panel: Any, slot: Any, vectors: list[Any]
    ) -> None:
        row = _held(self._place(first + slot))
        store_row(self.out, self.residual, row, panel, linear.product.n, vectors)


def _read_hidden(linear: _Linear, memory: _Memory, some: Any) -> Any:
    product, hidden = linear.product, memory.hidden
    if product.unit.group == 1:
        return hidden
    prepared = memory.prepared[PREPARED[product.unit.group][0]]
    with T.serial(0, some) as slot:
        prepare_row(hidden, slot, product.k, linear.fused, None, prepared, slot, memory.row_scale)
    return prepared


def _keep(memory: _Memory, panel: Any, slot: Any, vectors: list[Any]) -> None:
    for v, vector in enumerate(vectors):
        T.buffer_store(memory.hidden, vector, [slot, at(panel * PANEL + v * LANES, LANES)])

"""Routes tokens to experts: the gate, its softmax, the choice, and the tokens in its order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.lowerings.activations import normalised
from kernels.lowerings.emit import (
    argument,
    at,
    fill,
    local,
    program,
    row_totals,
)
from kernels.lowerings.exponential import exponential
from kernels.targets import KernelTarget


def top1_routing(k: int, experts: int, layer_norm: bool, target: KernelTarget) -> tirx.PrimFunc:
    """``main(x, gate, bias, [norm,] rows, probability, counts)``.

    Shapes: x ``(m, k)``, gate ``(experts, k)``, bias ``(experts,)``, norm ``(2k + 1,)`` as for
    ``kernels.lowerings.activations.normalise_row``. Out come int32 rows ``(m,)``: the rows of
    expert 0 in rising order, then those of expert 1 and so on; fp32 probability ``(m,)``, of the
    expert that row ``rows[i]`` went to; and int32 counts ``(experts,)``.

    Args:
        k: Features of a token.
        experts: At least 2. The first of equally probable ones is chosen.
        layer_norm: Whether x is normalised before the gate.
        target: The CPU.
    """

    def body() -> None:
        m = T.int32()
        x, gate, bias, norm = _given(m, k, experts, layer_norm)
        order = Order(m, experts)
        with T.parallel(0, m) as token:
            source, row = normalised(x, token, k, norm)
            best, behind = choose(source, row, k, gate, bias)
            T.buffer_store(order.choice, best, [token])
            T.buffer_store(order.chosen, probability(behind, 1), [token])
        order.finish()

    return program(body)


def _given(m: Any, k: int, experts: int, layer_norm: bool) -> tuple[Any, Any, Any, Any]:
    return (
        argument("x", (m, k), "float32"),
        argument("gate", (experts, k), "float32"),
        argument("bias", (experts,), "float32"),
        argument("norm", (2 * k + 1,), "float32") if layer_norm else None,
    )


class Order:
    """The tokens in the order of their experts, as the last arguments of a kernel.

    Args:
        m: Tokens.
        experts: How many.
    """

    def __init__(self, m: Any, experts: int) -> None:
        self.m, self.experts = m, experts
        self.rows = argument("rows", (m,), "int32")
        self.probability = argument("probability", (m,), "float32")
        self.counts = argument("counts", (experts,), "int32")
        self.choice = T.alloc_buffer((m,), "int32", scope="global")
        self.chosen = T.alloc_buffer((m,), "float32", scope="global")

    def finish(self) -> None:
        """Emits a counting sort, which keeps the order of each expert's tokens."""
        after = local(self.experts, "int32")
        for expert in range(self.experts):
            T.buffer_store(after, tirx.const(0, "int32"), [expert])
        with T.serial(0, self.m) as token:
            choice = self.choice[token]
            T.buffer_store(after, after[choice] + 1, [choice])
        start = local(1, "int32")
        T.buffer_store(start, tirx.const(0, "int32"), [0])
        for expert in range(self.experts):
            T.buffer_store(self.counts, after[expert], [expert])
            T.buffer_store(after, start[0], [expert])
            T.buffer_store(start, start[0] + self.counts[expert], [0])
        with T.serial(0, self.m) as token:
            place = after[self.choice[token]]
            T.buffer_store(self.rows, token, [place])
            T.buffer_store(self.probability, self.chosen[token], [place])
            T.buffer_store(after, place + 1, [self.choice[token]])


def choose(x: Any, row: Any, k: int, gate: Any, bias: Any) -> tuple[Any, list[Any]]:
    """Emits the choice of one token: its expert, int32, and what ``probability`` needs of it.

    Args:
        x: fp32 ``(rows, k)``.
        row: Of x.
        k: Features.
        gate, bias: Of ``top1_routing``.
    """
    experts = int(gate.shape[0])
    logits, best, top = local(experts), local(1, "int32"), local(1)
    for expert, logit in enumerate(_logits(x, row, k, gate, bias)):
        T.buffer_store(logits, logit, [expert])
    T.buffer_store(best, tirx.const(0, "int32"), [0])
    T.buffer_store(top, logits[0], [0])
    for expert in range(1, experts):
        higher = logits[expert] > top[0]
        T.buffer_store(best, tirx.Select(higher, tirx.const(expert, "int32"), best[0]), [0])
        T.buffer_store(top, tirx.max(top[0], logits[expert]), [0])
    if experts == 2:
        return best[0], [tirx.min(logits[0], logits[1]) - top[0]]
    return best[0], [logits[expert] - top[0] for expert in range(experts)]


def remembered(experts: int) -> int:
    """How many numbers ``choose`` gives ``probability``: of two, only how far one is behind."""
    return 1 if experts == 2 else experts


def probability(behind: Sequence[Any], lanes: int) -> Any:
    """Emits the softmax of the chosen one, for as many tokens.

    Args:
        behind: Of ``choose``.
        lanes: Tokens side by side.
    """
    total = fill(T.float32(1 if len(behind) == 1 else 0), lanes)
    for logit in behind:
        total = total + exponential(logit, lanes)
    return fill(T.float32(1), lanes) / total


def _logits(x: Any, row: Any, k: int, gate: Any, bias: Any) -> list[Any]:
    def term(expert: int) -> Callable[[Any, int], Any]:
        return lambda offset, lanes: x[row, at(offset, lanes)] * gate[expert, at(offset, lanes)]

    experts = range(int(gate.shape[0]))
    totals = row_totals(k, [term(expert) for expert in experts])
    return [bias[expert] + total for expert, total in zip(experts, totals)]

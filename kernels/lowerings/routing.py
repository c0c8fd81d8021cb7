"""Routes tokens to experts: the gate, its softmax, the choice, and the tokens in its order."""

from __future__ import annotations

from typing import Any

import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.lowerings.activations import normalised
from kernels.lowerings.emit import LANES, argument, at, fill, lanes_total, local, program
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
        order = Order.arguments(m, experts)
        with T.parallel(0, m) as token:
            source, row = normalised(x, token, k, norm)
            choose(source, row, k, gate, bias, order, token)
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
    """The tokens in the order of their experts, as ``top1_routing`` has it.

    Args:
        m: Tokens.
        rows, probability, counts: Where it goes.
    """

    def __init__(self, m: Any, rows: Any, probability: Any, counts: Any) -> None:
        self.m, self.experts = m, int(counts.shape[0])
        self.rows, self.probability, self.counts = rows, probability, counts
        self.choice = T.alloc_buffer((m,), "int32", scope="global")
        self.chosen = T.alloc_buffer((m,), "float32", scope="global")

    @classmethod
    def arguments(cls, m: Any, experts: int) -> Order:
        """For a kernel whose last arguments it is."""
        return cls(
            m,
            argument("rows", (m,), "int32"),
            argument("probability", (m,), "float32"),
            argument("counts", (experts,), "int32"),
        )

    @classmethod
    def workspace(cls, m: Any, experts: int) -> Order:
        """For a kernel that goes on with it."""
        return cls(
            m,
            T.alloc_buffer((m,), "int32", scope="global"),
            T.alloc_buffer((m,), "float32", scope="global"),
            T.alloc_buffer((experts,), "int32", scope="global"),
        )

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


def choose(x: Any, row: Any, k: int, gate: Any, bias: Any, order: Order, token: Any) -> None:
    """Emits the choice of one token.

    Args:
        x: fp32 ``(rows, k)``.
        row: Of x.
        k: Features.
        gate, bias: Of ``top1_routing``.
        order: Takes the choice and its probability.
        token: Which one it is.
    """
    experts = order.experts
    whole, logits = k // LANES * LANES, local(experts)
    for expert in range(experts):
        _logit(x, row, gate, bias, expert, whole, k, logits)
    best, top, total = local(1, "int32"), local(1), local(1)
    T.buffer_store(best, tirx.const(0, "int32"), [0])
    T.buffer_store(top, logits[0], [0])
    for expert in range(1, experts):
        higher = logits[expert] > top[0]
        T.buffer_store(best, tirx.Select(higher, tirx.const(expert, "int32"), best[0]), [0])
        T.buffer_store(top, tirx.max(top[0], logits[expert]), [0])
    if experts == 2:
        # exp(0) of the chosen one needs no call.
        least = tirx.min(logits[0], logits[1])
        T.buffer_store(total, T.float32(1) + tirx.exp(least - top[0]), [0])
    else:
        T.buffer_store(total, T.float32(0), [0])
        for expert in range(experts):
            T.buffer_store(total, total[0] + tirx.exp(logits[expert] - top[0]), [0])
    T.buffer_store(order.choice, best[0], [token])
    T.buffer_store(order.chosen, T.float32(1) / total[0], [token])


def _logit(
    x: Any, row: Any, gate: Any, bias: Any, expert: int, whole: int, k: int, logits: Any
) -> None:
    sums = local(LANES)
    T.buffer_store(sums, fill(T.float32(0), LANES), [at(0, LANES)])
    with T.serial(0, whole // LANES) as c:
        where = at(c * LANES, LANES)
        value = sums[at(0, LANES)] + x[row, where] * gate[expert, where]
        T.buffer_store(sums, value, [at(0, LANES)])
    T.buffer_store(logits, bias[expert] + lanes_total(sums, LANES), [expert])
    for offset in range(whole, k):
        T.buffer_store(logits, logits[expert] + x[row, offset] * gate[expert, offset], [expert])

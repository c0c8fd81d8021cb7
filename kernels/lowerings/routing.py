"""Routes tokens to experts: the gate, its softmax, the choice, and the tokens in its order."""

from __future__ import annotations

from typing import Any

import tvm.script.ir_builder.tirx as T
from tvm import tirx

from kernels.lowerings.activations import normalise_row, quantise_row
from kernels.lowerings.emit import LANES, argument, at, fill, lanes_total, local, program
from kernels.packing import DOT_GROUP
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
        x = argument("x", (m, k), "float32")
        gate = argument("gate", (experts, k), "float32")
        bias = argument("bias", (experts,), "float32")
        norm = argument("norm", (2 * k + 1,), "float32") if layer_norm else None
        rows = argument("rows", (m,), "int32")
        probability = argument("probability", (m,), "float32")
        counts = argument("counts", (experts,), "int32")
        choice = T.alloc_buffer((m,), "int32", scope="global")
        chosen = T.alloc_buffer((m,), "float32", scope="global")

        with T.parallel(0, m) as token:
            source, row = x, token
            if norm is not None:
                source, row = normalise_row(x, token, k, norm), tirx.const(0, "int32")
            choose(source, row, k, gate, bias, experts, token, choice, chosen)

        _in_order(m, experts, choice, chosen, rows, probability, counts)

    return program(body)


def codes_and_choice(k: int, experts: int, layer_norm: bool, target: KernelTarget) -> tirx.PrimFunc:
    """``main(x, gate, bias, [norm,] codes, scale, choice, chosen)``: for experts that quantise.

    A token is normalised and quantised once, whichever expert it goes to.

    Shapes: x, gate, bias and norm as for ``top1_routing``; uint8 codes ``(m, padded)`` with k
    padded to whole groups, and fp32 scale ``(m,)``, of
    ``kernels.lowerings.activations.quantise_row``; choice and chosen ``(m,)`` as for ``choose``.

    Args:
        k: Features of a token.
        experts: At least 2.
        layer_norm: Whether x is normalised first.
        target: The CPU.
    """

    def body() -> None:
        m = T.int32()
        x = argument("x", (m, k), "float32")
        gate = argument("gate", (experts, k), "float32")
        bias = argument("bias", (experts,), "float32")
        norm = argument("norm", (2 * k + 1,), "float32") if layer_norm else None
        codes = argument("codes", (m, -(-k // DOT_GROUP) * DOT_GROUP), "uint8")
        scale = argument("scale", (m,), "float32")
        choice = argument("choice", (m,), "int32")
        chosen = argument("chosen", (m,), "float32")
        with T.parallel(0, m) as token:
            source, row = x, token
            if norm is not None:
                source, row = normalise_row(x, token, k, norm), tirx.const(0, "int32")
            choose(source, row, k, gate, bias, experts, token, choice, chosen)
            quantise_row(source, row, k, codes, token, scale)

    return program(body)


def tokens_in_order(experts: int, target: KernelTarget) -> tirx.PrimFunc:
    """``main(choice, chosen, rows, probability, counts)``: the rest, where others have chosen.

    Shapes: int32 choice and fp32 chosen ``(m,)`` as ``choose`` writes them, the others as for
    ``top1_routing``.

    Args:
        experts: At least 2.
        target: The CPU.
    """

    def body() -> None:
        m = T.int32()
        choice, chosen = argument("choice", (m,), "int32"), argument("chosen", (m,), "float32")
        rows = argument("rows", (m,), "int32")
        probability = argument("probability", (m,), "float32")
        counts = argument("counts", (experts,), "int32")
        _in_order(m, experts, choice, chosen, rows, probability, counts)

    return program(body)


def choose(
    x: Any,
    row: Any,
    k: int,
    gate: Any,
    bias: Any,
    experts: int,
    token: Any,
    choice: Any,
    chosen: Any,
) -> None:
    """Emits the choice of one token into ``choice[token]``, its probability into ``chosen``.

    Args:
        x: fp32 ``(rows, k)``.
        row: Of x.
        k: Features.
        gate, bias: Of ``top1_routing``.
        experts: At least 2.
        token: Where to write.
        choice: int32 ``(m,)``.
        chosen: fp32 ``(m,)``.
    """
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
    T.buffer_store(choice, best[0], [token])
    T.buffer_store(chosen, T.float32(1) / total[0], [token])


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


def _in_order(
    m: Any, experts: int, choice: Any, chosen: Any, rows: Any, probability: Any, counts: Any
) -> None:
    """A counting sort, which keeps the order of each expert's tokens."""
    after = local(experts, "int32")
    for expert in range(experts):
        T.buffer_store(after, tirx.const(0, "int32"), [expert])
    with T.serial(0, m) as token:
        T.buffer_store(after, after[choice[token]] + 1, [choice[token]])
    start = local(1, "int32")
    T.buffer_store(start, tirx.const(0, "int32"), [0])
    for expert in range(experts):
        T.buffer_store(counts, after[expert], [expert])
        T.buffer_store(after, start[0], [expert])
        T.buffer_store(start, start[0] + counts[expert], [0])
    with T.serial(0, m) as token:
        place = after[choice[token]]
        T.buffer_store(rows, token, [place])
        T.buffer_store(probability, chosen[token], [place])
        T.buffer_store(after, place + 1, [choice[token]])

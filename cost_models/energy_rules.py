"""How much of a modelled energy saving is arithmetic, and how much the rule for memory.

The energy model of the paper's release charges each primitive by a rule of its own: a layer is
tiled for one accelerator, and then the traffic of a dense product counts at 32 bits, that of a
shift at 10 bits, and an addition pays for no DRAM, buffer or network at all. Accumulations are
free. It is here to be compared with, never to be reported alone; this suite's own rule is
``operation_energy``.

    python -m cost_models.energy_rules --tokens 3136 --inputs 32 --outputs 256

Source: released code of ShiftAddViT (arXiv 2306.06446), its hardware model; the tiling is that of
an Eyeriss-like array, Chen et al., ISCA 2016.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from cost_models.operation_energy import MJ_PER_PJ, OperationEnergy, operation_energy
from kernels.forms import FORMS
from kernels.workload import Workload, linear
from profiler.command_line import run

app = typer.Typer(add_completion=False)

# What a multiply-accumulate is charged, in pJ; the accumulation of mult and shift is not.
RELEASED_PJ = {"mult": 3.7, "shift": 0.13, "add": 0.9}
ACCUMULATION_PJ = 0.9
# Width at which all three operands of a product move.
RELEASED_BITS = {"mult": 32, "shift": 10, "add": 32}


@dataclass(frozen=True)
class _Traffic:
    """What moving 16 bits costs, in pJ, by place. Weights pass twice through a register file."""

    dram: float = 200.0
    buffer: float = 22.2
    network: float = 7.4
    partial_sum: float = 3.7
    register: float = 3.7
    weight_register: float = 7.4


_DENSE_TRAFFIC = _Traffic()
_ADD_TRAFFIC = replace(_DENSE_TRAFFIC, dram=0.0, buffer=0.0, network=0.0)

# The accelerator: processing elements, words of its register files and of its buffer. Its 960 words
# for weights are never the limit: a tile has fewer than 16 × 12.
_ELEMENTS, _OUTPUTS, _INPUTS, _BUFFER = 192, 16, 12, 65536


@cache
def _divisors(size: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, size + 1) if size % d == 0)


def _factorisations(size: int, most: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All ordered ways to write a size as a product of factors up to these and one of any size."""
    if not most:
        return [(size,)]
    first = (d for d in _divisors(size) if d <= most[0])
    return [(d, *rest) for d in first for rest in _factorisations(size // d, most[1:])]


@cache
def _tiled_memory_mj(
    tokens: int, inputs: int, outputs: int, pj: float, bits: int, traffic: _Traffic
) -> float:
    """Energy of the traffic of a product under the tiling that the release chooses for it.

    Each loop is cut into levels: 0 register file, 1 array, 2 buffer, 3 DRAM. Of all tilings that
    fit, the one with the least sum of energy and latency, each against its own range, is taken.

    Args:
        tokens, inputs, outputs: The product.
        pj: Energy of a multiply-accumulate, which the choice depends on.
        bits: Width at which operands move.
        traffic: Cost by place.
    """
    m = np.array(_factorisations(outputs, (_OUTPUTS, _ELEMENTS, outputs)))
    c = np.array(_factorisations(inputs, (_INPUTS - 1, _ELEMENTS)))
    # Columns of each, against all of the other.
    m0, m1, m2, m3 = np.repeat(m, len(c), axis=0).T
    c0, c1, c2 = np.tile(c, (len(m), 1)).T
    most_tokens = (_BUFFER - 1) // (c1 * c0 + m2 * m1 * m0)
    fits = (m1 * c1 < _ELEMENTS) & (most_tokens >= 1)
    m0, m1, m2, m3, c0, c1, c2, most_tokens = (
        a[fits] for a in (m0, m1, m2, m3, c0, c1, c2, most_tokens)
    )
    # More tokens in the buffer never cost more, and take as long: of each tiling of the others, one
    # with as many as fit is the best, and one with a single token the worst.
    divisors = np.array(_divisors(tokens))
    n0 = divisors[np.searchsorted(divisors, most_tokens, side="right") - 1]
    x, w, out, macs = tokens * inputs, inputs * outputs, tokens * outputs, tokens * inputs * outputs

    def moved_pj(n3: NDArray[np.int64] | int) -> NDArray[np.float64]:
        return (bits / 16) * (
            traffic.dram * (m3 * x + n3 * w + out)
            + traffic.buffer * (m3 * m2 * x + np.maximum(2 * (c2 - 1), 1) * out)
            + traffic.network * (m3 * m2 * m1 * x + n3 * w)
            + traffic.partial_sum * np.maximum(c2 * (c1 - 1), 1) * out
            + traffic.register * (macs + np.maximum(2 * c2 * c1 * (c0 - 1), 1) * out)
            + traffic.weight_register * macs
        )

    least_pj, most_pj = moved_pj(tokens // n0), moved_pj(tokens)
    energy, worst = least_pj + pj * macs, float(most_pj.max()) + pj * macs
    latency = tokens * m3 * m2 * m0 * c2 * c0
    score = (energy - energy.min()) / worst + (latency - latency.min()) / latency.max()
    return float(least_pj[score.argmin()]) * MJ_PER_PJ


def released_energy(workload: Workload) -> OperationEnergy:
    """Modelled energy by the rules of the paper's release: another rule for each primitive.

    Both products of linear attention in one kernel are two products of the same size.
    """
    primitive = workload.primitive
    traffic = _ADD_TRAFFIC if primitive == "add" else _DENSE_TRAFFIC
    return _released(workload, RELEASED_BITS[primitive], traffic)


def released_with_equal_memory(workload: Workload) -> OperationEnergy:
    """The release's arithmetic, and for every primitive the traffic that it charges a dense one."""
    memory = _released(replace(workload, primitive="mult"), 32, _DENSE_TRAFFIC).memory_mj
    return OperationEnergy(released_energy(workload).compute_mj, memory)


def released_with_accumulations(workload: Workload) -> OperationEnergy:
    """As ``released_with_equal_memory``, and each multiplication and shift pays for its sum too."""
    energy = released_with_equal_memory(workload)
    if workload.primitive == "add":
        return energy
    sums_mj = workload.macs * ACCUMULATION_PJ * MJ_PER_PJ
    return OperationEnergy(energy.compute_mj + sums_mj, energy.memory_mj)


def _released(workload: Workload, bits: int, traffic: _Traffic) -> OperationEnergy:
    pj = RELEASED_PJ[workload.primitive]
    products = 2 if workload.kind == "attention" else 1
    memory_mj = products * _tiled_memory_mj(
        workload.b * workload.m, workload.k, workload.n, pj, bits, traffic
    )
    return OperationEnergy(workload.macs * pj * MJ_PER_PJ, memory_mj)


# By name, from the release's own to this suite's: each mends one thing of the one before.
RULES: dict[str, Callable[[Workload], OperationEnergy]] = {
    "released": released_energy,
    "equal_memory": released_with_equal_memory,
    "accumulations": released_with_accumulations,
    "stored_widths": operation_energy,
}
RULES_IN_WORDS = {
    "released": "the release's",
    "equal_memory": "equal memory rules",
    "accumulations": "+ accumulations",
    "stored_widths": "+ stored widths (ours)",
}


@dataclass(frozen=True)
class SavingUnderRule:
    """What one rule says that a form saves against the dense product.

    Attributes:
        rule: Name in RULES.
        dense, other: Modelled energy of either.
        saving: Share of the dense energy with memory that is saved, in percent.
        compute_saving: The same of arithmetic alone.
        made_up: Points of the saving that exist under this rule only and not under the next.
            Negative where the next rule finds more; None for the last rule.
    """

    rule: str
    dense: OperationEnergy
    other: OperationEnergy
    saving: float
    compute_saving: float
    made_up: float | None


def savings(dense: Workload, other: Workload) -> tuple[SavingUnderRule, ...]:
    """What a form saves against a dense product under each of RULES, in their order.

    Args:
        dense: The multiplication.
        other: What stands in for it.

    Raises:
        UnknownOperation: On a type whose operations have no published energy.
    """
    pairs = {name: (rule(dense), rule(other)) for name, rule in RULES.items()}
    percent = {
        name: 100 * (1 - new.with_memory_mj / old.with_memory_mj)
        for name, (old, new) in pairs.items()
    }
    following = dict(zip(RULES, [*list(RULES)[1:], None]))
    return tuple(
        SavingUnderRule(
            rule=name,
            dense=old,
            other=new,
            saving=percent[name],
            compute_saving=100 * (1 - new.compute_mj / old.compute_mj),
            made_up=None if (then := following[name]) is None else percent[name] - percent[then],
        )
        for name, (old, new) in pairs.items()
    )


def saving_table(dense: Workload, other: Workload) -> Table:
    """The savings for people, one line a rule."""
    table = Table(
        title=f"Modelled energy of {other.form} against {dense.form}, {dense.product}",
        caption="mJ with memory, arithmetic alone in brackets; saving with memory and of "
        "arithmetic alone; made up: points of saving that the next rule takes away. 45 nm, "
        "modelled",
        box=SIMPLE,
        padding=0,
    )
    table.add_column("rule", no_wrap=True)
    for heading in (dense.form, other.form, "saving, %", "arithmetic, %", "made up"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in savings(dense, other):
        table.add_row(
            RULES_IN_WORDS[one.rule],
            *(f"{e.with_memory_mj:.3f} ({e.compute_mj:.3f})" for e in (one.dense, one.other)),
            f"{one.saving:.1f}",
            f"{one.compute_saving:.1f}",
            "-" if one.made_up is None else f"{one.made_up:.1f}",
        )
    return table


@app.command(help=__doc__)
def main(
    tokens: Annotated[int, typer.Option(min=1, max=10**6, help="Rows of the product.")] = 3136,
    inputs: Annotated[int, typer.Option(min=1, max=10**5, help="Input features.")] = 32,
    outputs: Annotated[int, typer.Option(min=1, max=10**5, help="Output features.")] = 256,
) -> None:
    """Prints the savings of a shift and of an add under each rule."""
    console = Console(width=None if sys.stdout.isatty() else 100)
    dense = linear("mult_fp32", tokens, inputs, outputs)
    add = Workload(m=tokens, k=inputs, n=outputs, **FORMS["add_qkv_pm1"])
    console.print(saving_table(dense, linear("shift_fp32", tokens, inputs, outputs)))
    console.print(saving_table(dense, add))


if __name__ == "__main__":
    run(app)

"""What dispatching costs: a mixture of experts beside its experts alone, in turns.

The experts get as many tokens as the router sends them, but side by side in memory, and their
kernels are launched one by one on outputs that are there already. What the layer takes beyond that
is routing, and reading and writing tokens where they lie. Both are launched as a plan does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from rich.table import Table
from torch import Tensor

from kernels import expert_ops
from kernels.expert_ops import experts_kernel
from kernels.launches import repeated
from kernels.torch_ops import get_threads
from profiler.samples import TimingSettings
from profiler.timing import measure_interleaved
from reparam.deployed import DeployedLinear
from reparam.deployed_mlps import DeployedMoE
from reparam.forced_dispatch import force_share_
from reparam.plan import launches_of
from reparam.predicted_measured import Case, moe_sizes
from reparam.results import Interval


@dataclass(frozen=True)
class DispatchCost:
    """One size of layer.

    Attributes:
        layer: The first of its size.
        tokens: By expert.
        layer_ms, experts_ms: With everything, and of the experts' kernels alone; None if the
            machine was too busy.
        ratio: Of the two; less 1, the overhead of dispatching.
    """

    layer: str
    tokens: dict[str, int]
    layer_ms: Interval | None
    experts_ms: Interval | None
    ratio: Interval | None


@torch.no_grad()
def dispatch_costs(case: Case, share: float, settings: TimingSettings) -> Iterator[DispatchCost]:
    """Times each size of MoE layer in a deployed model.

    Args:
        case: The model and its example.
        share: Of the tokens that the last expert gets, 0 to 1.
        settings: How precisely.
    """
    for fqn, found, args, kwargs in moe_sizes(case):
        layer = copy.deepcopy(found)
        force_share_(layer, share, *args, **kwargs)
        counts, launches = _experts_alone(layer, *args, **kwargs)

        def alone(launches: list[Callable[[], None]] = launches) -> None:
            for launch in launches:
                launch()

        whole = launches_of(partial(layer, **kwargs), *args)
        timings = measure_interleaved({"layer": whole, "experts": alone}, settings)
        yield DispatchCost(
            layer=fqn,
            tokens=dict(zip(layer.experts, counts)),
            layer_ms=Interval.of_latency(timings["layer"]),
            experts_ms=Interval.of_latency(timings["experts"]),
            ratio=Interval.of_ratio(timings["layer"], timings["experts"]),
        )


def _experts_alone(
    layer: DeployedMoE, x: Tensor, residual: Tensor | None = None
) -> tuple[list[int], list[Callable[[], None]]]:
    """Tokens of each expert, and what launches its kernel on as many."""
    tokens = x.reshape(-1, x.shape[-1])
    counts = expert_ops.route(tokens, layer.norm, layer.gate, layer.gate_bias)[2].tolist()
    added = [None] * len(counts)
    if residual is not None:
        added = residual.reshape(len(tokens), -1).split(counts)
    depth = len(layer.linears) // len(counts)
    launches = [
        _launch(layer.linears[expert * depth :][:depth], part.contiguous(), last)
        for expert, (part, last) in enumerate(zip(tokens.split(counts), added))
        if len(part)
    ]
    return counts, launches


def _launch(
    linears: list[DeployedLinear], x: Tensor, residual: Tensor | None
) -> Callable[[], None]:
    first, sizes = linears[0], (x.shape[1], *(linear.out_features for linear in linears))
    forms = tuple(linear.form for linear in linears)
    there = (first.norm is not None, first.activated, residual is not None)
    kernel = experts_kernel("mixture", sizes, forms, get_threads(), *there)
    packed = [tensor for linear in linears for tensor in linear.packed]
    norm = [] if first.norm is None else [first.norm]
    added = [] if residual is None else [residual.contiguous()[None]]
    return repeated(kernel, x[None], *norm, *packed, *added, x.new_empty(1, len(x), sizes[-1]))


def dispatch_table(model: str, batch: int, costs: list[DispatchCost]) -> Table:
    """For people."""
    table = Table(
        title=f"{model}, batch {batch}: mixtures of experts beside their experts alone",
        caption="the experts' kernels on as many tokens side by side; intervals 95 %",
    )
    for heading in ("layer", "tokens", "layer ms", "experts ms", "dispatching takes"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for cost in costs:
        times = (cost.layer_ms, cost.experts_ms)
        table.add_row(
            cost.layer,
            " + ".join(str(number) for number in cost.tokens.values()),
            *("–" if time is None else f"{time.value:.3f}" for time in times),
            _overhead(cost.ratio),
        )
    return table


def _overhead(ratio: Interval | None) -> str:
    if ratio is None:
        return "the machine was too busy"
    low, value, high = (100 * (part - 1) for part in (ratio.low, ratio.value, ratio.high))
    return f"{value:+.0f} % ({low:+.0f} … {high:+.0f})"

"""Latency of a model as a differentiable function of where its routers send the tokens.

For each expert the latency table is asked at a grid of token counts; a monotone piecewise-linear
curve runs through the answers. Dispatch is a share of tokens by expert, so a curve for the
deployed batch serves a training batch of any size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import permutations
from typing import Literal

import numpy as np
import torch
from sklearn.isotonic import IsotonicRegression
from torch import Tensor, nn

from cost_models.overheads import LayerOverhead
from cost_models.work import expert_kernels, far_counts
from kernels.workload import Workload
from reparam.deploy import deploy
from reparam.expert_latency import Estimate, layer_workloads, undecided
from reparam.form_linear import FormLinear
from reparam.moe import MoEMlp, moe_layers
from reparam.watched_work import work_beside_experts

Schedule = Literal["sequential", "parallel"]

GRID_POINTS = 17


@dataclass(frozen=True)
class LayerCurves:
    """Latency of each expert of an MoE layer over the tokens that it gets.

    Attributes:
        tokens: Grid, ``(experts, points)``, rising from 0 to all tokens of the layer.
        latency_ms: At the grid, ``(experts, points)``, from 0 and never falling.
        schedule: ``sequential``: the experts run one after the other; ``parallel``: at once, and
            the layer takes as long as the slowest of them.
    """

    tokens: Tensor
    latency_ms: Tensor
    schedule: Schedule = "sequential"

    def expert_latency_ms(self, share: Tensor) -> Tensor:
        """Latency of each expert.

        Args:
            share: Of the layer's tokens by expert, ``(experts,)``.

        Returns:
            ``(experts,)``, with the gradient of the piece that the share lies on.
        """
        tokens = share * self.tokens[:, -1]
        inside = tokens.detach()[:, None].contiguous()
        last = self.tokens.shape[1] - 1
        right = torch.searchsorted(self.tokens, inside, right=True).clamp(1, last)
        (x0, x1), (y0, y1) = (
            (grid.gather(1, right - 1)[:, 0], grid.gather(1, right)[:, 0])
            for grid in (self.tokens, self.latency_ms)
        )
        return y0 + (y1 - y0) / (x1 - x0) * (tokens - x0)

    def layer_latency_ms(self, share: Tensor) -> Tensor:
        """Latency of the layer, a scalar."""
        each = self.expert_latency_ms(share)
        return each.sum() if self.schedule == "sequential" else each.max()


@dataclass(frozen=True)
class ModelCurves:
    """Latency of a model, or of its kernels, as a function of the dispatch.

    Attributes:
        layers: By qualified name of the MoE layer.
        rest_ms: What no dispatch changes: routers, converted layers outside of MoE and, where it
            was measured, what MoE layers take beside their kernels; or everything else that the
            deployed model does, where whole models were measured.
    """

    layers: Mapping[str, LayerCurves]
    rest_ms: float

    def to(self, device: torch.device) -> ModelCurves:
        """The same with its tensors on a device."""
        return replace(
            self,
            layers={
                fqn: replace(
                    layer,
                    tokens=layer.tokens.to(device),
                    latency_ms=layer.latency_ms.to(device),
                )
                for fqn, layer in self.layers.items()
            },
        )

    def model_latency_ms(self, shares: Mapping[str, Tensor]) -> Tensor:
        """Latency of the model, a scalar.

        Args:
            shares: By MoE layer, the share of its tokens of each expert, ``(experts,)``.
        """
        layers = [self.layers[fqn].layer_latency_ms(share) for fqn, share in shares.items()]
        return self.rest_ms + torch.stack(layers).sum()

    def expected_ms(self, shares: Mapping[str, Mapping[str, float]]) -> float:
        """The same of what ``reparam.accuracy.dispatch_shares`` has found."""
        dispatch = {fqn: torch.tensor(list(share.values())) for fqn, share in shares.items()}
        return float(self.to(torch.device("cpu")).model_latency_ms(dispatch))

    @cached_property
    def bounds_ms(self) -> tuple[float, float]:
        """The least and the largest latency that a dispatch can give the model.

        Looked for among the dispatches of whole tokens to one or two experts, all of them or
        1,000 evenly spread: of two experts there are no others.
        """
        found = [_pair_latencies(layer) for layer in self.layers.values()]
        low, high = sum(each.min() for each in found), sum(each.max() for each in found)
        return self.rest_ms + float(low), self.rest_ms + float(high)


def _pair_latencies(layer: LayerCurves) -> np.ndarray:
    """Latencies of a layer whose tokens are shared out between two of its experts."""
    tokens, latency_ms = layer.tokens.cpu().numpy(), layer.latency_ms.cpu().numpy()
    everything = tokens[0, -1]
    first = np.unique(np.round(np.linspace(0, everything, 1000)))
    combine = np.add if layer.schedule == "sequential" else np.maximum
    pairs = permutations(range(len(tokens)), 2)
    return np.concatenate(
        [
            combine(
                np.interp(first, tokens[one], latency_ms[one]),
                np.interp(everything - first, tokens[other], latency_ms[other]),
            )
            for one, other in pairs
        ]
    )


def latency_curves(
    model: nn.Module,
    lookup: Callable[[Workload], Estimate],
    example: Tensor,
    schedule: Schedule = "sequential",
    points: int = GRID_POINTS,
    overhead: LayerOverhead | None = None,
    whole: LayerOverhead | None = None,
) -> ModelCurves:
    """Asks a latency table for the curves of a model.

    Args:
        model: With MoE layers.
        lookup: ``LatencyTable.lookup``; raises on a workload that it cannot answer.
        example: Input of the model at the deployed batch.
        schedule: How the experts of a layer run.
        points: Of each grid, 0 tokens included.
        overhead: What a measured layer takes beside its kernels: ``LatencyTable.overhead``; None
            where none was fitted, then the curves are of the kernels alone.
        whole: Likewise of measured deployed models: with it the latency is that of the whole model.

    Raises:
        ValueError: If the model has no MoE layer.
    """

    asked = cache(lookup)
    around = whole or overhead
    factor = around.kernel_factor if around is not None else 1.0

    def expert_ms(linears: list[Workload]) -> float:
        kernels = (one for workload in linears for one in expert_kernels(workload, asked))
        return factor * _total_ms(kernels)

    all_tokens = {
        fqn: max(by_expert.values()) for fqn, by_expert in undecided(model, example).items()
    }
    if not all_tokens:
        raise ValueError("the model has no MoE layer")
    experts = {fqn: list(layer.experts) for fqn, layer in moe_layers(model)}

    def with_experts(which: slice) -> dict[str, list[Workload]]:
        """Workloads of each layer with all tokens at some experts; with none, its router alone."""
        dispatch = {
            fqn: dict.fromkeys(names[which], all_tokens[fqn]) for fqn, names in experts.items()
        }
        return layer_workloads(model, example, dispatch)

    fixed, layers = with_experts(slice(0)), {}
    most = max(map(len, experts.values()))
    by_expert = [with_experts(slice(expert, expert + 1)) for expert in range(most)]
    for fqn, names in experts.items():
        grid, routers = token_grid(all_tokens[fqn], points), len(fixed[fqn])
        latencies = [
            [
                expert_ms([workload.with_sizes(m=m) for workload in found[fqn][routers:]])
                for m in grid[1:]
            ]
            for found in by_expert[: len(names)]
        ]
        layers[fqn] = LayerCurves(
            torch.tensor(grid, dtype=torch.float32).expand(len(names), -1).contiguous(),
            torch.tensor(np.stack([_monotone(grid, each) for each in latencies])).float(),
            schedule,
        )
    if whole is not None:
        work = work_beside_experts(deploy(copy.deepcopy(model).cpu()), example.cpu())
        return ModelCurves(layers, whole.latency_ms(_total_ms(work.kernels(asked)), work.counts))
    fixed_ms = {
        fqn: sum(asked(workload).latency_ms for workload in workloads)
        for fqn, workloads in fixed.items()
    }
    if overhead is not None:
        # Routing as it is deployed, in place of the product that it was looked up as. Which expert
        # gets a token does not matter here.
        for fqn, layer in moe_layers(model):
            routers, found = len(fixed[fqn]), by_expert[: len(experts[fqn])]
            weights = sum(w.weight_bytes for each in found for w in each[fqn][routers:])
            features = layer.router.gate.in_features + found[0][fqn][-1].n
            far = far_counts(weights, 4 * all_tokens[fqn] * features)
            fixed_ms[fqn] = overhead.latency_ms(0.0, _counts(fqn, layer, all_tokens[fqn]) | far)
    return ModelCurves(layers, sum(fixed_ms.values()))


def _total_ms(kernels: Iterable[tuple[int, Estimate]]) -> float:
    return sum(number * estimate.latency_ms for number, estimate in kernels)


def _counts(fqn: str, layer: MoEMlp, tokens: int) -> dict[str, float]:
    """What a layer does beside the products of its experts, in the names of COUNTS."""
    counts = {
        "calls": 1.0,
        "operators": 1.0,
        "routed": float(tokens * layer.router.gate.in_features),
        "routed_tokens": float(tokens),
    }
    linears = [part for part in layer.experts.modules() if isinstance(part, FormLinear | nn.Linear)]
    if len(linears) == 2 * len(layer.experts):
        # Between the two linears of an MLP lies its GELU.
        counts["activated"] = float(tokens * linears[0].out_features)
    if fqn.rpartition(".")[2] != "fc2":
        # Deployed it does the layer norm in front, which the second linear of an MLP has not.
        counts |= {"normalised": counts["routed"], "normalised_tokens": float(tokens)}
    return counts


def token_grid(tokens: int, points: int = GRID_POINTS) -> list[int]:
    """Token counts from 0 to all, dense where few tokens make a launch cost most.

    Args:
        tokens: All tokens of a layer.
        points: At most as many.
    """
    steps = np.geomspace(1, tokens, points - 1).round().astype(int)
    return [0, *sorted(set(steps.tolist()))]


def _monotone(tokens: list[int], latency_ms: list[float]) -> np.ndarray:
    """The closest curve that never falls; no tokens cost nothing."""
    rising = IsotonicRegression(y_min=0.0).fit_transform(tokens[1:], latency_ms)
    return np.concatenate([[0.0], rising])

"""Latency-aware losses: pure functions of a routing and of the experts' latencies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reparam.distributed import summed
from reparam.fake_quantise import straight_through
from reparam.latency_curves import ModelCurves
from reparam.moe import MoEMlp, Routing, moe_layers

# Dispatch moves a little from image to image: the penalty ends this far below the budget.
AIM = 0.99
MOST_DOUBLINGS = 10


@dataclass(frozen=True)
class LatencyObjective:
    """What the routers are asked for beside the task.

    Attributes:
        weight: Of the loss; against a budget, the weight to start with.
        curves: For the expected latency; None for the paper's latency-aware balance.
        budget_ms: What the expected latency shall not exceed; None to have it as low as can be.
        as_dispatched: Whether the balance is of the dispatch without noise.
    """

    weight: float
    curves: ModelCurves | None = None
    budget_ms: float | None = None
    as_dispatched: bool = False


def latency_loss(model: nn.Module, objective: LatencyObjective) -> Tensor:
    """The routers' loss of a model's last forward pass, unweighted, a scalar.

    Without a budget the expected latency is relative to the slowest dispatch.
    """
    if objective.curves is None:
        return model_latency_loss(model, objective.as_dispatched)
    expected = expected_latency_ms(model, objective.curves)
    if objective.budget_ms is None:
        return expected / objective.curves.bounds_ms[1]
    return budget_penalty(expected, AIM * objective.budget_ms)


def objective_weight(objective: LatencyObjective, expected_ms: Sequence[float]) -> float:
    """Weight of the routers' loss in the next epoch: doubled by each that missed the budget.

    It never falls again: within the budget the penalty is zero by itself. It depends on nothing
    but the history, so that a resumed run goes on alike.

    Args:
        objective: What is asked for.
        expected_ms: Expected latency at the end of each epoch so far.
    """
    if objective.budget_ms is None:
        return objective.weight
    misses = sum(latency_ms > objective.budget_ms for latency_ms in expected_ms)
    return objective.weight * 2.0 ** min(misses, MOST_DOUBLINGS)


def squared_cv(x: Tensor) -> Tensor:
    """Squared coefficient of variation, variance over squared mean, with the population variance.

    Args:
        x: ``(n,)``.

    Returns:
        A scalar, 0 exactly where all are equal.
    """
    return x.var(correction=0) / x.mean() ** 2


def latency_aware_loss(probabilities: Tensor, load: Tensor, expert_latency_ms: Tensor) -> Tensor:
    """Is 0 where the loads make all experts take equally long: ``SCV(α·Σp) + SCV(α·Σq)``.

    Args:
        probabilities: p ``(tokens, experts)``.
        load: q ``(tokens, experts)``, the probability of being top-1 under the router's noise.
        expert_latency_ms: ``(experts,)``, of each expert for the same tokens.

    Raises:
        ValueError: If a latency is not a positive number.

    Source:
        ShiftAddViT, arXiv 2306.06446, with α_i = Lat_i / Σ_j Lat_j.
    """
    alpha = _alpha(expert_latency_ms)
    importance, loads = summed(probabilities.sum(0)), summed(load.sum(0))
    return squared_cv(alpha * importance) + squared_cv(alpha * loads)


def optimal_share(expert_latency_ms: Tensor) -> Tensor:
    """Share of tokens of each expert at the minimum of the latency-aware loss.

    Args:
        expert_latency_ms: ``(experts,)``.

    Returns:
        ``(experts,)``, proportional to 1/α, adding up to 1.

    Raises:
        ValueError: If a latency is not a positive number.
    """
    inverse = 1 / _alpha(expert_latency_ms)
    return inverse / inverse.sum()


def load_as_dispatched(routing: Routing) -> Tensor:
    """Load by the choice without noise, with the gradient of the load under it.

    The paper's load is balanced when a token is as likely to win either expert *under the noise*.
    A deployed router has none: of tokens whose logits lie closer than the noise all may then go to
    one expert.

    Args:
        routing: Of one forward pass.

    Returns:
        ``(tokens, experts)``, of zeros and ones.
    """
    experts = torch.arange(routing.load.shape[-1], device=routing.load.device)
    chosen = routing.probabilities.argmax(dim=-1, keepdim=True) == experts
    return straight_through(routing.load, chosen.to(routing.load))


def model_latency_loss(model: nn.Module, as_dispatched: bool = False) -> Tensor:
    """Mean of the latency-aware loss over a model's MoE layers, for its last forward pass.

    Args:
        model: With MoE layers.
        as_dispatched: Whether the load is of the choice without noise.

    Raises:
        ValueError: If there is no MoE layer, or one has no latencies or was not run yet.
    """
    losses = []
    for fqn, layer in moe_layers(model):
        routing = _routing(fqn, layer)
        if layer.expert_latency_ms.isnan().any():
            raise ValueError(f"{fqn}: expert_latency_ms is not set")
        load = load_as_dispatched(routing) if as_dispatched else routing.load
        losses.append(latency_aware_loss(routing.probabilities, load, layer.expert_latency_ms))
    if not losses:
        raise ValueError("the model has no MoE layer")
    return torch.stack(losses).mean()


def dispatched_share(routing: Routing) -> Tensor:
    """Share of the tokens that the deployed router sends to each expert; it has no gradient.

    Args:
        routing: Of one forward pass; in several processes, of this one's rows.

    Returns:
        ``(experts,)``, adding up to 1.
    """
    return _share(load_as_dispatched(routing).detach())


def share_under_noise(routing: Routing) -> Tensor:
    """Share of the tokens that each expert is expected to win under the router's noise, Σq.

    Args:
        routing: Of one forward pass; in several processes, of this one's rows.

    Returns:
        ``(experts,)``, adding up to 1, differentiable.
    """
    return _share(routing.load)


def expected_latency_ms(model: nn.Module, curves: ModelCurves) -> Tensor:
    """What the curves say of a model's last forward pass, dispatched as deployed, a scalar in ms.

    Its gradient is that of the latency under the router's noise. Where all tokens go to one expert
    the curve of the other has the slope of its launch, and would keep the first token away.

    Args:
        model: With MoE layers that have been run.
        curves: Of ``reparam.latency_curves.latency_curves``, for the deployed batch.

    Raises:
        ValueError: If a layer was not run yet.
    """
    routings = {fqn: _routing(fqn, layer) for fqn, layer in moe_layers(model)}
    noisy, deployed = (
        curves.model_latency_ms({fqn: share(routing) for fqn, routing in routings.items()})
        for share in (share_under_noise, dispatched_share)
    )
    return straight_through(noisy, deployed)


def budget_penalty(latency_ms: Tensor, budget_ms: float) -> Tensor:
    """What a latency exceeds its budget by, relative to it; 0 within the budget.

    Args:
        latency_ms: A scalar.
        budget_ms: In ms.
    """
    return torch.relu(latency_ms / budget_ms - 1)


def _routing(fqn: str, layer: MoEMlp) -> Routing:
    if layer.routing is None:
        raise ValueError(f"{fqn}: has not been run yet")
    return layer.routing


def _share(load: Tensor) -> Tensor:
    tokens = summed(load.sum(0))
    return tokens / tokens.sum()


def _alpha(expert_latency_ms: Tensor) -> Tensor:
    if not (expert_latency_ms.isfinite() & (expert_latency_ms > 0)).all():
        raise ValueError(f"expert_latency_ms: must be positive, got {expert_latency_ms.tolist()}")
    return expert_latency_ms / expert_latency_ms.sum()

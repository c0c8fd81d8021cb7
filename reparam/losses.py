"""Latency-aware losses: pure functions of a routing and of the experts' latencies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reparam.moe import moe_layers


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
    return squared_cv(alpha * probabilities.sum(0)) + squared_cv(alpha * load.sum(0))


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


def model_latency_loss(model: nn.Module) -> Tensor:
    """Mean of the latency-aware loss over a model's MoE layers, for its last forward pass.

    Raises:
        ValueError: If there is no MoE layer, or one has no latencies or was not run yet.
    """
    losses = []
    for fqn, layer in moe_layers(model):
        if layer.routing is None:
            raise ValueError(f"{fqn}: has not been run yet")
        if layer.expert_latency_ms.isnan().any():
            raise ValueError(f"{fqn}: expert_latency_ms is not set")
        losses.append(
            latency_aware_loss(
                layer.routing.probabilities, layer.routing.load, layer.expert_latency_ms
            )
        )
    if not losses:
        raise ValueError("the model has no MoE layer")
    return torch.stack(losses).mean()


def _alpha(expert_latency_ms: Tensor) -> Tensor:
    if not (expert_latency_ms.isfinite() & (expert_latency_ms > 0)).all():
        raise ValueError(f"expert_latency_ms: must be positive, got {expert_latency_ms.tolist()}")
    return expert_latency_ms / expert_latency_ms.sum()

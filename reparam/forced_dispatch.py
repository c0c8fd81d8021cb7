"""Routers made to send a given share of the tokens to each of two experts, to time a dispatch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reparam.deployed_mlps import DeployedMoE
from reparam.moe import MoEMlp
from reparam.one_pass import watched


@torch.no_grad()
def force_share_(deployed: nn.Module, share: float, *inputs: Any, **named: Any) -> None:
    """Makes each router send a share of the example's tokens to the last expert.

    The gate becomes a random direction with the quantile of its products as the threshold: tokens
    are split by what they are, as a trained router does, and not in blocks.

    Args:
        deployed: With MoE layers of two experts, in one kernel or, where an expert is more than its
            linears, as they were trained.
        share: Of tokens for the second expert, 0 to 1.
        inputs, named: Of the model or layer.
    """
    generator = torch.Generator().manual_seed(0)
    directions: dict[nn.Module, Tensor] = {}
    seen: dict[nn.Module, list[Tensor]] = defaultdict(list)

    def aim(layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = layer.normalised(args[0]) if isinstance(layer, DeployedMoE) else args[0]
        tokens = x.flatten(0, -2)
        if layer not in directions:
            directions[layer] = torch.randn(tokens.shape[1], generator=generator)
        direction = directions[layer]
        # A layer may be called for some of the images at a time.
        seen[layer].append(tokens @ direction)
        products = torch.cat(seen[layer])
        if 0 < share < 1:
            threshold = float(products.quantile(1 - share))
        else:
            threshold = float(products.abs().max()) * 10 * (1 - 2 * share)
        gate = torch.stack((-direction, direction)) / 2
        bias = torch.tensor([threshold, -threshold]) / 2
        if isinstance(layer, DeployedMoE):
            layer.gate, layer.gate_bias = gate, bias
        elif isinstance(layer, MoEMlp):
            layer.router.gate.weight.copy_(gate)
            layer.router.gate.bias.copy_(bias)

    mixtures = (part for part in deployed.modules() if isinstance(part, DeployedMoE | MoEMlp))
    with watched(dict.fromkeys(mixtures, aim)):
        deployed(*inputs, **named)

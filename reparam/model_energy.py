"""Modelled energy of one inference, from the products of all its layers, converted or not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cost_models.operation_energy import operation_energy
from kernels.forms import FORMS
from kernels.workload import Workload, linear
from reparam.attention_structure import Product, trace
from reparam.expert_latency import layer_workloads
from reparam.quadratic_attention import CodeScores

COVERS = (
    "modelled: arithmetic and memory traffic of all linears, 1×1 convolutions among them, and"
    " attention products, no more"
)


def modelled_energy_mj(
    model: nn.Module,
    example: Tensor,
    expert_tokens: Mapping[str, Mapping[str, int]] | None = None,
) -> float:
    """Energy by operation counts, with memory, at 45 nm: good for ratios between models.

    Args:
        model: The original, or what conversion and training made of it; not the deployed form.
        example: One batch.
        expert_tokens: As in ``layer_workloads``.
    """
    converted = layer_workloads(model, example, expert_tokens)
    workloads = [workload for found in converted.values() for workload in found]
    for product in trace(model, example).products:
        # A name with a dot behind it: of what lies in a mixture of experts.
        if not any(f"{product.fqn}.".startswith(f"{fqn}.") for fqn in converted):
            workloads.append(_workload(product, model.get_submodule(product.fqn)))
    return sum(operation_energy(workload).with_memory_mj for workload in workloads)


def _workload(product: Product, within: nn.Module) -> Workload:
    """What a layer that no conversion reports is charged."""
    *batch, m, k = product.left
    *other, _, n = product.right
    if product.is_linear:
        return linear("mult_fp32", math.prod(batch) * m, k, n)
    sizes: dict[str, Any] = {"m": m, "k": k, "n": n}
    sizes["b"] = torch.broadcast_shapes(tuple(batch), tuple(other)).numel()
    if isinstance(within, CodeScores):
        return Workload(**sizes, **FORMS[f"add_qkv_{within.alphabet}"])
    return Workload(primitive="mult", w_layout="kn", **sizes)

"""Modelled energy of one inference, from the products of all its layers, converted or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from cost_models.operation_energy import operation_energy
from kernels.workload import Workload, linear
from reparam.add_attention import AddAttention, is_softmax_attention
from reparam.expert_latency import layer_workloads
from reparam.moe import MoEMlp

COVERS = "modelled: arithmetic and memory traffic of all linears and attention products, no more"


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
    workloads = [*_unconverted(model, example)]
    for found in layer_workloads(model, example, expert_tokens).values():
        workloads += found
    return sum(operation_energy(workload).with_memory_mj for workload in workloads)


def softmax_attention(b: int, tokens: int, keys: int, head_dim: int) -> tuple[Workload, Workload]:
    """The two fp32 products of softmax attention: QKᵀ and (softmax)V.

    Args:
        b: Batch × heads.
        tokens, keys: Queries and keys of a sequence.
        head_dim: Features of a head.
    """
    sizes: dict[str, Any] = {"primitive": "mult", "b": b, "w_layout": "kn"}
    return (
        Workload(m=tokens, k=head_dim, n=keys, **sizes),
        Workload(m=tokens, k=keys, n=head_dim, **sizes),
    )


@torch.no_grad()
def _unconverted(model: nn.Module, example: Tensor) -> list[Workload]:
    """Workloads of the plain linears and softmax attentions outside converted layers."""
    found: list[Workload] = []
    inside = tuple(
        f"{fqn}." for fqn, part in model.named_modules() if isinstance(part, AddAttention | MoEMlp)
    )

    def see_linear(module: Any, inputs: tuple[Tensor, ...]) -> None:
        tokens = inputs[0].shape[:-1].numel()
        found.append(linear("mult_fp32", tokens, module.in_features, module.out_features))

    def see_attention(module: Any, inputs: tuple[Tensor, ...]) -> None:
        batch, tokens, width = inputs[0].shape
        # PVT's spatial reduction divides both sides of the image for the keys.
        keys = max(1, tokens // int(getattr(module, "sr_ratio", 1)) ** 2)
        heads = module.num_heads
        found.extend(softmax_attention(batch * heads, tokens, keys, width // heads))

    handles = []
    for fqn, part in model.named_modules():
        see: Callable | None = None
        if type(part) is nn.Linear and not fqn.startswith(inside):
            see = see_linear
        elif is_softmax_attention(part):
            see = see_attention
        if see is not None:
            handles.append(part.register_forward_pre_hook(see))
    training = model.training
    try:
        model.eval()(example)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return found

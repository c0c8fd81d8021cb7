"""Modelled energy of one inference, from the products of all its layers, converted or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from cost_models.operation_energy import operation_energy
from kernels.workload import Workload, linear
from reparam.add_attention import AddAttention, is_softmax_attention
from reparam.expert_latency import input_shapes, layer_workloads
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


def _unconverted(model: nn.Module, example: Tensor) -> list[Workload]:
    """Workloads of the plain linears and softmax attentions outside converted layers."""
    inside = tuple(
        f"{fqn}." for fqn, part in model.named_modules() if isinstance(part, AddAttention | MoEMlp)
    )

    def is_unconverted(fqn: str, part: nn.Module) -> bool:
        plain = type(part) is nn.Linear and not fqn.startswith(inside)
        return plain or is_softmax_attention(part)

    found: list[Workload] = []
    for fqn, (shape, *_) in input_shapes(model, example, is_unconverted).items():
        part: Any = model.get_submodule(fqn)
        if isinstance(part, nn.Linear):
            tokens = shape[:-1].numel()
            found.append(linear("mult_fp32", tokens, part.in_features, part.out_features))
            continue
        batch, tokens, width = shape
        # PVT's spatial reduction divides both sides of the image for the keys.
        keys = max(1, tokens // int(getattr(part, "sr_ratio", 1)) ** 2)
        found.extend(
            softmax_attention(batch * part.num_heads, tokens, keys, width // part.num_heads)
        )
    return found

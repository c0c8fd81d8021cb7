"""Linear attention without codes: what add attention gives up, seen apart from being linear."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from kernels.workload import Workload
from reparam.add_attention import AddAttention, is_softmax_attention
from reparam.convert import Conversion, ConversionError
from reparam.expert_latency import input_shapes


class LinearProducts(nn.Module):
    """``q·(kᵀ·v)`` of fp32 queries and keys, of length √bits as ``AddProducts``' codes are."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As ``AddProducts``: q, k ``(b, tokens, bits)``, v ``(b, tokens, n)``."""
        length = math.sqrt(q.shape[-1])
        q, k = F.normalize(q, dim=-1) * length, F.normalize(k, dim=-1) * length
        return q @ (k.transpose(1, 2) @ v)


class LinearAttention(AddAttention):
    """Linear-angular attention with real queries and keys; all its products are multiplications."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.add_products = LinearProducts()


def linearise_(model: nn.Module) -> Conversion:
    """Replaces each softmax attention by linear attention, in place.

    Raises:
        ConversionError: If the model has none that can be taken over.
    """
    found = {fqn: part for fqn, part in model.named_modules() if is_softmax_attention(part)}
    for fqn, part in found.items():
        try:
            model.set_submodule(fqn, LinearAttention.from_attention(part))
        except ValueError as error:
            raise ConversionError(f"{fqn}: {error}") from error
    if not found:
        raise ConversionError(f"linear attention: {type(model).__name__} has no softmax attention")
    return Conversion(dict.fromkeys(found, "linear attention, fp32"), {})


def linear_workloads(model: nn.Module, example: Tensor) -> list[Workload]:
    """The fp32 products of a model's linear attentions, which no conversion reports.

    Args:
        model: As ``linearise_`` left it.
        example: One batch.
    """
    shapes = input_shapes(model, example, lambda fqn, part: isinstance(part, LinearProducts))
    found = []
    for (b, tokens, bits), _, (_, _, n) in shapes.values():
        sizes = {"primitive": "mult", "b": b, "w_layout": "kn"}
        found.append(Workload(m=bits, k=tokens, n=n, **sizes))  # type: ignore[arg-type]
        found.append(Workload(m=tokens, k=bits, n=n, **sizes))  # type: ignore[arg-type]
    return found

"""Linear attention without codes: what add attention gives up, seen apart from being linear."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from reparam.add_attention import AddAttention
from reparam.convert import Conversion, FilterFn, ReparamConfig, reparameterize_


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


def linearise_(
    model: nn.Module, filter_fn: FilterFn | None = None, drop_bias: bool = False
) -> Conversion:
    """Makes linear, without codes, what ``reparameterize_`` would make add attention, in place.

    Args:
        model: A timm model.
        filter_fn: As for ``reparameterize_``.
        drop_bias: Whether position biases and window masks may be dropped.

    Raises:
        ConversionError: If the model has no attention that can be made linear.
    """
    originals = dict(model.named_modules())
    done = reparameterize_(model, ReparamConfig(attention="add", drop_bias=drop_bias), filter_fn)
    for fqn in done.converted:
        made: Any = model.get_submodule(fqn)
        if isinstance(made, AddAttention):
            model.set_submodule(fqn, LinearAttention.from_attention(originals[fqn]))
        else:
            made.core.add_products = LinearProducts()
    return Conversion(dict.fromkeys(done.converted, "linear attention, fp32"), done.skipped)

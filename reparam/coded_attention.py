"""CodedAttention: an attention of any class, its product of queries and keys computed by a core.

Everything else stays the attention's own: its linears and convolutions, windows, class tokens,
rotations, position biases and masks. Its parameters keep their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from reparam.attention_structure import FUSED, is_product, open_


class Core(Protocol):
    """What stands in for the products of an attention."""

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """Stands for ``scaled_dot_product_attention``, with its arguments."""

    def scores(self, q: Tensor, k_transposed: Tensor) -> Tensor:
        """Stands for ``q @ k_transposed``, of which the attention takes a softmax itself."""


class CodedAttention(nn.Module):
    """Marks an attention whose ``core`` computes its products. Made by ``with_core``.

    Attributes:
        core: A ``Core``.
        score_products: Which of the attention's own products of activations are scores, see
            ``AttentionTrace``; empty for the fused product.
    """

    core: nn.Module
    score_products: tuple[int, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The attention's own forward, on the products of the core."""
        with _Replaced(self.core, self.score_products):
            return super().forward(*args, **kwargs)


def with_core(
    attention: nn.Module, core: nn.Module, score_products: Sequence[int] = ()
) -> CodedAttention:
    """An attention with another core, which shares its parameters; it itself stays as it is.

    The result is of a class of its own, derived from the attention's: what looks for that class,
    or for an attribute of it, still finds it.

    Args:
        attention: Any module that ``attention_structure.trace`` found to be an attention.
        core: A ``Core``.
        score_products: As in ``CodedAttention``.
    """
    kind = type(attention)
    made: Any = kind.__new__(type(f"Coded{kind.__name__}", (CodedAttention, kind), {}))
    # The registries are copied, so that the core is added to the new module alone.
    made.__dict__ = {
        name: value.copy() if isinstance(value, dict) else value
        for name, value in attention.__dict__.items()
    }
    open_(made)
    made.core = core
    made.score_products = tuple(score_products)
    return made


class _Replaced(TorchFunctionMode):
    """While it is entered, products of queries and keys go to the core."""

    def __init__(self, core: Any, score_products: tuple[int, ...]) -> None:
        super().__init__()
        self.core, self.score_products, self.seen = core, score_products, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is FUSED and not self.score_products:
            return self._attend(*args, **kwargs)
        if is_product(func, args):
            self.seen += 1
            if self.seen - 1 in self.score_products:
                return self.core.scores(*_of_each_head(*args), **kwargs)
        return func(*args, **kwargs)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *rest: Any,
        enable_gqa: bool = False,
        **named: Any,
    ) -> Tensor:
        if enable_gqa:
            sharing = query.shape[-3] // key.shape[-3]
            key, value = (part.repeat_interleave(sharing, dim=-3) for part in (key, value))
        return self.core.attend(*_of_each_head(query, key, value), *rest, **named)


def _of_each_head(*parts: Tensor) -> list[Tensor]:
    """Gives each head keys and values of its own, where heads share them."""
    heads = torch.broadcast_shapes(*(part.shape[:-2] for part in parts))
    return [part.expand(*heads, *part.shape[-2:]) for part in parts]

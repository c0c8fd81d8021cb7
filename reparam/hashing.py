"""Binary codes of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reparam.fake_quantise import straight_through


def code_source(x: Tensor, alphabet: str) -> Tensor:
    """Shifts a query or key so that a code bit is set exactly where the result is above 0.

    The threshold of ±1 codes is 0, that of {0, 1} codes the mean over the features. Kernels know
    only ``> 0``: whatever the alphabet asks for beyond that is done here, in front of them.

    Args:
        x: ``(..., bits)``.
        alphabet: ``pm1`` or ``01``.
    """
    return x - x.mean(dim=-1, keepdim=True) if alphabet == "01" else x


def binarise(x: Tensor, alphabet: str) -> Tensor:
    """Binarises by the sign, with a clipped straight-through estimator.

    The backward pass is that of ``clamp(x, -1, 1)`` for ±1 codes and of ``clamp(x + 1/2, 0, 1)``
    for {0, 1} codes: no gradient where the code would have to leave its alphabet.

    Args:
        x: A ``code_source``, ``(..., bits)``.
        alphabet: ``pm1``: +1 where x > 0, else -1. ``01``: 1 where x > 0, else 0.

    Returns:
        The codes as floating point, ``(..., bits)``.

    Raises:
        ValueError: On another alphabet.

    Source:
        Binarized Neural Networks, arXiv 1602.02830.
    """
    if alphabet == "pm1":
        return straight_through(x.clamp(-1, 1), torch.where(x > 0, 1.0, -1.0).to(x.dtype))
    if alphabet == "01":
        return straight_through((x + 0.5).clamp(0, 1), (x > 0).to(x.dtype))
    raise ValueError(f"alphabet: {alphabet!r} is not one of pm1, 01")


class SignHash(nn.Module):
    """Plain binarisation: one bit for each feature.

    Args:
        alphabet: ``pm1`` or ``01``.
    """

    def __init__(self, alphabet: str) -> None:
        super().__init__()
        self.alphabet = alphabet

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Sources of the codes of queries and keys, see ``code_source``."""
        return code_source(q, self.alphabet), code_source(k, self.alphabet)

"""Quadratic attention on binary codes: each query compared with each key, for few tokens."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.hashing import SignHash, binarise

Similarity = Literal["softmax", "angular"]


class CodeScores(nn.Module):
    """Codes of queries times codes of keys, ``q·kᵀ``: sums of ±1, or of 1 and 0.

    Args:
        alphabet: ``pm1`` or ``01``.
    """

    def __init__(self, alphabet: str) -> None:
        super().__init__()
        self.alphabet = alphabet

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """Compares codes, not scaled.

        Args:
            q: Source of the query codes, fp32 ``(b, queries, bits)``; a bit is set where it is
                above 0.
            k: The same for the keys, ``(b, keys, bits)``.

        Returns:
            Whole numbers ``(b, queries, keys)``.
        """
        length = math.sqrt(q.shape[-1])
        q_codes = binarise(F.normalize(q, dim=-1) * length, self.alphabet)
        k_codes = binarise(F.normalize(k, dim=-1) * length, self.alphabet)
        return q_codes @ k_codes.transpose(-2, -1)

    def extra_repr(self) -> str:
        """Alphabet."""
        return f"alphabet={self.alphabet}"


def _mask_as_bias(attn_mask: Tensor | None, is_causal: bool, q: Tensor, k: Tensor) -> Tensor | None:
    """What a mask of ``scaled_dot_product_attention`` adds to the scores; None without one.

    Args:
        attn_mask: Of numbers, or true where a key is seen.
        is_causal: Whether a query sees no key of a later place.
        q, k: Queries and keys.
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
    if not is_causal:
        return attn_mask
    later = q.new_full((q.shape[-2], k.shape[-2]), -torch.inf).triu(1)
    return later if attn_mask is None else attn_mask + later


class QuadraticCore(nn.Module):
    """Attention over all pairs, queries and keys written in binary codes; keeps bias and mask.

    ``softmax``: the product of two codes, times the mean magnitude of the query's features and of
    the key's, stands for the product of query and key. ``angular``: the share of equal bits
    stands for the angle between them; a weight is that share, times e to the bias.

    Called, it is ``attend``, or ``scores`` where there are no values.

    Args:
        alphabet: ``pm1`` or ``01``.
        similarity: ``softmax`` or ``angular``.
        hashing: What the codes are made by; None for the signs of the features.

    Source:
        XNOR-Net, arXiv 1603.05279 (magnitudes); Charikar 2002 (equal bits and angle).
    """

    def __init__(
        self,
        alphabet: str = "pm1",
        similarity: Similarity = "softmax",
        hashing: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.similarity = similarity
        self.hashing: nn.Module = hashing or SignHash(alphabet)
        self.code_scores: nn.Module = CodeScores(alphabet)

    @property
    def alphabet(self) -> str:
        """Of the codes."""
        return str(self.hashing.alphabet)

    @property
    def is_plain(self) -> bool:
        """Whether it compares signs of features by a softmax: what a kernel computes."""
        return self.similarity == "softmax" and isinstance(self.hashing, SignHash)

    def attend(self, *given: Any, **named: Any) -> Tensor:
        """Stands for ``scaled_dot_product_attention``: ``(..., tokens, head_dim)``."""
        out: Tensor = self(*given, **named)
        return out

    def scores(self, q: Tensor, k_transposed: Tensor) -> Tensor:
        """Stands for ``q @ k_transposed``: ``(..., queries, keys)``."""
        out: Tensor = self(q, k_transposed.transpose(-2, -1))
        return out

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor | None = None,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """As ``scaled_dot_product_attention``; the scores as they are where there are no values."""
        if v is None:
            return self._scores(q, k)
        bias = _mask_as_bias(attn_mask, is_causal, q, k)
        return self._attended(q, k, v, bias, scale or q.shape[-1] ** -0.5, dropout_p)

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout_p: float
    ) -> Tensor:
        angular = self.similarity == "angular"
        scores = self._log_shares(q, k) if angular else self._scores(q, k) * scale
        scores = scores if bias is None else scores + bias
        return F.dropout(scores.softmax(dim=-1), dropout_p, training=dropout_p > 0) @ v

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        magnitudes = _magnitude(q) * _magnitude(k).transpose(-2, -1)
        codes, bits = self._codes(q, k)
        return codes * (magnitudes * (q.shape[-1] / bits))

    def _log_shares(self, q: Tensor, k: Tensor) -> Tensor:
        codes, bits = self._codes(q, k)
        shares = codes / bits if self.alphabet == "01" else (1 + codes / bits) / 2
        # Half a bit, where no bit is equal: a weight of zero has no logarithm.
        return shares.clamp_min(0.5 / bits).log()

    def _codes(self, q: Tensor, k: Tensor) -> tuple[Tensor, int]:
        q_source, k_source = self.hashing(q, k)
        batch, bits = q.shape[:-2], q_source.shape[-1]
        flat = (part.reshape(-1, *part.shape[-2:]) for part in (q_source, k_source))
        return self.code_scores(*flat).reshape(*batch, q.shape[-2], k.shape[-2]), bits


def _magnitude(x: Tensor) -> Tensor:
    return x.abs().mean(dim=-1, keepdim=True)

"""Kernelised hashing: codes whose similarity is fitted to an attention map.

A bit is the sign of a weighted sum of Gaussian kernels between a query or key and some anchors.
The weights are fitted bit by bit, so that pairs to which the attention map gives most get similar
codes, and those to which it gives least get dissimilar ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from reparam.one_pass import Hook, watch_pass

BITS, ANCHORS = 16, 25
TOP_PAIRS = 10
LEARNING_RATE, MOMENTUM, STEPS = 5e-4, 0.9, 100
# Tokens of a head that the pairs are drawn from: the fit costs their square.
_SAMPLES = 256


class KernelisedHash(nn.Module):
    """Codes of queries and keys by the same hash functions, one set for each head.

    Its parameters are buffers: they are in the state dict, and are refitted
    (``refit_hashing_``), not trained.

    Args:
        heads: Heads; 1 where they are not told apart from the batch.
        head_dim: Features of a query or key.
        alphabet: ``pm1`` or ``01``.
        bits: Bits of a code.
        anchors: Anchors of a head.

    Source:
        EcoFormer, arXiv 2209.09004; Liu et al., supervised hashing with kernels, CVPR 2012.
    """

    anchors: Tensor
    inverse_width: Tensor
    centre: Tensor
    weight: Tensor

    def __init__(
        self,
        heads: int,
        head_dim: int,
        alphabet: str = "pm1",
        bits: int = BITS,
        anchors: int = ANCHORS,
    ) -> None:
        super().__init__()
        self.alphabet, self.bits, self.heads = alphabet, bits, heads
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("anchors", torch.randn(heads, anchors, head_dim, generator=generator))
        self.register_buffer("inverse_width", torch.full((heads, 1, 1), 0.5 / head_dim))
        self.register_buffer("centre", torch.zeros(heads, 1, anchors))
        self.register_buffer("weight", torch.randn(heads, anchors, bits, generator=generator))

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Sources of the codes.

        Args:
            q: ``(..., heads, tokens, head_dim)``.
            k: The same, of as many or other tokens.

        Returns:
            Both ``(..., heads, tokens, bits)``; a bit is set where it is above 0.
        """
        return self._source(q), self._source(k)

    def _source(self, x: Tensor) -> Tensor:
        return (self.kernels(x) @ self.weight).reshape(*x.shape[:-1], self.bits)

    def kernels(self, x: Tensor) -> Tensor:
        """Centred kernels of each token and anchor, ``(b, heads, tokens, anchors)``."""
        x = x.reshape(-1, self.heads, *x.shape[-2:])
        # In this form, since cdist has no gradient where a token is an anchor.
        squares = x.square().sum(-1, keepdim=True) + self.anchors.square().sum(-1)[:, None]
        distances = (squares - 2 * x @ self.anchors.transpose(-2, -1)).clamp_min(0)
        return torch.exp(-self.inverse_width * distances) - self.centre

    @torch.no_grad()
    def fit_(self, q: Tensor, k: Tensor, seed: int = 0) -> None:
        """Fits anchors and weights to queries and keys, ``(..., heads, tokens, head_dim)``.

        Args:
            q: Queries; a sample of those of each head counts.
            k: Keys.
            seed: Of the sample and the start.
        """
        generator = torch.Generator().manual_seed(seed)
        q, k = (_sample(part, self.heads, generator) for part in (q.float(), k.float()))
        tokens = torch.cat([q, k], dim=2).transpose(0, 1).flatten(1, 2)
        count = self.anchors.shape[1]
        chosen = torch.randperm(tokens.shape[1], generator=generator)
        self.anchors.copy_(tokens[:, chosen.repeat(-(-count // len(chosen)))[:count]])
        distances = torch.cdist(tokens, self.anchors).square()
        self.inverse_width.copy_(1 / distances.mean((1, 2), keepdim=True).clamp_min(1e-12))
        self.centre.zero_()
        self.centre.copy_(self.kernels(tokens)[0].mean(1, keepdim=True))
        target = pair_targets(q @ k.transpose(-2, -1))
        self.weight.copy_(
            fitted_weight(self.kernels(q), self.kernels(k), target, self.bits, generator)
        )

    def extra_repr(self) -> str:
        """Sizes."""
        return f"heads={self.heads}, bits={self.bits}, anchors={self.anchors.shape[1]}"


def pair_targets(scores: Tensor, top: int = TOP_PAIRS) -> Tensor:
    """+1 for the pairs that a query attends to most, -1 for the least, 0 between.

    Args:
        scores: ``(..., queries, keys)``, of which the attention takes a softmax.
        top: Pairs of each kind for a query; at most half of the keys.
    """
    top = max(1, min(top, scores.shape[-1] // 2))
    target = torch.zeros_like(scores)
    target.scatter_(-1, scores.topk(top, largest=False).indices, -1.0)
    return target.scatter_(-1, scores.topk(top).indices, 1.0)


def fitted_weight(
    q: Tensor, k: Tensor, target: Tensor, bits: int, generator: torch.Generator
) -> Tensor:
    """Weights of the hash functions, one bit after the other, by gradient descent.

    Each bit is fitted to what the bits before it leave of ``bits * target``. The sign is relaxed
    to tanh, and the start is a random direction in which the kernels have unit variance.

    Args:
        q: Kernels of the queries, ``(images, heads, queries, anchors)``.
        k: Kernels of the keys, ``(images, heads, keys, anchors)``.
        target: ``pair_targets``, ``(images, heads, queries, keys)``.
        bits: Bits of a code.
        generator: Of the start.

    Returns:
        ``(heads, anchors, bits)``.
    """
    residual, counted = bits * target, target != 0
    both = torch.cat([q, k], dim=2).transpose(0, 1).flatten(1, 2)
    weights = []
    for _ in range(bits):
        start = torch.randn(*both.shape[::2], 1, generator=generator).to(q)
        weight = start / (both @ start).std(dim=1, keepdim=True).clamp_min(1e-6)
        momentum = torch.zeros_like(weight)
        for _ in range(STEPS):
            q_bit, k_bit = torch.tanh(q @ weight), torch.tanh(k @ weight)
            # Of Σ residual · q_bit · k_bitᵀ over the pairs, which is to become large.
            pull_q = (1 - q_bit.square()) * (residual @ k_bit)
            pull_k = (1 - k_bit.square()) * (residual.transpose(-2, -1) @ q_bit)
            pull = q.transpose(-2, -1) @ pull_q + k.transpose(-2, -1) @ pull_k
            momentum = MOMENTUM * momentum + pull.sum(0)
            weight = weight + LEARNING_RATE * momentum
        weights.append(weight)
        q_code, k_code = _sign(q @ weight), _sign(k @ weight)
        residual = residual - counted * (q_code @ k_code.transpose(-2, -1))
    return torch.cat(weights, dim=-1)


def refit_hashing_(model: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Fits all kernelised hash functions of a model to what it computes now.

    Queries and keys move in training, and the functions do not follow by themselves: call this
    from time to time.

    Args:
        model: Converted; left in the mode that it was in.
        example: Images to fit on.

    Returns:
        Qualified names of the hash functions; none if the model has no such attention.
    """
    hooks = fitting_hooks(model)
    watch_pass(model, example, hooks)
    return tuple(fqn for fqn, part in model.named_modules() if part in hooks)


def fitting_hooks(model: nn.Module) -> dict[nn.Module, Hook]:
    """Hooks that fit each hash function of a model to what it is about to be called with."""

    def fit(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        assert isinstance(module, KernelisedHash)
        module.fit_(*args, **kwargs)

    return {part: fit for part in model.modules() if isinstance(part, KernelisedHash)}


def _sample(x: Tensor, heads: int, generator: torch.Generator) -> Tensor:
    """Tokens of some images, ``(images, heads, tokens, head_dim)``."""
    x = x.reshape(-1, heads, *x.shape[-2:])
    tokens = min(x.shape[2], _SAMPLES)
    images = x[: max(1, _SAMPLES // tokens)]
    return images[:, :, torch.randperm(x.shape[2], generator=generator)[:tokens].to(x.device)]


def _sign(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1.0, -1.0)

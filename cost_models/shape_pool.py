"""Shapes worth measuring: low-discrepancy samples of what a latency model must answer for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.stats import qmc

from kernels.workload import Workload, attention, linear

# What the models are asked for: at most 20 GFLOP and 1 GiB.
MOST_MACS = 10**10
MOST_BYTES = 2**30
WIDTHS = (16, 4096)
MOST_TOKENS = 100_000
MOST_HEADS = 256
MOST_LENGTH = 16_384
# Widths of heads and codes; those between the powers of two let a model see how they count.
HEAD_WIDTHS = (16, 32, 64, 24, 48)
TOKENS_A_WIDTH = 4
# Of the widths, those that are no multiple of 16.
ODD_SHARE = 0.15


@dataclass(frozen=True)
class LinearGroup:
    """Some token counts of linears from ``k`` to ``n`` features."""

    k: int
    n: int
    tokens: tuple[int, ...]

    def workloads(self, form: str) -> list[Workload]:
        """Each token count in one form."""
        return [linear(form, m, self.k, self.n) for m in self.tokens]


@dataclass(frozen=True)
class AttentionGroup:
    """Some (batch × heads, tokens) of linear attention with codes of ``bits`` and values of n."""

    bits: int
    n: int
    sizes: tuple[tuple[int, int], ...]

    def workloads(self) -> list[Workload]:
        """Each size, both products in one."""
        return [attention(b, tokens, self.bits, self.n).both for b, tokens in self.sizes]


def linear_groups(seed: int = 0) -> Iterator[LinearGroup]:
    """Endless linears: widths log-uniform, mostly multiples of 16, tokens up to the limits."""
    sampler = qmc.Sobol(3 + TOKENS_A_WIDTH, seed=seed)
    while True:
        for point in sampler.random(64):
            k, n = (_width(u, point[2], i) for i, u in enumerate(point[:2]))
            most = min(MOST_TOKENS, MOST_MACS // (k * n), (MOST_BYTES - 4 * k * n) // (4 * (k + n)))
            tokens = {_log_uniform(u, 1, most) for u in _strata(point[3:])}
            yield LinearGroup(k, n, tuple(sorted(tokens)))


def attention_groups(seed: int = 0) -> Iterator[AttentionGroup]:
    """Endless linear attention: each pair of widths in turn, (heads, tokens) up to the limits."""
    pairs = sorted(
        ((bits, n) for bits in HEAD_WIDTHS for n in HEAD_WIDTHS),
        key=lambda pair: max(map(HEAD_WIDTHS.index, pair)),
    )
    sampler = qmc.Sobol(2, seed=seed)
    while True:
        for bits, n in pairs:
            sizes = set()
            for u, v in sampler.random(8):
                b = _log_uniform(u, 1, MOST_HEADS)
                most = min(
                    MOST_LENGTH,
                    MOST_MACS // (2 * b * bits * n),
                    MOST_BYTES // (8 * b * (bits + n)),
                )
                sizes.add((b, _log_uniform(v, 1, most)))
            yield AttentionGroup(bits, n, tuple(sorted(sizes)))


def _strata(points: np.ndarray) -> np.ndarray:
    """One position in each equal part of (0, 1): the tokens of a width spread out."""
    return (np.arange(len(points)) + points) / len(points)


def _log_uniform(position: float, low: int, high: int) -> int:
    return round(low * (max(low, high) / low) ** float(position))


def _width(position: float, kind: float, index: int) -> int:
    low, high = WIDTHS
    width = _log_uniform(position, low, high)
    odd = (kind * 2 + index * 0.5) % 1 < ODD_SHARE
    return width if odd else max(16, 16 * round(width / 16))

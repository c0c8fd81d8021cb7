"""Where ticks and labels go: pure arithmetic for plots."""

from __future__ import annotations

import math
from collections.abc import Sequence


def log_ticks(values: Sequence[float], most: int) -> tuple[tuple[float, float], list[float]]:
    """Limits around positive values and at most ``most`` round ticks between them."""
    low, high = min(values) / 1.25, max(values) * 1.25
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
        if len(ticks) <= most:
            break
    return (low, high), ticks[:: math.ceil(len(ticks) / most)] if ticks else [min(values)]


def plain_number(value: float) -> str:
    """A tick without an exponent: 0.05, 20, 3M."""
    for suffix, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.6f}".rstrip("0").rstrip(".") if value < 0.001 else f"{value:.3g}"


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Moves positions in [0, 1] apart until neighbours are ``gap`` apart, their order kept."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    placed: list[float] = []
    for index in order:
        placed.append(max(values[index], placed[-1] + gap) if placed else values[index])
    ceiling = 1.0
    for step in range(len(placed) - 1, -1, -1):
        placed[step] = min(placed[step], ceiling)
        ceiling = placed[step] - gap
    result = [0.0] * len(values)
    for position, index in zip(placed, order):
        result[index] = position
    return result

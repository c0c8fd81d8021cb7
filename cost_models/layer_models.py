"""Latency of whole layers and models from that of their kernels, and what the kernels leave out.

A layer is the sum of its kernels and an overhead: launches through Python, gathering and combining
tokens. The overhead is fitted on measured layers and models (rows of kind ``layer`` and ``model``),
deployed models and torch originals apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from cost_models.overheads import LayerOverhead, Tokens
from profiler.store import Measurement

_DETAILS: dict[str, tuple[str, ...]] = {
    "layer": ("model", "tokens", "kernel_ms"),
    "model": ("model", "layers", "kernels", "kernel_ms"),
}


@dataclass(frozen=True)
class _Row:
    model: str
    kernel_ms: float
    kernels: float
    tokens: float
    latency_ms: float


def fit_overheads(measurements: Iterable[Measurement]) -> tuple[LayerOverhead, ...]:
    """One overhead for each kind and lowering that has a measured row with the needed details."""
    groups: dict[tuple[str, str], list[_Row]] = {}
    for row in measurements:
        if row.latency_ms is None or any(
            row.details.get(name) is None for name in _DETAILS.get(row.kind, ("kind",))
        ):
            continue
        key = (row.kind, f"{row.lowering}")
        groups.setdefault(key, []).append(_narrowed(row))
    return tuple(_overhead(*key, rows) for key, rows in sorted(groups.items()))


def _narrowed(row: Measurement) -> _Row:
    details: Mapping[str, Any] = row.details
    experts = sum(name.startswith("tokens.") and bool(details[name]) for name in details)
    whole = row.kind == "model"
    assert row.latency_ms is not None
    return _Row(
        model=str(details["model"]),
        kernel_ms=float(details["kernel_ms"]),
        kernels=float(details["kernels"]) if whole else 1.0 + 2 * experts,
        tokens=float(details["layers" if whole else "tokens"]),
        latency_ms=row.latency_ms,
    )


def _overhead(kind: str, lowering: str, rows: Sequence[_Row]) -> LayerOverhead:
    launch, per_kernel, per_token = _costs(rows)
    names = sorted({row.model for row in rows})
    errors = [
        abs(_predicted(row, _costs([r for r in rows if r.model != name])) / row.latency_ms - 1)
        for name in names
        for row in rows
        if row.model == name and len(names) > 1
    ]
    return LayerOverhead(
        kind=kind,
        lowering=lowering,
        launch_ms=launch,
        per_kernel_ms=per_kernel,
        per_token_ms=per_token,
        rows=len(rows),
        models=len(names),
        mape=float(100 * np.mean(errors)) if errors else None,
    )


def _costs(rows: Sequence[_Row]) -> tuple[float, float, float]:
    """Non-negative least squares on the relative error of the latency."""
    weights = np.array([1 / row.latency_ms for row in rows])
    counts = np.array([(1.0, row.kernels, row.tokens) for row in rows]) * weights[:, None]
    left = np.array([row.latency_ms - row.kernel_ms for row in rows]) * weights
    scale = np.maximum(counts.max(axis=0), 1e-300)
    launch, per_kernel, per_token = (float(cost) for cost in nnls(counts / scale, left)[0] / scale)
    return launch, per_kernel, per_token


def _predicted(row: _Row, costs: tuple[float, float, float]) -> float:
    launch, per_kernel, per_token = costs
    return row.kernel_ms + launch + per_kernel * row.kernels + per_token * row.tokens


@dataclass(frozen=True)
class LatencyCurve:
    """Latency over a token count as straight pieces, 0 at none; never falls.

    Plain arithmetic: it takes a number, an array, or a torch tensor and then has a gradient.

    Attributes:
        knots: Token counts at which a piece begins, rising from 0.
        slopes_ms: Change of the slope at each knot, in ms a token.
    """

    knots: tuple[float, ...]
    slopes_ms: tuple[float, ...]

    def __call__(self, tokens: Tokens) -> Tokens:
        """Latency in ms of so many tokens, also of fractions of one."""
        return sum(
            change * _above(tokens - knot) for knot, change in zip(self.knots, self.slopes_ms)
        )


def _above(value: Tokens) -> Tokens:
    return (value + abs(value)) / 2


def latency_curve(latency_ms: Callable[[int], float], most: int) -> LatencyCurve:
    """A curve through a kernel's latency at powers of two and at the most tokens.

    Args:
        latency_ms: Latency of a whole number of tokens, such as a lookup in a table.
        most: Tokens of the layer.

    Raises:
        ValueError: If ``most`` is below 1.
    """
    if most < 1:
        raise ValueError(f"most: must be at least 1, got {most}")
    counts = sorted({min(2**power, most) for power in range(most.bit_length() + 1)})
    values = np.maximum.accumulate([latency_ms(count) for count in counts])
    knots: NDArray[np.float64] = np.array([0, *counts], dtype=float)
    slopes = np.diff(np.array([0.0, *values])) / np.diff(knots)
    changes = np.diff(np.array([0.0, *slopes]))
    return LatencyCurve(tuple(knots[:-1].tolist()), tuple(changes.tolist()))


@dataclass(frozen=True)
class MoELatency:
    """Latency of a mixture of experts as a function of its dispatch, for a router's loss.

    Attributes:
        router_ms: Of scoring all tokens.
        experts: One curve an expert: all of its kernels for so many tokens.
        overhead: Gather, combine and launches; None where none was fitted: then they are left out.
        kernels: Launches of the layer.
        parallel: Whether experts run at the same time, the slowest deciding, or one by one.
    """

    router_ms: float
    experts: tuple[LatencyCurve, ...]
    overhead: LayerOverhead | None = None
    kernels: int = 5
    parallel: bool = False

    def latency_ms(self, tokens: Sequence[Tokens]) -> Tokens:
        """Latency in ms of the layer with so many tokens for each expert.

        Args:
            tokens: A count for each expert: numbers, or tensors of the expected counts.
        """
        each = [curve(count) for curve, count in zip(self.experts, tokens, strict=True)]
        busy = each[0]
        for latency in each[1:]:
            busy = (busy + latency + abs(busy - latency)) / 2 if self.parallel else busy + latency
        kernel_ms = self.router_ms + busy
        if self.overhead is None:
            return kernel_ms
        return self.overhead.latency_ms(kernel_ms, self.kernels, sum(tokens))

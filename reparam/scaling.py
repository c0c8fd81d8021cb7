"""How attention grows with its tokens: add attention against softmax attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import kernels.layer_ops  # noqa: F401  registers torch.ops.shiftadd
from profiler.device import DeviceInfo
from profiler.samples import TimingSettings
from profiler.timing import measure_interleaved
from reparam.results import Interval

_FROZEN = ConfigDict(frozen=True, extra="forbid")

TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
HEADS, HEAD_DIM, WINDOW = 3, 64, 9
# Above this the matrix of all pairs would not fit the memory of a small machine.
_MOST_PAIRS = 4096**2
# Growth is fitted where the tokens outweigh what a launch costs.
_FIT_FROM = 1024


class ScalingRow(BaseModel):
    """One way of attention at one number of tokens.

    Attributes:
        way: ``add``, ``softmax`` (PyTorch's fused kernel) or ``softmax, matrix`` (all pairs).
        tokens: Sequence length.
        latency_ms: With its 95 % interval; None with a reason.
        peak_bytes: Largest sum of tensors that PyTorch held during the call beside its input, the
            result included; None with a reason.
        reason: Why a figure is missing.
    """

    model_config = _FROZEN

    way: str
    tokens: int
    latency_ms: Interval | None
    peak_bytes: int | None
    reason: str | None = None


class Scaling(BaseModel):
    """Schema of scaling.json: batch 1, 3 heads of 64 features, from queries, keys and values."""

    model_config = _FROZEN

    format: Literal["shiftadd-scaling"] = "shiftadd-scaling"
    version: Literal[1] = 1
    device: DeviceInfo
    command: str
    created_at: str
    heads: int = HEADS
    head_dim: int = HEAD_DIM
    rows: list[ScalingRow]

    def save(self, path: Path) -> None:
        """Writes scaling.json."""
        path.write_text(self.model_dump_json(indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Scaling:
        """Reads scaling.json.

        Raises:
            ValueError: If it is none of ours or of another version.
        """
        return cls.model_validate_json(path.read_text())

    def exponents(self) -> dict[str, float]:
        """By way: e of latency ~ tokens^e, least squares in the logarithms, from 1024 tokens on."""
        found = {}
        for way in dict.fromkeys(row.way for row in self.rows):
            points = [
                (math.log(row.tokens), math.log(row.latency_ms.value))
                for row in self.rows
                if row.way == way and row.latency_ms and row.tokens >= _FIT_FROM
            ]
            if len(points) > 1:
                mean_x = sum(x for x, _ in points) / len(points)
                mean_y = sum(y for _, y in points) / len(points)
                covariance = sum((x - mean_x) * (y - mean_y) for x, y in points)
                found[way] = covariance / sum((x - mean_x) ** 2 for x, _ in points)
        return found

    def table(self) -> Table:
        """For people: a line for each number of tokens."""
        ways = list(dict.fromkeys(row.way for row in self.rows))
        growth = ", ".join(f"{way} {e:.2f}" for way, e in self.exponents().items())
        table = Table(
            title=f"Attention, {self.heads} heads of {self.head_dim}: ms and MiB",
            caption=f"exponent of the growth from {_FIT_FROM} tokens on: {growth}",
        )
        table.add_column("tokens", justify="right")
        for way in ways:
            table.add_column(way, justify="right")
        by_place = {(row.tokens, row.way): row for row in self.rows}
        for tokens in dict.fromkeys(row.tokens for row in self.rows):
            table.add_row(str(tokens), *(_cell(by_place.get((tokens, way))) for way in ways))
        return table


def _cell(row: ScalingRow | None) -> str:
    if row is None or row.latency_ms is None or row.peak_bytes is None:
        return "–"
    return f"{row.latency_ms.value:.3f}, {row.peak_bytes / 2**20:.2f}"


def _heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    images, tokens, _ = qkv.shape
    q, k, v = qkv.view(images, tokens, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _fused(qkv: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*_heads(qkv)).transpose(1, 2).flatten(2)


def _matrix(qkv: Tensor) -> Tensor:
    q, k, v = _heads(qkv)
    weights = (q @ k.transpose(-1, -2) * HEAD_DIM**-0.5).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def measure_scaling(settings: TimingSettings, tokens: tuple[int, ...] = TOKENS) -> list[ScalingRow]:
    """Latency and memory of each way at each number of tokens, the ways in turns.

    All three go from the projection's output ``(1, tokens, 3 * dim)`` to ``(1, tokens, dim)``.
    """
    rows = []
    for number in tokens:
        qkv = torch.randn(1, number, 3 * HEADS * HEAD_DIM)
        conv = torch.randn(HEADS, WINDOW)

        def add(qkv: Tensor = qkv, conv: Tensor = conv) -> Tensor:
            return torch.ops.shiftadd.angular_attention(qkv, conv, "pm1")

        ways: dict[str, Callable[[], Tensor]] = {
            "add": add,
            "softmax": lambda qkv=qkv: _fused(qkv),  # type: ignore[misc]
        }
        if number**2 <= _MOST_PAIRS:
            ways["softmax, matrix"] = lambda qkv=qkv: _matrix(qkv)  # type: ignore[misc]
        with torch.no_grad():
            peaks = {way: _peak_bytes(launch) for way, launch in ways.items()}
            timings = measure_interleaved(dict(ways), settings)
        for way, timing in timings.items():
            low, high = timing.latency_low_ms, timing.latency_high_ms
            latency = None
            if timing.latency_ms is not None and low is not None and high is not None:
                latency = Interval(value=timing.latency_ms, low=low, high=high)
            rows.append(
                ScalingRow(
                    way=way,
                    tokens=number,
                    latency_ms=latency,
                    peak_bytes=peaks[way],
                    reason=timing.reason,
                )
            )
        if number**2 > _MOST_PAIRS:
            rows.append(
                ScalingRow(
                    way="softmax, matrix",
                    tokens=number,
                    latency_ms=None,
                    peak_bytes=None,
                    reason=f"the matrix of {number} × {number} pairs is not tried",
                )
            )
    return rows


def _peak_bytes(launch: Callable[[], Tensor]) -> int:
    """Largest sum of tensors alive at once during a call, from PyTorch's allocator events."""
    launch()
    with torch.profiler.profile(profile_memory=True) as profile:
        result = launch()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return max(peak, result.nbytes)

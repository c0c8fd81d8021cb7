"""How attention grows with its tokens: add attention against softmax attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import layer_ops
from profiler.samples import TimingSettings
from profiler.timing import measure_interleaved
from reparam.results import Interval
from reparam.scaling_result import HEAD_DIM, HEADS, ScalingRow

TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_WINDOW = 9
# Above this the matrix of all pairs would not fit the memory of a small machine.
_MOST_PAIRS = 4096**2


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
        conv = torch.randn(HEADS, _WINDOW)

        def add(qkv: Tensor = qkv, conv: Tensor = conv) -> Tensor:
            return layer_ops.angular_attention(qkv, conv, "pm1")

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
            rows.append(
                ScalingRow(
                    way=way,
                    tokens=number,
                    latency_ms=Interval.of_latency(timing),
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

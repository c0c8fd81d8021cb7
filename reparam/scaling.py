"""How attention grows with its tokens: add attention against softmax attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels import layer_ops
from profiler.samples import TimingSettings
from profiler.timing import measure_interleaved
from reparam.deployed import DeployedAddAttention
from reparam.results import Interval
from reparam.scaling_result import ScalingRow

TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_WINDOW = 9
# Above this the matrix of all pairs would not fit the memory of a small machine.
_MOST_PAIRS = 4096**2


def attention_sizes(deployed: nn.Module) -> tuple[int, int] | None:
    """Heads and features of a head of a model's first add attention; None if it has none."""
    for part in deployed.modules():
        if isinstance(part, DeployedAddAttention):
            heads = part.add_products.conv.shape[0]
            return heads, part.qkv.out_features // (3 * heads)
    return None


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    images, tokens, width = qkv.shape
    parts = qkv.view(images, tokens, 3, heads, width // (3 * heads))
    q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def _fused(qkv: Tensor, heads: int) -> Tensor:
    return F.scaled_dot_product_attention(*_heads(qkv, heads)).transpose(1, 2).flatten(2)


def _matrix(qkv: Tensor, heads: int) -> Tensor:
    q, k, v = _heads(qkv, heads)
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def measure_scaling(
    settings: TimingSettings, heads: int, head_dim: int, tokens: tuple[int, ...] = TOKENS
) -> list[ScalingRow]:
    """Latency and memory of each way at each number of tokens, the ways in turns.

    All three go from the projection's output ``(1, tokens, 3 * dim)`` to ``(1, tokens, dim)``.

    Args:
        settings: How precisely.
        heads, head_dim: Of the attention.
        tokens: Lengths of the sequence.
    """
    rows = []
    for number in tokens:
        qkv = torch.randn(1, number, 3 * heads * head_dim)
        conv = torch.randn(heads, _WINDOW)

        def add(qkv: Tensor = qkv, conv: Tensor = conv) -> Tensor:
            return layer_ops.angular_attention(qkv, conv, "pm1")

        ways: dict[str, Callable[[], Tensor]] = {
            "add": add,
            "softmax": lambda qkv=qkv: _fused(qkv, heads),  # type: ignore[misc]
        }
        if number**2 <= _MOST_PAIRS:
            ways["softmax, matrix"] = lambda qkv=qkv: _matrix(qkv, heads)  # type: ignore[misc]
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

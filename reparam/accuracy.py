"""What a model is worth: accuracy with its interval, and where its routers send the tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from reparam.data import Data
from reparam.moe import MoEMlp, moe_layers
from reparam.results import Interval


def device_of(model: nn.Module) -> torch.device:
    """Where a model's tensors are; the CPU for one without any."""
    tensors = chain(model.parameters(), model.buffers())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


@torch.no_grad()
def predict(model: nn.Module, data: Data, split: str, batch_size: int) -> tuple[Tensor, Tensor]:
    """Predicted and true classes of one part of the data, in its own order.

    Args:
        model: Classifier; left in evaluation mode.
        data: Task.
        split: ``train``, ``validation`` or ``test``; never augmented here.
        batch_size: Images at a time.

    Returns:
        Predicted classes ``(images,)`` and labels ``(images,)``, on the CPU.
    """
    model.eval()
    device = device_of(model)
    guesses, labels = [], []
    for x, y in data.batches(split, batch_size, False):
        guesses.append(model(x.to(device)).argmax(dim=-1).cpu())
        labels.append(y)
    return torch.cat(guesses), torch.cat(labels)


@contextmanager
def dispatch_shares(model: nn.Module) -> Iterator[dict[str, dict[str, float]]]:
    """Counts, while it is open, where the MoE layers send their tokens.

    Yields:
        Filled on leaving: by MoE layer, the share of tokens of each expert, adding up to 1.
    """
    counts: dict[str, Tensor] = {}
    shares: dict[str, dict[str, float]] = {}

    def count(fqn: str, layer: MoEMlp) -> None:
        assert layer.routing is not None
        counts[fqn] = counts.get(fqn, 0) + layer.routing.counts.cpu()

    handles = [
        layer.register_forward_hook(lambda module, inputs, output, fqn=fqn: count(fqn, module))
        for fqn, layer in moe_layers(model)
    ]
    try:
        yield shares
    finally:
        for handle in handles:
            handle.remove()
    for fqn, layer in moe_layers(model):
        share = counts[fqn] / counts[fqn].sum()
        shares[fqn] = dict(zip(layer.experts, share.tolist()))


def top1(guesses: Tensor, labels: Tensor) -> Interval:
    """Top-1 accuracy in percent with its 95 % Wilson score interval.

    Args:
        guesses, labels: Classes ``(images,)``.

    Source:
        Wilson, 1927; Newcombe, Statistics in Medicine 17 (1998) 857, method 3.
    """
    correct, images = int((guesses == labels).sum()), len(labels)
    low, high = _wilson(correct, images)
    return Interval(value=100 * correct / images, low=100 * low, high=100 * high)


def _wilson(successes: int, trials: int) -> tuple[float, float]:
    interval = binomtest(successes, trials).proportion_ci(method="wilson")
    return float(interval.low), float(interval.high)


def paired_difference(changed: Tensor, original: Tensor, labels: Tensor) -> Interval:
    """Accuracy of one model minus that of another on the same images, in points.

    The interval respects that both saw the same images, and stays open where they never differ,
    unlike a bootstrap's.

    Args:
        changed, original: Predicted classes ``(images,)``.
        labels: True classes ``(images,)``.

    Returns:
        The difference with its 95 % interval.

    Source:
        Newcombe, Statistics in Medicine 17 (1998) 2635, method 10 (square-and-add of Wilson
        intervals, with the correlation of the pairs).
    """
    first, second = changed == labels, original == labels
    images = len(labels)
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    difference = (only_first - only_second) / images
    p1, p2 = (both + only_first) / images, (both + only_second) / images
    (low1, high1), (low2, high2) = (
        _wilson(both + only_first, images),
        _wilson(both + only_second, images),
    )
    phi = _correlation(both, only_first, only_second, neither)

    def reach(a: float, b: float) -> float:
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    return Interval(
        value=100 * difference,
        low=100 * (difference - reach(p1 - low1, high2 - p2)),
        high=100 * (difference + reach(high1 - p1, p2 - low2)),
    )


def _correlation(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Continuity-corrected φ of the paired table, as Newcombe's method 10 has it."""
    images = both + only_first + only_second + neither
    margins = (
        (both + only_first)
        * (only_second + neither)
        * (both + only_second)
        * (only_first + neither)
    )
    if not margins:
        return 0.0
    excess = float(both * neither - only_first * only_second)
    if excess > 0:
        excess = max(0.0, excess - images / 2)
    return excess / math.sqrt(margins)

"""Which patches of some test images went to which expert, for the report."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.moe import moe_layers
from reparam.one_pass import evaluating
from reparam.results import DispatchExample

EXAMPLES = 3
# Of the pictures that are kept, and of the tokens of a layer that is shown.
_MOST_SIDE, _MOST_TOKENS = 28, 256


def dispatch_examples(model: nn.Module, images: Tensor, labels: Tensor) -> list[DispatchExample]:
    """Runs the first image of some classes and notes the choices of the routers.

    Args:
        model: Trained, with MoE layers; left in the mode that it was in.
        images: ``(b, c, h, w)``.
        labels: ``(b,)``.
    """
    first: dict[int, int] = {}
    for place, label in enumerate(labels.tolist()):
        first.setdefault(label, place)
    chosen = list(first.values())[:EXAMPLES]
    if not chosen or not any(moe_layers(model)):
        return []
    x = images[chosen]
    with evaluating(model):
        guesses = model(x).argmax(1)
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    grids, experts = {}, []
    for fqn, layer in moe_layers(model):
        choice = layer.routing.choice if layer.routing else torch.empty(0)
        if len(choice) % len(x):
            continue  # of something else than the images
        grid = _grid(choice.view(len(x), -1), prefix, x.shape[-2] / x.shape[-1])
        if grid is not None:
            grids[fqn], experts = grid, list(layer.experts)
    return [
        DispatchExample(
            image=picture.tolist(),
            label=int(labels[place]),
            guess=int(guesses[i]),
            experts=experts,
            layers={fqn: grid[i].tolist() for fqn, grid in grids.items()},
        )
        for i, (place, picture) in enumerate(zip(chosen, _pictures(x)))
        if grids
    ]


def _grid(choice: Tensor, prefix: int, aspect: float) -> Tensor | None:
    """Choices as ``(b, rows, columns)``; None where the tokens are no grid of the image."""
    for skipped in dict.fromkeys((prefix, 0)):
        tokens = choice.shape[1] - skipped
        rows = round(math.sqrt(max(tokens, 0) * aspect))
        if rows and tokens <= _MOST_TOKENS and tokens % rows == 0:
            columns = tokens // rows
            if abs(rows / columns - aspect) < 0.2 * aspect:
                return choice[:, skipped:].reshape(-1, rows, columns)
    return None


def _pictures(x: Tensor) -> Tensor:
    """Small grey pictures ``(b, h, w)`` from 0 to 255."""
    grey = x.float().mean(1, keepdim=True)
    rows, columns = (min(size, _MOST_SIDE) for size in grey.shape[-2:])
    small = F.adaptive_avg_pool2d(grey, (rows, columns))[:, 0]
    low, high = (edge(small.flatten(1), 1)[:, None, None] for edge in (torch.amin, torch.amax))
    return (255 * (small - low) / (high - low).clamp_min(1e-12)).round().int()

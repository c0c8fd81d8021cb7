"""A task that no single patch can answer: which digit is there twice?

Three rotated digits in noise, each in a quadrant of its own; two are of one class, in different
hands, and that class is the class of the image. Seeing one digit, even all three one by one, does
not tell: they have to be set against each other.

Frozen: a change of any constant makes another task, of which earlier results say nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from reparam.data import Data, composed, random_affine

CLASSES = 10
SIZE = 32
TILE, GLYPH = SIZE // 2, 12
IMAGES = {"train": 4096, "validation": 1024, "test": 2048}
NOISE = 0.05
DEGREES, SHIFT, SCALE = 8.0, 0.05, 0.05


def pairs(seed: int, fold: int | None = None) -> Data:
    """Three handwritten digits, two of one class, ``(1, 32, 32)``, 10 classes.

    The digits of each split are those of no other. Training images are composed anew in each
    epoch; validation and test images are the same in every run of a seed, or of a fold.

    Args:
        seed: Seed of the split and of the fixed images.
        fold: Which fold of the digits the test images are made of; None for a part by seed.
    """
    return composed("pairs", compose, IMAGES, seed, fold)


def compose(
    glyphs: Tensor, labels: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Makes images of the task.

    Args:
        glyphs: Digits to choose from, ``(digits, 1, 8, 8)`` from 0 to 1.
        labels: Their classes, ``(digits,)``, each class at least once.
        count: Images to make.
        generator: What all choices are drawn from.

    Returns:
        Images ``(count, 1, 32, 32)`` of about mean 0 and deviation 1, and classes ``(count,)``.
    """
    answer, other = torch.rand(count, CLASSES, generator=generator).argsort(1)[:, :2].unbind(1)
    shown = torch.stack([answer, answer, other, other], dim=1)
    chosen = glyphs[_of_class(labels, shown, generator)]
    chosen[:, 3] = 0  # the quadrant that stays empty
    order = torch.rand(count, 4, generator=generator).argsort(1)
    chosen = chosen[torch.arange(count)[:, None], order].flatten(0, 1)
    enlarged = F.interpolate(chosen, size=(GLYPH, GLYPH), mode="bilinear", align_corners=False)
    margin = (TILE - GLYPH) // 2
    drawn = random_affine(F.pad(enlarged, (margin,) * 4), DEGREES, SHIFT, SCALE, generator)
    images = drawn.view(count, 2, 2, TILE, TILE).permute(0, 1, 3, 2, 4)
    images = images.reshape(count, 1, SIZE, SIZE)
    images = images + NOISE * torch.randn(images.shape, generator=generator)
    return (images - 0.2) / 0.35, answer


def _of_class(labels: Tensor, classes: Tensor, generator: torch.Generator) -> Tensor:
    """Index of a random digit of each asked class, same shape as ``classes``."""
    by_class = labels.argsort(stable=True)
    counts = labels.bincount(minlength=CLASSES)
    starts = counts.cumsum(0) - counts
    within = torch.rand(classes.shape, generator=generator) * counts[classes]
    return by_class[starts[classes] + within.long()]

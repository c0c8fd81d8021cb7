"""A long sequence in the manner of Long Range Arena: an image as 1,024 tokens of one pixel each.

A digit and a fragment of another. A token knows one grey value and its place; what the
digit is lies in hundreds of them. Any model with patches of one pixel takes it as a sequence.

Not frozen yet: how well the original does on it has not been measured, so its constants may change.

Source:
    Long Range Arena, arXiv 2011.04006, its pixel-level image classification.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from reparam.data import Data, composed, random_affine

SIZE = 32
IMAGES = {"train": 1024, "validation": 256, "test": 1024}
FRAGMENTS, FRAGMENT = 1, 6
DEGREES, SHIFT, SCALE = 5.0, 0.03, 0.05


def pixels(seed: int, fold: int | None = None) -> Data:
    """Cluttered handwritten digits, ``(1, 32, 32)``, 10 classes.

    The digits of each split are those of no other. Training images are composed anew in each
    epoch; validation and test images are the same in every run of a seed, or of a fold.

    Args:
        seed: Seed of the split and of the fixed images.
        fold: Which fold of the digits the test images are made of; None for a part by seed.
    """
    return composed("pixels", compose, IMAGES, seed, fold)


def compose(
    glyphs: Tensor, labels: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Makes images of the task.

    Args:
        glyphs: Digits to choose from, ``(digits, 1, 8, 8)`` from 0 to 1.
        labels: Their classes, ``(digits,)``.
        count: Images to make.
        generator: What all choices are drawn from.

    Returns:
        Images ``(count, 1, 32, 32)`` of about mean 0 and deviation 1, and classes ``(count,)``.
    """
    chosen = torch.randint(len(labels), (count,), generator=generator)
    enlarged = F.interpolate(glyphs[chosen], size=(24, 24), mode="bilinear", align_corners=False)
    images = random_affine(F.pad(enlarged, (4, 4, 4, 4)), DEGREES, SHIFT, SCALE, generator)
    image = torch.arange(count)[:, None, None]
    offsets = torch.arange(FRAGMENT)
    for _ in range(FRAGMENTS):
        other = glyphs[torch.randint(len(labels), (count,), generator=generator), 0]
        top, left = torch.randint(SIZE - FRAGMENT + 1, (2, count), generator=generator)
        rows = (top[:, None] + offsets)[:, :, None]
        columns = (left[:, None] + offsets)[:, None, :]
        images[image, 0, rows, columns] = other[:, :FRAGMENT, :FRAGMENT]
    return (images - 0.2) / 0.35, labels[chosen]

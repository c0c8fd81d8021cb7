"""Images and labels in three disjoint parts: digits that ship with scikit-learn, or a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold, train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

from profiler.command_line import BadInput, one_line

SPLITS = ("train", "validation", "test")
# Shares of validation and test where the data come in one piece; the rest is for training.
VALIDATION_SHARE, TEST_SHARE = 0.15, 0.25
FOLDS = 5
DIGITS_SIZE = 16
LOADER_WORKERS = 2

Batches = Iterator[tuple[Tensor, Tensor]]
# Digits (digits, 1, 8, 8) from 0 to 1, their labels, how many images, what choices are drawn from.
Compose = Callable[[Tensor, Tensor, int, torch.Generator], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Data:
    """A classification task.

    Attributes:
        name: ``digits`` or the folder.
        classes: Number of classes.
        sizes: Images by part of the data (``train``, ``validation``, ``test``).
        batches: ``(split, batch_size, training) -> (images (b, c, h, w), labels (b,)), …``; with
            ``training`` in random order and augmented, from torch's global generator.
        contents: Which images a folder holds, see ``folder_contents``; empty for tasks without
            files.
    """

    name: str
    classes: int
    sizes: dict[str, int]
    batches: Callable[[str, int, bool], Batches]
    contents: str = ""


def stratified_split(labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Splits images into train, validation and test with equal shares of each class.

    Args:
        labels: ``(images,)``.
        seed: Equal seeds give equal splits.

    Returns:
        Indices by split: disjoint, together all images.

    Raises:
        ValueError: If a class has too few images for three parts.
    """
    everything = np.arange(len(labels))
    rest, test = train_test_split(
        everything, test_size=TEST_SHARE, stratify=labels, random_state=seed
    )
    train, validation = train_test_split(
        rest,
        test_size=VALIDATION_SHARE / (1 - TEST_SHARE),
        stratify=labels[rest],
        random_state=seed,
    )
    return {"train": train, "validation": validation, "test": test}


def fold_split(labels: np.ndarray, seed: int, fold: int) -> dict[str, np.ndarray]:
    """Splits images so that over all folds each is in the test part exactly once.

    Args:
        labels: ``(images,)``.
        seed: Of the split between training and validation; the folds are the same for all seeds.
        fold: From 0 to FOLDS - 1.

    Returns:
        As ``stratified_split``.
    """
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    rest, test = list(folds.split(labels, labels))[fold]
    train, validation = train_test_split(
        rest,
        test_size=VALIDATION_SHARE / (1 - 1 / FOLDS),
        stratify=labels[rest],
        random_state=seed,
    )
    return {"train": train, "validation": validation, "test": test}


def task_name(name: str, fold: int | None) -> str:
    """A task's name, and which fold its test part is."""
    return name if fold is None else f"{name}, test fold {fold}"


def digit_parts(seed: int, fold: int | None) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The handwritten digits of scikit-learn and the indices of each split.

    Args:
        seed: Seed of the split.
        fold: Which fold is the test part; None for a test part by seed.

    Returns:
        Images ``(1797, 1, 8, 8)`` from 0 to 16, labels ``(1797,)``, indices by split.

    Source:
        UCI Optical Recognition of Handwritten Digits, as shipped with scikit-learn.
    """
    bunch: Any = load_digits()
    target = bunch.target
    split = stratified_split(target, seed) if fold is None else fold_split(target, seed, fold)
    parts = {name: torch.from_numpy(index) for name, index in split.items()}
    return torch.from_numpy(bunch.images).float()[:, None], torch.from_numpy(target), parts


def fixed_generator(split: str, seed: int, fold: int | None) -> torch.Generator:
    """What the images of a split that is fixed are drawn from: alike for all seeds of a fold."""
    draw = seed if fold is None else 1_000_000 + fold
    return torch.Generator().manual_seed(1000 * draw + len(split))


def random_affine(
    images: Tensor,
    degrees: float = 10.0,
    shift: float = 0.1,
    scale: float = 0.1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Rotates, scales and moves each image by its own random amount.

    Args:
        images: ``(b, c, h, w)``.
        degrees: Largest rotation.
        shift: Largest shift, as a share of the side.
        scale: Largest change of size, relative.
        generator: What the amounts are drawn from; None for torch's global one.

    Returns:
        ``(b, c, h, w)``; what comes in from outside repeats the border.
    """
    b = len(images)

    def uniform() -> Tensor:
        return torch.rand(b, device=images.device, generator=generator) * 2 - 1

    angle, size = torch.deg2rad(uniform() * degrees), 1 + uniform() * scale
    cos, sin = torch.cos(angle) * size, torch.sin(angle) * size
    # affine_grid spans [-1, 1], so a share of the side counts double.
    rows = [cos, -sin, uniform() * 2 * shift, sin, cos, uniform() * 2 * shift]
    grid = F.affine_grid(
        torch.stack(rows, dim=1).view(b, 2, 3), list(images.shape), align_corners=False
    )
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def digits(seed: int, fold: int | None = None) -> Data:
    """1797 handwritten digits, 8×8, enlarged to ``(1, 16, 16)`` and normalised.

    Mean and standard deviation are those of the training part.

    Args:
        seed: Seed of the split.
        fold: Which fold is the test part; None for a test part by seed.
    """
    images, labels, parts = digit_parts(seed, fold)
    images = F.interpolate(
        images, size=(DIGITS_SIZE, DIGITS_SIZE), mode="bilinear", align_corners=False
    )
    train_images = images[parts["train"]]
    images = (images - train_images.mean()) / train_images.std()

    def batches(split: str, batch_size: int, training: bool) -> Batches:
        index = parts[split]
        if training:
            index = index[torch.randperm(len(index))]
        for chosen in index.split(batch_size):
            x = images[chosen]
            yield (random_affine(x) if training else x), labels[chosen]

    sizes = {split: len(index) for split, index in parts.items()}
    return Data(task_name("digits", fold), int(labels.max()) + 1, sizes, batches)


def composed(
    name: str, compose: Compose, images: Mapping[str, int], seed: int, fold: int | None
) -> Data:
    """A task whose images are composed of handwritten digits by a generator.

    The digits of each split are those of no other. Training images are composed anew in each
    epoch; validation and test images are the same in every run of a seed, or of a fold.

    Args:
        name: Of the task.
        compose: Makes images ``(count, 1, h, w)`` and classes ``(count,)``.
        images: How many of each split.
        seed: Of the split and of the fixed images.
        fold: Which fold of the digits the test images are made of; None for a part by seed.
    """
    glyphs, labels, parts = digit_parts(seed, fold)
    glyphs = glyphs / glyphs.max()

    def batches(split: str, batch_size: int, training: bool) -> Batches:
        generator = torch.default_generator if training else fixed_generator(split, seed, fold)
        for start in range(0, images[split], batch_size):
            count = min(batch_size, images[split] - start)
            yield compose(glyphs[parts[split]], labels[parts[split]], count, generator)

    classes = int(labels.max()) + 1
    return Data(task_name(name, fold), classes, dict(images), batches)


def image_folder(path: Path, model: nn.Module, seed: int, image_size: int | None = None) -> Data:
    """A folder of images, one subfolder a class, with the transforms that the model expects.

    Either ``train/`` and ``val/`` (with ``test/`` too if there is one) each hold the classes, or
    the folder holds the classes itself. Missing parts are split off by seed: validation off
    train, and all three off a folder without parts. Where there is no ``test/``, ``val/`` is the
    test set and is not looked at before.

    Args:
        path: The folder.
        model: A timm model; its data configuration gives size, crop and normalisation.
        seed: Seed of the split.
        image_size: Side in pixels where it is not the model's usual one.

    Raises:
        BadInput: If the folder is absent, has no images, fewer than two classes, or classes that
            differ between its parts.
    """
    from timm.data import create_transform, resolve_data_config
    from torch.utils.data import DataLoader

    config = resolve_data_config({"img_size": image_size}, model=model)
    transforms = {
        training: create_transform(**config, is_training=training) for training in (True, False)
    }
    sources, roots = _opened(path)
    classes = roots[sources["train"]].classes
    for root, dataset in roots.items():
        if dataset.classes != classes:
            raise BadInput(f"{root}: its classes differ from those of {sources['train']}")
    parts = _parts(sources, roots, seed)

    def batches(split: str, batch_size: int, training: bool) -> Batches:
        images = _Images(roots[sources[split]], parts[split], transforms[training])
        loader: Any = DataLoader(
            images,  # type: ignore[arg-type]
            batch_size=batch_size,
            shuffle=training,
            num_workers=LOADER_WORKERS,
            collate_fn=_collated,
        )
        for batch in loader:
            if isinstance(batch, BadInput):
                raise batch
            yield batch

    sizes = {split: len(index) for split, index in parts.items()}
    return Data(str(path), len(classes), sizes, batches, _contents(path, roots))


class _Images:
    """Some images of a folder; in place of one that cannot be read stands what to say of it.

    An error that is raised in a loader's process reaches the other with its traceback as text.
    """

    def __init__(self, folder: Any, index: np.ndarray, transform: Callable) -> None:
        self.folder, self.index, self.transform = folder, index, transform

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, item: int) -> tuple[Tensor, int] | BadInput:
        path, label = self.folder.samples[self.index[item]]
        try:
            image = self.folder.loader(path)
        except Exception as error:  # whatever Pillow raises on a broken file
            return BadInput(f"--data {path}: cannot be read as an image: {one_line(error)}")
        return self.transform(image), label


def _collated(rows: list[Any]) -> Any:
    from torch.utils.data import default_collate

    broken = (row for row in rows if isinstance(row, BadInput))
    return next(broken, None) or default_collate(rows)


def folder_contents(path: Path) -> str:
    """Hash of the names of a folder's images: changes when images come, go or change class.

    What is trained on one part of a folder must not be tested on the parts of another.

    Raises:
        BadInput: If the folder is absent, has no images or fewer than two classes.
    """
    return _contents(path, _opened(path)[1])


def _opened(path: Path) -> tuple[dict[str, Path], dict[Path, Any]]:
    """The folder that each split is taken from, and what those folders hold."""
    sources = _sources(path)
    return sources, {root: _open_folder(root) for root in dict.fromkeys(sources.values())}


def _contents(path: Path, roots: Mapping[Path, Any]) -> str:
    names = [
        Path(name).relative_to(path).as_posix()
        for dataset in roots.values()
        for name, _ in dataset.samples
    ]
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


def _sources(path: Path) -> dict[str, Path]:
    """The folder that each split is taken from."""
    if not path.is_dir():
        raise BadInput(f"--data {path}: no such folder")
    if not (path / "train").is_dir():
        return dict.fromkeys(SPLITS, path)
    if not (path / "val").is_dir():
        return dict.fromkeys(SPLITS, path / "train")
    if (path / "test").is_dir():
        return {split: path / name for split, name in zip(SPLITS, ("train", "val", "test"))}
    return {"train": path / "train", "validation": path / "train", "test": path / "val"}


def _open_folder(root: Path) -> Any:
    from torchvision.datasets import ImageFolder

    try:
        dataset = ImageFolder(str(root))
    except FileNotFoundError as error:
        raise BadInput(f"--data {root}: {error}") from error
    if len(dataset.classes) < 2:
        raise BadInput(f"--data {root}: needs at least 2 classes, has {len(dataset.classes)}")
    return dataset


def _parts(sources: dict[str, Path], roots: dict[Path, Any], seed: int) -> dict[str, np.ndarray]:
    """Indices of each split within its source."""
    if len(roots) == len(SPLITS):
        return {split: np.arange(len(roots[root])) for split, root in sources.items()}
    labels = np.array(roots[sources["train"]].targets)
    try:
        if len(roots) == 1:
            return stratified_split(labels, seed)
        train, validation = train_test_split(
            np.arange(len(labels)), test_size=VALIDATION_SHARE, stratify=labels, random_state=seed
        )
    except ValueError as error:
        raise BadInput(f"--data {sources['train']}: cannot be split: {error}") from error
    return {
        "train": train,
        "validation": validation,
        "test": np.arange(len(roots[sources["test"]])),
    }

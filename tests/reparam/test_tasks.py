"""The generated tasks: fixed where they are to be compared, new where they are learnt from."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from reparam import pair_task, pixel_task
from reparam.data import FOLDS, digit_parts, digits, fold_split
from reparam.stages import TASKS

GENERATED = {"pairs": pair_task, "pixels": pixel_task}


def first(data, split, training=False, batch_size=64):
    return next(iter(data.batches(split, batch_size, training)))


@pytest.mark.parametrize("name", GENERATED)
def test_test_images_are_fixed_and_training_images_are_new(name):
    data, again, other = TASKS[name](0, None), TASKS[name](0, None), TASKS[name](1, None)
    images, _ = first(data, "test")
    assert images.shape == (64, 1, 32, 32)
    assert torch.equal(images, first(again, "test")[0])
    assert not torch.equal(images, first(other, "test")[0])
    by_seed = [first(TASKS[name](seed, 2), "test")[0] for seed in (0, 1)]
    assert torch.equal(*by_seed)
    assert not torch.equal(first(data, "train", True)[0], first(data, "train", True)[0])
    torch.manual_seed(3)
    drawn = first(data, "train", True)[0]
    torch.manual_seed(3)
    assert torch.equal(drawn, first(data, "train", True)[0])
    assert images.mean().abs() < 0.5
    assert 0.5 < images.std() < 2
    counts = torch.cat([y for _, y in data.batches("test", 256, False)]).bincount(minlength=10)
    assert counts.sum() == data.sizes["test"]
    assert counts.min() > 0.5 * counts.max()


@pytest.mark.parametrize("name", GENERATED)
def test_batches_do_not_depend_on_their_size_where_they_are_fixed(name):
    data = TASKS[name](0, None)
    sizes = [len(x) for x, _ in data.batches("validation", 500, False)]
    assert sum(sizes) == data.sizes["validation"]


def test_pairs_show_the_answer_twice_and_another_once(monkeypatch):
    monkeypatch.setattr(pair_task, "NOISE", 0.0)
    labels = torch.arange(40) % 10
    glyphs = ((1 + labels) / 20)[:, None, None, None].expand(40, 1, 8, 8)
    generator = torch.Generator().manual_seed(0)
    images, answers = pair_task.compose(glyphs, labels, 50, generator)
    # Each tile's centre shows its class as a grey value.
    centres = images.view(50, 2, 16, 2, 16)[:, :, 7:9, :, 7:9].mean(dim=(2, 4)).flatten(1)
    shown = ((centres * 0.35 + 0.2) * 20 - 1).round().long()
    for classes, answer in zip(shown.tolist(), answers.tolist()):
        assert classes.count(answer) == 2
        assert classes.count(-1) == 1
        assert len(set(classes)) == 3


@pytest.mark.parametrize("name", GENERATED)
def test_no_split_shows_a_digit_of_another(name, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        GENERATED[name],
        "compose",
        lambda glyphs, labels, count, generator: (
            glyphs[:1],
            seen.update(now=glyphs) or labels[:1],
        ),
    )
    data, shown = TASKS[name](0, None), {}
    for split in ("train", "validation", "test"):
        first(data, split)
        shown[split] = seen["now"]
    assert sum(len(glyphs) for glyphs in shown.values()) == 1797


def test_folds_test_every_digit_once_and_seeds_only_move_the_validation_part():
    labels = load_digits().target
    tests = [fold_split(labels, 0, fold)["test"] for fold in range(FOLDS)]
    assert sorted(i for part in tests for i in part) == list(range(len(labels)))
    other = fold_split(labels, 1, 2)
    assert (other["test"] == tests[2]).all()
    assert (other["validation"] != fold_split(labels, 0, 2)["validation"]).any()
    for seed in (0, 1):
        parts = digit_parts(seed, 3)[2]
        assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(len(labels)))
    assert digits(0, 3).name != digits(0).name

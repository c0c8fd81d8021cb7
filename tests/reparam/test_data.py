"""Data: disjoint stratified splits, honest augmentation, folders that name what is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from sklearn.datasets import load_digits

from profiler.command_line import BadInput
from reparam.data import SPLITS, digits, image_folder, random_affine, stratified_split
from reparam.recipe import ModelSettings, Recipe, create_model
from reparam.stages import Run, open_task, train_original


def collect(data, split, training=False):
    parts = list(data.batches(split, 64, training))
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


@settings(max_examples=20)
@given(counts=st.lists(st.integers(20, 60), min_size=2, max_size=5), seed=st.integers(0, 2**32 - 1))
def test_split_is_disjoint_whole_and_stratified(counts, seed):
    labels = np.repeat(np.arange(len(counts)), counts)
    parts = stratified_split(labels, seed)
    joined = np.concatenate([parts[split] for split in SPLITS])
    assert sorted(joined) == list(range(len(labels)))
    for label, count in enumerate(counts):
        assert abs((labels[parts["test"]] == label).sum() - count / 4) <= 1.5


def test_split_depends_on_the_seed_alone():
    labels = load_digits().target
    first, again, other = (stratified_split(labels, seed)["test"] for seed in (3, 3, 4))
    assert (first == again).all()
    assert (first != other).any()


def test_digits_are_normalised_by_their_training_part():
    data = digits(0)
    assert data.classes == 10
    assert sum(data.sizes.values()) == 1797
    assert data.sizes["test"] >= 400
    images, labels = collect(data, "train")
    assert images.shape == (data.sizes["train"], 1, 16, 16)
    assert labels.bincount().min() > 90
    assert images.mean().abs() < 1e-5
    assert (images.std() - 1).abs() < 1e-5
    assert collect(data, "test")[0].mean().abs() > 1e-5


def test_only_training_batches_are_shuffled_and_augmented():
    data = digits(0)
    assert torch.equal(collect(data, "train")[0], collect(data, "train")[0])
    torch.manual_seed(0)
    first, first_labels = collect(data, "train", True)
    second, second_labels = collect(data, "train", True)
    assert not torch.equal(first, second)
    assert not torch.equal(first_labels, second_labels)
    torch.manual_seed(0)
    assert torch.equal(first, collect(data, "train", True)[0])


def test_affine_moves_images_but_not_far():
    image = torch.zeros(200, 1, 16, 16)
    image[:, :, 7:9, 7:9] = 1.0
    moved = random_affine(image)
    assert moved.shape == image.shape
    assert (moved != image).flatten(1).any(dim=1).float().mean() > 0.95
    assert moved[:, :, 3:13, 3:13].sum() / moved.sum() > 0.99
    assert torch.allclose(random_affine(image, 0, 0, 0), image, atol=1e-5)


@pytest.fixture(scope="module")
def model():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, embed_dim=12)


def make_images(folder, classes=("cat", "dog"), count=12):
    for shade, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (40, 36), (90 * shade, index, 0)).save(folder / name / f"{index}.png")


def test_folder_of_classes_is_split_by_seed(tmp_path, model):
    make_images(tmp_path)
    data = image_folder(tmp_path, model, 0, image_size=32)
    assert data.sizes == {"train": 14, "validation": 4, "test": 6}
    images, labels = collect(data, "test")
    assert images.shape == (6, 3, 32, 32)
    assert labels.tolist().count(0) == 3


def test_train_alone_is_split_in_three(tmp_path, model):
    make_images(tmp_path / "train", count=20)
    whole = image_folder(tmp_path / "train", model, 0)
    assert image_folder(tmp_path, model, 0).sizes == whole.sizes


def test_val_is_the_test_set_where_there_is_no_test(tmp_path, model):
    make_images(tmp_path / "train", count=20)
    make_images(tmp_path / "val", count=5)
    assert image_folder(tmp_path, model, 0).sizes == {"train": 34, "validation": 6, "test": 10}
    make_images(tmp_path / "test", count=3)
    assert image_folder(tmp_path, model, 0).sizes == {"train": 40, "validation": 10, "test": 6}


def test_bad_folders_are_named(tmp_path, model):
    with pytest.raises(BadInput, match="nothing: no such folder"):
        image_folder(tmp_path / "nothing", model, 0)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(BadInput, match="empty"):
        image_folder(empty, model, 0)
    (empty / "cat").mkdir()
    with pytest.raises(BadInput, match="cat"):
        image_folder(empty, model, 0)
    make_images(tmp_path / "one", classes=("cat",))
    with pytest.raises(BadInput, match=r"one: needs at least 2 classes"):
        image_folder(tmp_path / "one", model, 0)
    make_images(tmp_path / "few", count=1)
    with pytest.raises(BadInput, match=r"few: cannot be split"):
        image_folder(tmp_path / "few", model, 0)
    make_images(tmp_path / "two" / "train")
    make_images(tmp_path / "two" / "val", classes=("cat", "bird"))
    with pytest.raises(BadInput, match="classes differ"):
        image_folder(tmp_path / "two", model, 0)


@pytest.mark.parametrize("content", [b"no image", b"\x89PNG\r\n\x1a\n broken"])
def test_an_image_that_cannot_be_read_is_named(tmp_path, model, content):
    make_images(tmp_path)
    data = image_folder(tmp_path, model, 0)
    for folder in ("cat", "dog"):
        for path in (tmp_path / folder).iterdir():
            path.write_bytes(content)
    with pytest.raises(BadInput, match=r"\.png: cannot be read as an image") as caught:
        list(data.batches("train", 4, True))
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)


def test_weights_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "mine.safetensors"
    kwargs = {"pretrained_cfg_overlay": {"file": str(path)}}
    settings = ModelSettings(name="vit_tiny_patch16_224", pretrained=True, kwargs=kwargs)
    with pytest.raises(BadInput, match=r"overlay\.file: .*mine\.safetensors: no such file"):
        create_model(settings)
    path.write_bytes(b"hello world, not tensors")
    with pytest.raises(BadInput, match="model vit_tiny_patch16_224: SafetensorError"):
        create_model(settings)


def test_a_head_that_nobody_trained_is_no_original(tmp_path):
    """timm drops the head of the weights where a recipe asks for another number of classes."""
    sizes = {"img_size": 32, "embed_dim": 16, "depth": 1, "num_heads": 2}
    whole = timm.create_model("vit_tiny_patch16_224", num_classes=5, **sizes)
    save_file(whole.state_dict(), tmp_path / "mine.safetensors")
    make_images(tmp_path / "images", count=8)
    overlay = {"file": str(tmp_path / "mine.safetensors"), "num_classes": 5}
    stage = {"epochs": 1, "batch_size": 4, "lr": 1e-3}

    def opened(classes):
        kwargs = {**sizes, "num_classes": classes, "pretrained_cfg_overlay": overlay}
        recipe = Recipe.model_validate(
            {
                "data": "folder",
                "deploy_batch": 1,
                "threads": 1,
                "model": {"name": "vit_tiny_patch16_224", "pretrained": True, "kwargs": kwargs},
                "stage1": stage,
                "stage2": stage,
                "variants": [{"name": "shift", "title": "shift", "mlp": "shift_int8"}],
            }
        )
        return open_task(recipe, tmp_path / "images", 0)

    for classes in (2, 5):
        with pytest.raises(
            BadInput, match="2 classes, the pre-trained head of vit_tiny_patch16_224 has 5"
        ):
            opened(classes)


def test_a_training_does_not_go_on_with_other_images(tmp_path):
    """One image more draws another test set, with images that were trained on."""
    images, out = tmp_path / "images", tmp_path / "out"
    make_images(images)
    stage = {"epochs": 1, "batch_size": 16, "lr": 1e-3}
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 8, "depth": 1, "num_heads": 1}
    recipe = Recipe.model_validate(
        {
            "data": "folder",
            "deploy_batch": 1,
            "threads": 1,
            "model": {"name": "vit_tiny_patch16_224", "kwargs": sizes},
            "pretrain": stage,
            "stage1": stage,
            "stage2": stage,
            "variants": [{"name": "shift", "title": "shift", "mlp": "shift_int8"}],
        }
    )

    def trained():
        model, data = open_task(recipe, images, 0)
        example = torch.zeros(1, 3, 32, 32)
        run = Run(recipe, None, data, example, 0, out, Console(quiet=True), out)
        return train_original(run, model).history

    assert trained() == trained()
    Image.new("RGB", (40, 36)).save(images / "dog" / "more.png")
    with pytest.raises(BadInput, match=r"original\.safetensors: images: is"):
        trained()

"""Training: resumable to the bit, and careful about whose checkpoint it goes on from."""

from __future__ import annotations

import csv
import json
import multiprocessing
import signal
import time
from itertools import pairwise

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from profiler.command_line import BadInput
from reparam import training
from reparam.accuracy import predict, top1
from reparam.checkpoints import load_tensors, load_weights, save_weights
from reparam.convert import ReparamConfig, reparameterize_
from reparam.data import Data, random_affine
from reparam.distributed import Place
from reparam.losses import LatencyObjective
from reparam.recipe import Stage
from reparam.training import learning_rate, seed_everything, train


class Interrupted(Exception):
    pass


def stripes() -> Data:
    """Horizontal against vertical stripes with noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(90) % 2
    rows = (torch.arange(8) % 4 < 2).float()
    pattern = torch.stack([rows[:, None].expand(8, 8), rows[None].expand(8, 8)])
    images = pattern[labels][:, None] + 0.5 * torch.randn(90, 1, 8, 8, generator=generator)
    parts = dict(zip(("train", "validation", "test"), torch.arange(90).split((50, 20, 20))))

    def batches(split, batch_size, training):
        index = parts[split]
        if training:
            index = index[torch.randperm(len(index))]
        for chosen in index.split(batch_size):
            x = images[chosen]
            yield (random_affine(x, degrees=2) if training else x), labels[chosen]

    return Data("stripes", 2, {split: len(index) for split, index in parts.items()}, batches)


def small_vit(embed_dim: int = 8) -> nn.Module:
    seed_everything("model")
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=4,
        in_chans=1,
        embed_dim=embed_dim,
        depth=1,
        num_heads=2,
        num_classes=2,
        drop_path_rate=0.2,
        weight_init="jax",
    )


SETTINGS = Stage(epochs=4, batch_size=16, lr=3e-3, warmup_epochs=1, mixup=0.2, gradient_clip=1.0)


def stop_after(epochs):
    def on_epoch(entry):
        if entry.epoch + 1 == epochs:
            raise Interrupted

    return on_epoch


def without_seconds(history):
    return [entry.model_dump(exclude={"seconds"}) for entry in history]


def test_it_learns():
    model, data = small_vit(), stripes()
    settings = Stage(epochs=25, batch_size=16, lr=1e-2, warmup_epochs=1)
    history = train(model, data, settings, stage="original")
    assert history[-1].train_loss < 0.5 * history[0].train_loss
    assert top1(*predict(model, data, "test", 16)).value >= 90


def test_resumed_run_ends_with_the_same_weights(tmp_path):
    data, uninterrupted, resumed = stripes(), small_vit(), small_vit()
    whole = train(uninterrupted, data, SETTINGS, stage="s", seed=1)
    checkpoint = tmp_path / "s.safetensors"
    with pytest.raises(Interrupted):
        train(
            small_vit(),
            data,
            SETTINGS,
            stage="s",
            seed=1,
            checkpoint=checkpoint,
            on_epoch=stop_after(2),
        )
    trained_now = []
    torch.rand(7)  # whatever else drew numbers in between must not matter
    parts = train(
        resumed,
        data,
        SETTINGS,
        stage="s",
        seed=1,
        checkpoint=checkpoint,
        on_epoch=trained_now.append,
    )
    assert [entry.epoch for entry in trained_now] == [2, 3]
    assert without_seconds(parts) == without_seconds(whole)
    for name, tensor in uninterrupted.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert not list(tmp_path.glob("*.part"))


def test_seed_decides_the_weights():
    data, first, second = stripes(), small_vit(), small_vit()
    train(first, data, SETTINGS, stage="s", seed=1)
    train(second, data, SETTINGS, stage="s", seed=2)
    assert not torch.equal(first.head.weight, second.head.weight)


def test_checkpoint_of_another_run_is_refused(tmp_path):
    data, checkpoint = stripes(), tmp_path / "s.safetensors"
    settings = SETTINGS.model_copy(update={"epochs": 1})
    arguments = {"stage": "s", "checkpoint": checkpoint}
    train(small_vit(), data, settings, identity={"recipe": "a"}, **arguments)
    untouched = checkpoint.read_bytes()
    with pytest.raises(BadInput, match=r"s\.safetensors: recipe: is 'a', this run has 'b'"):
        train(small_vit(), data, settings, identity={"recipe": "b"}, **arguments)
    with pytest.raises(BadInput, match=r"s\.safetensors: seed: is '0', this run has '5'"):
        train(small_vit(), data, settings, identity={"recipe": "a"}, seed=5, **arguments)
    with pytest.raises(BadInput, match=r"s\.safetensors: blocks\.0\..*has shape"):
        train(small_vit(16), data, settings, identity={"recipe": "a"}, **arguments)
    assert checkpoint.read_bytes() == untouched


def test_foreign_and_broken_files_are_named(tmp_path):
    foreign, broken = tmp_path / "foreign.safetensors", tmp_path / "broken.safetensors"
    save_file({"x": torch.ones(1)}, foreign)
    broken.write_bytes(b"\x08")
    for path in (foreign, broken, tmp_path / "absent.safetensors"):
        with pytest.raises(BadInput, match=path.name):
            load_tensors(path)


def test_weights_round_trip_strictly(tmp_path):
    path, model = tmp_path / "w.safetensors", small_vit()
    save_weights(path, model, {"name": "original", "nested": {"a": [1, None]}})
    other = small_vit()
    nn.init.ones_(other.head.weight)
    assert load_weights(path, other) == {"name": "original", "nested": {"a": [1, None]}}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    with pytest.raises(BadInput, match=r"w\.safetensors: extra\.bias: is missing"):
        other.extra = nn.Linear(1, 1)
        load_weights(path, other)


def test_latency_loss_reaches_the_weights_and_the_history(monkeypatch):
    monkeypatch.setattr(
        training, "latency_loss", lambda model, objective: model.head.bias.sum() ** 2
    )
    data, with_loss, without = stripes(), small_vit(), small_vit()
    nn.init.ones_(with_loss.head.bias), nn.init.ones_(without.head.bias)
    plain = train(without, data, SETTINGS, stage="s")
    history = train(with_loss, data, SETTINGS, stage="s", objective=LatencyObjective(10.0))
    assert all(entry.latency_loss is None for entry in plain)
    losses = [entry.latency_loss for entry in history]
    assert losses == sorted(losses, reverse=True)
    assert with_loss.head.bias.sum().abs() < without.head.bias.sum().abs() - 0.05


def test_divergence_names_the_setting():
    settings = SETTINGS.model_copy(update={"lr": 1e30, "gradient_clip": None})
    with pytest.raises(BadInput, match=r"stage1\.lr: the loss is"):
        train(small_vit(), stripes(), settings, stage="stage1")


@given(st.integers(1, 20), st.integers(0, 10), st.integers(1, 30))
def test_learning_rate_rises_then_falls(epochs, warmup, steps):
    settings = Stage(epochs=epochs + warmup, batch_size=1, lr=0.1, warmup_epochs=warmup)
    rates = [learning_rate(settings, step, steps) for step in range(settings.epochs * steps)]
    rise = warmup * steps
    assert max(rates) == pytest.approx(0.1)
    assert all(low < high for low, high in pairwise(rates[:rise]))
    assert all(high > low for high, low in pairwise(rates[rise:]))
    assert min(rates) > 0


def test_checkpoint_is_plain(tmp_path):
    settings = SETTINGS.model_copy(update={"epochs": 1})
    train(small_vit(), stripes(), settings, stage="s", checkpoint=tmp_path / "s.safetensors")
    tensors, header = load_tensors(tmp_path / "s.safetensors")
    assert json.loads(json.dumps(header)) == header
    assert {name.split(".")[0] for name in tensors} == {"model", "optimiser"}


def train_slowly(settings, arguments):
    """In a process of its own."""
    torch.set_num_threads(1)
    train(small_vit(), stripes(), settings, on_epoch=lambda entry: time.sleep(0.2), **arguments)


def test_killed_run_goes_on_to_the_same_weights(tmp_path):
    """SIGKILL, which no code can catch, somewhere after the first epoch."""
    checkpoint, log = tmp_path / "s.safetensors", tmp_path / "training.csv"
    settings = SETTINGS.model_copy(update={"epochs": 6})
    arguments = {"stage": "s", "checkpoint": checkpoint, "log": log}
    # A fork would be of a process with threads; where it fails it would go on as pytest.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["reparam.stages"])
    child = context.Process(target=train_slowly, args=(settings, arguments))
    child.start()
    while not checkpoint.is_file():
        assert child.is_alive()
        time.sleep(0.01)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    uninterrupted, resumed, epochs = small_vit(), small_vit(), []
    whole = train(uninterrupted, stripes(), settings, stage="s")
    parts = train(resumed, stripes(), settings, on_epoch=epochs.append, **arguments)
    torch.set_num_threads(threads)
    assert 0 < len(epochs) < 6
    assert without_seconds(parts) == without_seconds(whole)
    for name, tensor in uninterrupted.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert [row["epoch"] for row in csv.DictReader(log.open())] == [str(n) for n in range(6)]


def test_an_epoch_that_was_kept_and_not_logged_is_logged_by_the_next_call(tmp_path, monkeypatch):
    """As after a SIGKILL between the two in the last epoch, where nothing is left to train."""
    checkpoint, log = tmp_path / "s.safetensors", tmp_path / "training.csv"
    settings = SETTINGS.model_copy(update={"epochs": 1})
    arguments = {"stage": "s", "checkpoint": checkpoint}
    train(small_vit(), stripes(), settings, **arguments)
    assert not log.exists()
    train(small_vit(), stripes(), settings, log=log, **arguments)
    assert [row["epoch"] for row in csv.DictReader(log.open())] == ["0"]


def test_a_single_row_at_the_end_of_an_epoch_is_left_out():
    """Batch normalisation cannot take one; 50 images are seven batches of seven and one image."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2), nn.BatchNorm1d(2))
    steps: list[tuple[int, int]] = []
    for batch_size in (7, 16):
        settings = Stage(epochs=1, batch_size=batch_size, lr=1e-3)
        train(model, stripes(), settings, stage="s", on_step=lambda *step: steps.append(step))
        assert steps[-1] == (len(steps), len(steps))
        assert len(steps) == {7: 7, 16: 4}[batch_size]
        steps.clear()


def test_more_processes_than_rows_are_refused(monkeypatch):
    for size, message in ((16, r"s\.batch_size: 16 rows are too few for 60"), (64, "50 training")):
        settings = SETTINGS.model_copy(update={"batch_size": size})
        monkeypatch.setattr(training, "place", lambda: Place(0, 60))
        with pytest.raises(BadInput, match=message):
            train(small_vit(), stripes(), settings, stage="s")


def test_bf16_learns_and_keeps_fp32_weights():
    model, data = small_vit(), stripes()
    reparameterize_(
        model, ReparamConfig(attention="add", attention_linears="shift_int8", mlp="moe")
    )
    settings = Stage(epochs=12, batch_size=16, lr=1e-2, warmup_epochs=1, precision="bf16")
    history = train(model, data, settings, stage="s")
    assert history[-1].train_loss < 0.7 * history[0].train_loss
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    fp32 = train(small_vit(), data, settings.model_copy(update={"precision": "fp32"}), stage="s")
    bf16 = train(small_vit(), data, settings, stage="s")
    assert bf16[0].train_loss != fp32[0].train_loss
    assert bf16[0].train_loss == pytest.approx(fp32[0].train_loss, rel=0.02)


def test_hash_functions_are_refitted_on_schedule_and_alike_after_a_resume(tmp_path, monkeypatch):
    fitted: list[torch.Tensor] = []
    monkeypatch.setattr(training, "refit_hashing_", lambda model, images: fitted.append(images))
    settings = SETTINGS.model_copy(update={"epochs": 5, "refit_hashing_epochs": 2})
    arguments = {"stage": "s", "checkpoint": tmp_path / "s.safetensors"}
    train(small_vit(), stripes(), settings, stage="s")
    whole = fitted.copy()
    assert len(whole) == 3
    fitted.clear()
    with pytest.raises(Interrupted):
        train(small_vit(), stripes(), settings, on_epoch=stop_after(3), **arguments)
    train(small_vit(), stripes(), settings, **arguments)
    assert len(fitted) == 3
    assert all(torch.equal(one, other) for one, other in zip(whole, fitted))

"""Training of one stage, resumable after each epoch."""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.nn import functional as F

from profiler.command_line import BadInput
from reparam.accuracy import device_of, dispatch_shares, predict
from reparam.checkpoints import load_state, load_tensors, save_tensors
from reparam.data import Data
from reparam.distributed import own_rows, place, replicated, row_weight, summed, wait_for_all
from reparam.kept_memory import keep_freed_memory
from reparam.kernelised_hashing import refit_hashing_
from reparam.losses import LatencyObjective, latency_loss, objective_weight
from reparam.recipe import Stage
from reparam.results import Epoch
from reparam.training_log import log_epochs

_MODEL, _OPTIMISER = "model.", "optimiser."


def steps_in_epoch(images: int, batch_size: int, world: int) -> int:
    """Batches of an epoch that are trained on.

    The rest at its end is left out where it has a single row, which batch normalisation cannot
    take, or fewer rows than there are processes.

    Args:
        images: Of the training part.
        batch_size: Rows of a whole batch.
        world: Processes that share each batch.
    """
    rest = images % batch_size
    return images // batch_size + (rest >= max(2, world))


def learning_rate(settings: Stage, step: int, steps_per_epoch: int) -> float:
    """Learning rate of one step: linear from zero to the peak, then a cosine to zero.

    Args:
        settings: Peak, warm-up and length.
        step: Steps done, from 0.
        steps_per_epoch: Of ``steps_in_epoch``.
    """
    warmup, total = settings.warmup_epochs * steps_per_epoch, settings.epochs * steps_per_epoch
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    return settings.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def seed_everything(*parts: object) -> None:
    """Seeds the generators of torch, NumPy and Python from what the parts say.

    Each epoch is seeded by its own name, so a resumed run draws the same numbers as one that was
    never interrupted, and no generator's state needs storing.
    """
    digest = hashlib.sha256("|".join(map(str, parts)).encode()).digest()
    seed = int.from_bytes(digest[:4], "little")
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def train(
    model: nn.Module,
    data: Data,
    settings: Stage,
    *,
    stage: str,
    seed: int = 0,
    objective: LatencyObjective | None = None,
    teacher: nn.Module | None = None,
    checkpoint: Path | None = None,
    log: Path | None = None,
    identity: Mapping[str, str] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> list[Epoch]:
    """Trains a model in place; goes on from ``checkpoint`` where one is there.

    In a process group each process takes its rows of every batch, and all end with equal weights.

    Args:
        model: Trained where its parameters are (CPU or GPU).
        data: Task.
        settings: Length, rates and regularisation.
        stage: Name of the stage, for the history and the seeds.
        seed: Equal seeds give equal weights on the same machine and number of threads.
        objective: What the model's routers are asked for; None for nothing.
        teacher: Model in evaluation mode to distil from, where the settings ask for it.
        checkpoint: Where to keep the state after each epoch; None keeps none.
        log: training.csv, see ``reparam.training_log``; None writes none.
        identity: What the run depends on; a checkpoint of another identity is refused.
        on_step: Called with the steps done and their total after each step.
        on_epoch: Called after each epoch that was trained now.

    Returns:
        One entry for each epoch, those before the interruption too.

    Raises:
        BadInput: If the checkpoint is of another run, there are too few rows or images for the
            processes, or the loss is no longer finite.
    """
    world = place().world
    if settings.batch_size < world:
        raise BadInput(
            f"recipe: {stage}.batch_size: {settings.batch_size} rows are too few for {world}"
            " processes"
        )
    steps_per_epoch = steps_in_epoch(data.sizes["train"], settings.batch_size, world)
    if not steps_per_epoch:
        raise BadInput(
            f"--data {data.name}: {data.sizes['train']} training images are too few for {stage}"
        )
    keep_freed_memory()
    optimiser = _optimiser(model, settings)
    identity = {**(identity or {}), "stage": stage, "seed": str(seed), "settings": repr(settings)}
    history: list[Epoch] = []
    if checkpoint is not None and checkpoint.is_file():
        history = _resume(checkpoint, model, optimiser, identity)
        if log is not None and place().is_first:
            # Killed before it, the last epoch that the checkpoint knows is not in the log.
            log_epochs(log, stage, history)
    total = settings.epochs * steps_per_epoch
    mix, replica = _mix(settings, data.classes), replicated(model)

    for epoch in range(len(history), settings.epochs):
        start = time.perf_counter()
        if settings.refit_hashing_epochs and epoch % settings.refit_hashing_epochs == 0:
            seed_everything(seed, stage, epoch, "hashing")
            _refit_hashing(model, data, settings)
        seed_everything(seed, stage, epoch)
        model.train()
        weight = _weight(objective, history)
        losses, latency_losses = [], []
        batches = islice(data.batches("train", settings.batch_size, True), steps_per_epoch)
        for done, (images, labels) in enumerate(batches, start=epoch * steps_per_epoch):
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(settings, done, steps_per_epoch)
            loss = _task_loss(replica, images, labels, settings, mix, teacher)
            routers_loss = latency_loss(model, objective) if objective else torch.zeros_like(loss)
            optimiser.zero_grad()
            (loss + weight * routers_loss).backward()
            if settings.gradient_clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
            optimiser.step()
            losses.append(loss.detach())
            latency_losses.append(routers_loss.detach())
            if on_step:
                on_step(done + 1, total)
        train_loss = float(summed(torch.stack(losses).mean())) / world
        if not math.isfinite(train_loss):
            raise BadInput(f"recipe: {stage}.lr: the loss is {train_loss} in epoch {epoch}")
        validation_top1, expected_ms = _validate(model, data, settings, objective)
        entry = Epoch(
            stage=stage,
            epoch=epoch,
            train_loss=train_loss,
            latency_loss=float(torch.stack(latency_losses).mean()) if objective else None,
            latency_weight=weight if objective else None,
            expected_latency_ms=expected_ms,
            validation_top1=validation_top1,
            seconds=time.perf_counter() - start,
        )
        history.append(entry)
        if place().is_first:
            if checkpoint is not None:
                _save(checkpoint, model, optimiser, identity, history)
            if log is not None:
                log_epochs(log, stage, history)
        wait_for_all()
        if on_epoch:
            on_epoch(entry)
    model.eval()
    return history


def _refit_hashing(model: nn.Module, data: Data, settings: Stage) -> None:
    images, _ = next(iter(data.batches("train", settings.batch_size, True)))
    refit_hashing_(model, images.to(device_of(model)))


def _weight(objective: LatencyObjective | None, history: list[Epoch]) -> float:
    if objective is None:
        return 0.0
    expected = [e.expected_latency_ms for e in history if e.expected_latency_ms is not None]
    return objective_weight(objective, expected)


def _validate(
    model: nn.Module, data: Data, settings: Stage, objective: LatencyObjective | None
) -> tuple[float, float | None]:
    """Validation top-1 in percent, and the expected latency in ms where there are curves."""
    with dispatch_shares(model) as shares:
        guesses, labels = predict(model, data, "validation", settings.batch_size)
    validation_top1 = 100 * float((guesses == labels).float().mean())
    if objective is None or objective.curves is None:
        return validation_top1, None
    return validation_top1, objective.curves.expected_ms(shares)


def _optimiser(model: nn.Module, settings: Stage) -> torch.optim.AdamW:
    no_weight_decay: Any = getattr(model, "no_weight_decay", set)
    # An exponent that decays to zero is a weight that grows to one.
    exempt = {*no_weight_decay(), "*.exponent", "*.sign"}
    groups = param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=exempt)
    return torch.optim.AdamW(groups, lr=settings.lr)


def _mix(settings: Stage, classes: int) -> Mixup | None:
    if not (settings.mixup or settings.cutmix):
        return None
    return Mixup(
        mixup_alpha=settings.mixup,
        cutmix_alpha=settings.cutmix,
        label_smoothing=0.0,
        num_classes=classes,
    )


def _task_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    settings: Stage,
    mix: Mixup | None,
    teacher: nn.Module | None,
) -> Tensor:
    """Task loss of this process's rows of a batch.

    Distillation is the divergence from the teacher's class probabilities (Hinton et al., arXiv
    1503.02531, at temperature 1).
    """
    device = device_of(model)
    images, labels = images.to(device), labels.to(device)
    # Mixup pairs the images of a batch: an odd one, at the end of an epoch, stays unmixed.
    if mix is not None and len(images) % 2 == 0:
        images, labels = mix(images, labels)
    share = row_weight(len(images))
    images, labels = own_rows(images), own_rows(labels)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")
    with autocast:
        logits = model(images).float()
    loss = F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
    if teacher is not None and settings.distillation:
        with torch.no_grad(), autocast:
            wanted = teacher(images).float().log_softmax(dim=-1)
        found = logits.log_softmax(dim=-1)
        divergence = F.kl_div(found, wanted, reduction="batchmean", log_target=True)
        loss = torch.lerp(loss, divergence, settings.distillation)
    return loss * share


def _save(
    path: Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    identity: Mapping[str, str],
    history: list[Epoch],
) -> None:
    tensors = {_MODEL + name: tensor for name, tensor in model.state_dict().items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"{_OPTIMISER}{index}.{name}": tensor for name, tensor in state.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"identity": dict(identity), "history": [entry.model_dump() for entry in history]}
    save_tensors(path, tensors, header)


def _resume(
    path: Path, model: nn.Module, optimiser: torch.optim.Optimizer, identity: Mapping[str, str]
) -> list[Epoch]:
    tensors, header = load_tensors(path)
    found = header.get("identity", {})
    for key in sorted(identity.keys() | found.keys()):
        if identity.get(key) != found.get(key):
            raise BadInput(
                f"{path}: {key}: is {found.get(key)!r}, this run has {identity.get(key)!r};"
                " choose another --out or delete the file"
            )
    weights = {n.removeprefix(_MODEL): t for n, t in tensors.items() if n.startswith(_MODEL)}
    load_state(path, model, weights)
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith(_OPTIMISER):
            index, key = name.removeprefix(_OPTIMISER).split(".")
            state.setdefault(int(index), {})[key] = tensor
    optimiser.load_state_dict(
        {"state": state, "param_groups": optimiser.state_dict()["param_groups"]}
    )
    return [Epoch.model_validate(entry) for entry in header["history"]]

"""The stages of a run: the original, its attention replaced, and the variants of its linears.

Each is trained from the weights of the one before, goes on after an interruption, and leaves its
weights and its rows of training.csv in the run's folder.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from cost_models.latency_table import LatencyTable
from profiler.command_line import BadInput
from reparam.calibration import Calibration, calibrate, calibration_of, stretched
from reparam.checkpoints import save_weights
from reparam.convert import Conversion, reparameterize_
from reparam.data import Data, digits, image_folder
from reparam.distributed import place, wait_for_all
from reparam.expert_latency import set_expert_latencies_
from reparam.latency_curves import ModelCurves, latency_curves
from reparam.losses import LatencyObjective
from reparam.outcome import Candidate
from reparam.pair_task import pairs
from reparam.pixel_task import pixels
from reparam.recipe import Recipe, Stage, Variant, create_model
from reparam.results import Epoch
from reparam.training import seed_everything, train

# Tasks that need no files: by the recipe's ``data``, from a seed and a fold.
TASKS: dict[str, Callable[[int, int | None], Data]] = {
    "digits": digits,
    "pairs": pairs,
    "pixels": pixels,
}


@dataclass(frozen=True)
class Run:
    """What all stages of a run share.

    Attributes:
        example: Input at the deployed batch.
        out: Folder for weights, checkpoints and training.csv.
        calibrations: Folder in which ``reparam.calibration`` has left what it measured.
    """

    recipe: Recipe
    table: LatencyTable
    data: Data
    example: Tensor
    seed: int
    out: Path
    console: Console
    calibrations: Path


def open_task(
    recipe: Recipe, folder: Path | None, seed: int, fold: int | None = None
) -> tuple[nn.Module, Data]:
    """Creates the original model and opens its data.

    Raises:
        BadInput: If ``--data`` and the recipe do not fit each other, or the pre-trained head
            does not fit the data's classes.
    """
    if (recipe.data == "folder") != (folder is not None):
        raise BadInput(f"--data: the recipe's data is {recipe.data!r}, --data is {folder}")
    seed_everything(seed, "original")
    if folder is None:
        data = TASKS[recipe.data](seed, fold)
        return create_model(recipe.model, data.classes), data
    image_size: Any = recipe.model.kwargs.get("img_size")
    model = create_model(recipe.model)
    data = image_folder(folder, model, seed, int(image_size) if image_size else None)
    if recipe.pretrain is not None:
        model.reset_classifier(data.classes)  # type: ignore[operator]
    elif not data.classes == model.num_classes == _trained_classes(model):
        raise BadInput(
            f"--data {folder}: has {data.classes} classes, the pre-trained head of"
            f" {recipe.model.name} has {_trained_classes(model)}; a recipe with pretrain trains a"
            " new one"
        )
    return model, data


def _trained_classes(model: nn.Module) -> int:
    """Classes of the pre-trained weights, whatever head the model was created with."""
    known = getattr(model, "pretrained_cfg", None) or {}
    return int(known.get("num_classes") or model.num_classes)  # type: ignore[arg-type]


def train_original(run: Run, model: nn.Module) -> Candidate:
    """Trains the original in place; it is its own candidate."""
    history = _train(run, model, "original", run.recipe.pretrain)
    return Candidate("original", run.recipe.model.name, model, history)


def train_attention(
    run: Run,
    original: Candidate,
    name: str = "stage1",
    title: str = "add attention",
    convert_: Callable[[nn.Module], Conversion] | None = None,
) -> Candidate:
    """Trains a copy of the original whose attention was replaced.

    Args:
        run: What all stages share.
        original: To start from, and to distil from.
        name, title: Of the outcome.
        convert_: Replaces the attention in place; None for what the recipe says.
    """
    model = copy.deepcopy(original.model)
    if convert_ is None:
        done = reparameterize_(model, run.recipe.attention_config, run.recipe.allows(model))
    else:
        done = convert_(model)
    history = _train(run, model, name, run.recipe.stage1, teacher=original.model)
    return Candidate(name, title, model, history, done.converted, done.skipped)


def train_variant(run: Run, variant: Variant, stage1: Candidate, teacher: nn.Module) -> Candidate:
    """Trains a copy of stage 1 whose linears were replaced as a variant says."""
    model = copy.deepcopy(stage1.model)
    seed_everything(run.seed, variant.name)  # the routers start at random
    linears = reparameterize_(model, run.recipe.linears_config(variant), run.recipe.allows(model))
    device = next(model.parameters()).device
    example = run.example.to(device)
    latencies = set_expert_latencies_(model, run.table.lookup, example)
    curves = expected_latency_curves(variant, model, run.table, example)
    calibration = calibration_of(variant, run.recipe, run.table, run.calibrations)
    objective = latency_objective(variant, curves, calibration)
    # Only the loss depends on the table: without it, another table changes nothing.
    driven_by = {"variant": variant.model_dump_json()}
    if objective is not None:
        driven_by["expert_latency_ms"] = json.dumps(latencies)
        if objective.curves is not None:
            driven_by["latency_curves"] = _written(objective.curves)
            driven_by["latency_budget_ms"] = str(objective.budget_ms)
    history = _train(run, model, variant.name, run.recipe.stage2, objective, teacher, driven_by)
    return Candidate(
        variant.name,
        variant.title,
        model,
        history,
        stage1.converted | linears.converted,
        stage1.skipped | linears.skipped,
        latencies,
        objective,
    )


def expected_latency_curves(
    variant: Variant, model: nn.Module, table: LatencyTable, example: Tensor
) -> ModelCurves | None:
    """What a table says of a variant's latency; None where its loss does not ask.

    Args:
        variant: Of a recipe.
        model: Converted as the variant says.
        table: What it can answer for.
        example: Input at the deployed batch, where the model is.

    Raises:
        TableError: If the table cannot answer for an expert.
    """
    if not variant.latency_loss_weight or variant.latency_loss != "expected":
        return None
    return latency_curves(
        model,
        table.lookup,
        example,
        variant.schedule,
        overhead=table.overhead("layer", "deployed"),
        whole=table.overhead("model", "deployed"),
    ).to(example.device)


def latency_objective(
    variant: Variant, curves: ModelCurves | None, calibration: Calibration | None
) -> LatencyObjective | None:
    """What a variant asks of its routers.

    Args:
        variant: Of a recipe.
        curves: Of ``expected_latency_curves``.
        calibration: What the model was seen to take; None for what the table says.

    Raises:
        BadInput: If the budget is below what any dispatch takes.
    """
    if not variant.latency_loss_weight:
        return None
    if curves is None:
        as_dispatched = variant.latency_loss == "balance_dispatched"
        return LatencyObjective(variant.latency_loss_weight, as_dispatched=as_dispatched)
    if calibration is not None:
        curves = stretched(curves, calibration)
    low_ms, high_ms = curves.bounds_ms
    budget_ms = variant.latency_budget_ms
    if variant.latency_budget_share is not None:
        budget_ms = low_ms + variant.latency_budget_share * (high_ms - low_ms)
    if budget_ms is not None and budget_ms < low_ms:
        raise BadInput(
            f"recipe: variants: {variant.name}: latency_budget_ms: {budget_ms:.4g} is less than"
            f" the {low_ms:.4g} ms of the fastest dispatch"
        )
    return LatencyObjective(variant.latency_loss_weight, curves, budget_ms)


def check_budget(run: Run, variant: Variant, model: nn.Module) -> None:
    """Asks the table for a variant's experts, and times it where it is to keep to a budget.

    Args:
        run: Its folder of calibrations gets what was measured.
        variant: Of the recipe, or of an ablation.
        model: Converted as the variant says, not trained.

    Raises:
        TableError: If the table cannot answer for an expert.
        BadInput: If the budget is below what any dispatch takes.
    """
    curves = expected_latency_curves(variant, model, run.table, run.example)
    calibrate(variant, model, run.recipe, run.table, run.example, run.calibrations, run.console)
    calibration = calibration_of(variant, run.recipe, run.table, run.calibrations)
    latency_objective(variant, curves, calibration)


def _written(curves: ModelCurves) -> str:
    layers = {
        fqn: [layer.schedule, layer.tokens.tolist(), layer.latency_ms.tolist()]
        for fqn, layer in curves.layers.items()
    }
    return json.dumps([curves.rest_ms, layers])


def _train(
    run: Run,
    model: nn.Module,
    name: str,
    settings: Stage | None,
    objective: LatencyObjective | None = None,
    teacher: nn.Module | None = None,
    driven_by: Mapping[str, str] | None = None,
) -> list[Epoch]:
    """Trains one stage, showing how far it is, and writes its weights."""
    history: list[Epoch] = []
    if settings is not None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=run.console) as progress:
            task = progress.add_task(f"{name}: training", total=None)
            history = train(
                model,
                run.data,
                settings,
                stage=name,
                seed=run.seed,
                objective=objective,
                teacher=teacher,
                checkpoint=run.out / "checkpoints" / f"{name}.safetensors",
                log=run.out / "training.csv",
                identity={
                    "recipe": run.recipe.sha256,
                    "data": run.data.name,
                    **({"images": run.data.contents} if run.data.contents else {}),
                    **(driven_by or {}),
                },
                on_step=lambda done, total: progress.update(task, completed=done, total=total),
                on_epoch=lambda entry: progress.update(
                    task,
                    description=f"{name}: epoch {entry.epoch + 1}/{settings.epochs},"
                    f" validation {entry.validation_top1:.1f} %",
                ),
            )
    if place().is_first:
        header = {
            "variant": name,
            "model": run.recipe.model.name,
            "recipe_sha256": run.recipe.sha256,
        }
        save_weights(run.out / f"{name}.safetensors", model, header)
    wait_for_all()
    return history

"""SPINE and CLI: a recipe and a latency table -> trained, deployed and measured models.

    python -m reparam.finetune --recipe digits-quick --latency-table latency_table.json --out run

Each epoch is kept under ``checkpoints/``: after an interruption the same command goes on there.
"""

from __future__ import annotations

import copy
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from timm.data import resolve_data_config
from torch import Tensor, nn

from cost_models.latency_table import LatencyTable, TableError
from kernels.workload import Workload
from profiler.command_line import BadInput, output_folder
from profiler.command_line import run as run_command
from profiler.device import cpu_info
from reparam.checkpoints import save_weights
from reparam.convert import ConversionError, reparameterize_
from reparam.data import Data, digits, image_folder
from reparam.expert_latency import layer_workloads, set_expert_latencies_, undecided
from reparam.outcome import Candidate, evaluate_candidates, rows_of, write_rows
from reparam.recipe import Recipe, Stage, Variant, create_model, load_recipe
from reparam.results import Epoch, FinetuneResults, Interval
from reparam.training import seed_everything, train

app = typer.Typer(add_completion=False)
console = Console(stderr=True)


@dataclass(frozen=True)
class Run:
    """What all stages of a fine-tuning run share."""

    recipe: Recipe
    table: LatencyTable
    data: Data
    example: Tensor
    seed: int
    out: Path


@app.command()
def finetune(
    latency_table: Annotated[
        Path, typer.Option(help="latency_table.json of `python -m cost_models.fit`.")
    ],
    recipe: Annotated[
        str, typer.Option(help="Name of a shipped recipe, or a TOML.")
    ] = "digits-quick",
    data: Annotated[
        Path | None, typer.Option(help="Folder of images, for a recipe that asks for one.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; the table's own if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of split, weights and training.")] = 0,
    device: Annotated[
        str, typer.Option(help="Where to train: cpu or cuda:N. Deployed is on the CPU.")
    ] = "cpu",
) -> None:
    """Fine-tunes a model into its add, shift and mixture-of-experts forms, deploys and compares."""
    name, settings = load_recipe(recipe)
    table = LatencyTable.load(latency_table)
    deploy_device = cpu_info(settings.threads)
    train_device = _train_device(device)
    torch.set_num_threads(settings.threads)
    original, task = open_task(settings, data, seed)
    example = next(iter(task.batches("test", settings.deploy_batch, False)))[0]
    check_conversions(settings, original, table, example)
    folder = output_folder(out or latency_table.parent)
    run = Run(settings, table, task, example, seed, folder)

    candidates = train_all(run, original.to(train_device))
    variants, costs = evaluate_candidates(candidates, task, table, example, deploy_device, console)
    results = FinetuneResults(
        top1=(variants[-1].deployed_top1 or variants[-1].top1).value,
        recipe=name,
        model=settings.model.name,
        data=task.name,
        split=task.sizes,
        classes=task.classes,
        seed=seed,
        device=deploy_device,
        deploy_batch=settings.deploy_batch,
        latency_table_sha256=table.sha256,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["python", "-m", "reparam.finetune", *sys.argv[1:]]),
        variants=variants,
    )
    write_rows(folder / "measurements.sqlite", rows_of(results, costs))
    results.save(folder / "results.json")
    show(results)


def _train_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {name}: cannot be used ({error})") from error
    return device


def open_task(recipe: Recipe, folder: Path | None, seed: int) -> tuple[nn.Module, Data]:
    """Creates the original model and opens its data.

    Raises:
        BadInput: If ``--data`` and the recipe do not fit each other, or the pre-trained head
            does not fit the data's classes.
    """
    if (recipe.data == "folder") != (folder is not None):
        raise BadInput(f"--data: the recipe's data is {recipe.data!r}, --data is {folder}")
    seed_everything(seed, "original")
    if folder is None:
        data = digits(seed)
        return create_model(recipe.model, data.classes), data
    image_size = recipe.model.kwargs.get("img_size")
    model = create_model(recipe.model)
    data = image_folder(folder, model, seed, int(image_size) if image_size else None)
    if recipe.pretrain is not None:
        model.reset_classifier(data.classes)  # type: ignore[operator]
    elif model.num_classes != data.classes:
        raise BadInput(
            f"--data {folder}: has {data.classes} classes, the pre-trained head of"
            f" {recipe.model.name} has {model.num_classes}; a recipe with pretrain trains a new one"
        )
    return model, data


def check_conversions(
    recipe: Recipe, original: nn.Module, table: LatencyTable, example: Tensor
) -> None:
    """Converts copies for every variant and looks their experts up, before time goes into training.

    Raises:
        ConversionError: If a rule of the recipe matches nothing.
        TableError: If the table cannot answer for an expert.
    """
    for model in _converted_copies(recipe, original):
        set_expert_latencies_(model, table.lookup, example)


def recipe_workloads(recipe: Recipe) -> list[Workload]:
    """The workloads of a recipe's variants at its ``deploy_batch``, for a sweep to measure.

    Each expert of an MoE is there at all tokens of its layer: what the router's loss asks for.

    Raises:
        ConversionError: If a rule of the recipe matches nothing.
    """
    settings = recipe.model.model_copy(update={"pretrained": False})
    original = create_model(settings)
    sizes = {name: settings.kwargs.get(name) for name in ("img_size", "in_chans")}
    shape = resolve_data_config(sizes, model=original)["input_size"]
    example = torch.zeros(recipe.deploy_batch, *shape)
    found: dict[Workload, None] = {}
    for model in _converted_copies(recipe, original):
        for workloads in layer_workloads(model, example, undecided(model, example)).values():
            found |= dict.fromkeys(workloads)
    return list(found)


def _converted_copies(recipe: Recipe, original: nn.Module) -> Iterator[nn.Module]:
    """The original, converted by stage 1 and for each variant, not trained."""
    attention = copy.deepcopy(original)
    reparameterize_(attention, recipe.attention_config, recipe.allows(attention))
    yield attention
    for variant in recipe.variants:
        model = copy.deepcopy(attention)
        reparameterize_(model, recipe.linears_config(variant), recipe.allows(model))
        yield model


def train_all(run: Run, original: nn.Module) -> list[Candidate]:
    """Trains the original, stage 1, and from its weights each variant of stage 2.

    Returns:
        All of them in this order, on the CPU.
    """
    recipe = run.recipe
    history = _train(run, original, "original", recipe.pretrain)
    candidates = [Candidate("original", recipe.model.name, copy.deepcopy(original), history)]

    model = original
    attention = reparameterize_(model, recipe.attention_config, recipe.allows(model))
    history = _train(run, model, "stage1", recipe.stage1, teacher=candidates[0].model)
    candidates.append(
        Candidate(
            "stage1",
            "add attention",
            copy.deepcopy(model),
            history,
            attention.converted,
            attention.skipped,
        )
    )
    for variant in recipe.variants:
        candidates.append(_train_variant(run, variant, candidates[1], candidates[0].model))
    for candidate in candidates:
        candidate.model.cpu()
    return candidates


def _train_variant(run: Run, variant: Variant, stage1: Candidate, teacher: nn.Module) -> Candidate:
    model = copy.deepcopy(stage1.model)
    seed_everything(run.seed, variant.name)  # the routers start at random
    linears = reparameterize_(model, run.recipe.linears_config(variant), run.recipe.allows(model))
    device = next(model.parameters()).device
    latencies = set_expert_latencies_(model, run.table.lookup, run.example.to(device))
    # Only the loss depends on the table: without it, another table changes nothing.
    driven_by = {"expert_latency_ms": json.dumps(latencies)} if variant.latency_loss_weight else {}
    weight = variant.latency_loss_weight
    history = _train(run, model, variant.name, run.recipe.stage2, weight, teacher, driven_by)
    return Candidate(
        variant.name,
        variant.title,
        model,
        history,
        stage1.converted | linears.converted,
        stage1.skipped | linears.skipped,
        latencies,
    )


def _train(
    run: Run,
    model: nn.Module,
    name: str,
    settings: Stage | None,
    latency_loss_weight: float = 0.0,
    teacher: nn.Module | None = None,
    driven_by: dict[str, str] | None = None,
) -> list[Epoch]:
    """Trains one stage, showing how far it is, and writes its weights."""
    history: list[Epoch] = []
    if settings is not None:
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(f"{name}: training", total=None)
            history = train(
                model,
                run.data,
                settings,
                stage=name,
                seed=run.seed,
                latency_loss_weight=latency_loss_weight,
                teacher=teacher,
                checkpoint=run.out / "checkpoints" / f"{name}.safetensors",
                identity={
                    "recipe": run.recipe.sha256,
                    "data": run.data.name,
                    **(driven_by or {}),
                },
                on_step=lambda done, total: progress.update(task, completed=done, total=total),
                on_epoch=lambda entry: progress.update(
                    task,
                    description=f"{name}: epoch {entry.epoch + 1}/{settings.epochs},"
                    f" validation {entry.validation_top1:.1f} %",
                ),
            )
    header = {"variant": name, "model": run.recipe.model.name, "recipe_sha256": run.recipe.sha256}
    save_weights(run.out / f"{name}.safetensors", model, header)
    return history


def show(results: FinetuneResults) -> None:
    """Prints the comparison."""
    table = Table(title=f"{results.recipe}: batch {results.deploy_batch}, {results.device.label}")
    for heading in ("model", "top-1 %", "against original", "measured ms", "weight KiB"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for variant in results.variants:
        table.add_row(
            variant.name,
            _figure(variant.deployed_top1 or variant.top1),
            _figure(variant.difference),
            _figure(variant.latency_ms, ".3f"),
            f"{variant.weight_bytes / 1024:.0f}",
        )
    console.print(table)


def _figure(interval: Interval | None, form: str = ".2f") -> str:
    if interval is None:
        return "–"
    return f"{interval.value:{form}} ({interval.low:{form}} … {interval.high:{form}})"


if __name__ == "__main__":
    run_command(app, (TableError, ConversionError))

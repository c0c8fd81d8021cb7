"""SPINE and CLI: a recipe and a latency table -> trained, deployed and measured models.

    python -m reparam.finetune --recipe digits-quick --latency-table latency_table.json --out run

Each epoch is kept under ``checkpoints/``: after an interruption the same command goes on there.
"""

from __future__ import annotations

import os
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from cost_models.latency_table import LatencyTable, TableError
from profiler.command_line import BadInput, output_folder
from profiler.command_line import run as run_command
from profiler.device import cpu_info
from reparam.convert import ConversionError
from reparam.distributed import process_group, wait_for_all
from reparam.expert_latency import set_expert_latencies_
from reparam.outcome import Candidate, evaluate_candidates, rows_of, write_rows
from reparam.recipe import Recipe, load_recipe
from reparam.recipe_models import converted_copies, with_fastest_mult
from reparam.results import FinetuneResults, Interval
from reparam.stages import (
    Run,
    check_budget,
    expected_latency_curves,
    open_task,
    train_attention,
    train_original,
    train_variant,
)

app = typer.Typer(add_completion=False)
console = Console(stderr=True)


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
        str, typer.Option(help="Where to train: cpu, cuda or cuda:N. Deployed is on the CPU.")
    ] = "cpu",
) -> None:
    """Fine-tunes a model into its add, shift and mixture-of-experts forms, deploys and compares.

    On several GPUs: torchrun --nproc-per-node 8 -m reparam.finetune --device cuda …
    """
    name, settings = load_recipe(recipe)
    if settings.stage1.refit_hashing_epochs:
        raise BadInput(
            f"{recipe}: stage1.refit_hashing_epochs: codes are signs here, only add_hashed of"
            " `python -m reparam.ablate` has hash functions to fit"
        )
    table = LatencyTable.load(latency_table)
    settings = with_fastest_mult(settings, table, console)
    if out is None and not latency_table.exists():
        raise BadInput(f"--out: is needed with a table that ships ({latency_table})")
    deploy_device = cpu_info(settings.threads)
    train_device = _train_device(device)
    torch.set_num_threads(settings.threads)
    original, task = open_task(settings, data, seed)
    example = next(iter(task.batches("test", settings.deploy_batch, False)))[0]
    check_conversions(settings, original, table, example)
    folder = output_folder(out or latency_table.parent)
    if table.device.fingerprint != deploy_device.fingerprint:
        console.print(
            f"the latency table is of {table.device.label}: routers are trained for that device;"
            f" deployed models are timed on {deploy_device.label}",
            markup=False,
        )

    with process_group(train_device) as here:
        console.quiet = not here.is_first
        run = Run(settings, table, task, example, seed, folder, console, folder)
        if here.is_first:
            check_budgets(run, original)
        wait_for_all()
        candidates = train_all(run, original.to(train_device))
    if not here.is_first:
        return
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
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # each process of torchrun has its own
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {name}: cannot be used ({error})") from error
    return device


def check_conversions(
    recipe: Recipe, original: nn.Module, table: LatencyTable, example: Tensor
) -> None:
    """Converts copies for every variant and looks their experts up, before time goes into training.

    Raises:
        ConversionError: If a rule of the recipe matches nothing.
        TableError: If the table cannot answer for an expert.
    """
    models = converted_copies(recipe, original)
    set_expert_latencies_(next(models), table.lookup, example)
    for variant, model in zip(recipe.variants, models):
        set_expert_latencies_(model, table.lookup, example)
        expected_latency_curves(variant, model, table, example)


def check_budgets(run: Run, original: nn.Module) -> None:
    """Times each variant that is to keep to a budget, before time goes into training.

    Raises:
        BadInput: If a budget is below what any dispatch takes.
    """
    if not any(variant.has_budget for variant in run.recipe.variants):
        return
    _, *models = converted_copies(run.recipe, original)
    for variant, model in zip(run.recipe.variants, models):
        check_budget(run, variant, model)


def train_all(run: Run, model: nn.Module) -> list[Candidate]:
    """Trains the original, stage 1, and from its weights each variant of stage 2.

    Returns:
        All of them in this order, on the CPU.
    """
    original = train_original(run, model)
    stage1 = train_attention(run, original)
    variants = [train_variant(run, each, stage1, original.model) for each in run.recipe.variants]
    candidates = [original, stage1, *variants]
    for candidate in candidates:
        candidate.model.cpu()
    return candidates


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

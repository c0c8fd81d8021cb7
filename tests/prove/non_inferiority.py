"""Is the deployed model's top-1 within a margin of the original's? Paired, 5 folds × 3 seeds.

python tests/prove/non_inferiority.py --recipe digits-quick --margin 0.5
python tests/prove/non_inferiority.py --recipe pairs --margin 1.0

Each fold and seed trains the original and one MoE from it, on the same split. Non-inferior means
that the one-sided 95 % bound of the difference lies above minus the margin, both over the runs
(other folds and seeds) and over the test images; and at least 30 % of the tokens go to shifts.
Interrupted, the same command goes on. Exit code 1 if it is not shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch
import typer
from rich.console import Console

from cost_models.latency_table import LatencyTable, TableError
from profiler.command_line import EXIT_VERDICT_AGAINST, BadInput, output_folder, run
from reparam.ablate import find_table
from reparam.ablation_results import AblationUnit
from reparam.ablation_summary import mean_interval
from reparam.ablation_training import default_workers, train_draws
from reparam.ablation_unit import Study, Unit, check_units, run_unit
from reparam.ablation_variants import ORIGINAL, VARIANTS
from reparam.convert import ConversionError
from reparam.data import FOLDS
from reparam.recipe import load_recipe
from reparam.recipe_models import with_fastest_mult

# Two-sided 90 %: its lower end is the one-sided 95 % bound.
TWO_SIDED = 0.90
LEAST_ON_SHIFT = 0.30

app = typer.Typer(add_completion=False)


def differences(pairs: Sequence[tuple[AblationUnit, AblationUnit]]) -> list[float]:
    """Top-1 of the variant minus that of the original, in points, one for each fold and seed."""
    return [changed.row.final_top1 - original.row.final_top1 for original, changed in pairs]


def image_differences(pairs: Sequence[tuple[AblationUnit, AblationUnit]]) -> list[float]:
    """The same for each test image of each fold, in points, averaged over the seeds."""
    by_fold: dict[int | None, list[torch.Tensor]] = {}
    for original, changed in pairs:
        gained = torch.tensor(changed.correct).int() - torch.tensor(original.correct).int()
        by_fold.setdefault(changed.row.fold, []).append(100.0 * gained)
    # A fold's test images are the same for all seeds, in the same order.
    return torch.cat([torch.stack(found).mean(0) for found in by_fold.values()]).tolist()


def verdict(pairs: Sequence[tuple[AblationUnit, AblationUnit]], margin: float) -> tuple[bool, str]:
    """Whether non-inferiority is shown, and the figures.

    Args:
        pairs: Original and variant of each fold and seed.
        margin: In points.
    """
    lines, shown = [], True
    for name, values in (
        ("runs", differences(pairs)),
        ("test images", image_differences(pairs)),
    ):
        interval = mean_interval(values, TWO_SIDED)
        low = interval.low if interval else -math.inf
        shown = shown and low > -margin
        lines.append(
            f"over {len(values)} {name}: {fmean(values):+.2f} points, one-sided 95 % bound"
            f" {low:+.2f} (margin -{margin:g})"
        )
    shares = [changed.row.shift_share or 0.0 for _, changed in pairs]
    shown = shown and fmean(shares) >= LEAST_ON_SHIFT
    lines.append(
        f"tokens on shift: {fmean(shares):.0%}, least of a run {min(shares):.0%}"
        f" (target {LEAST_ON_SHIFT:.0%})"
    )
    return shown, "\n".join(lines)


@app.command(help=__doc__)
def main(
    recipe: Annotated[str, typer.Option(help="Recipe: a name, or a TOML.")] = "digits-quick",
    margin: Annotated[float, typer.Option(help="In points.")] = 0.5,
    variant: Annotated[str, typer.Option(help="An MoE of the ablation.")] = "moe_expected",
    latency_table: Annotated[Path | None, typer.Option(help="As for reparam.ablate.")] = None,
    out: Annotated[Path, typer.Option(help="Folder.")] = Path("runs/prove"),
    folds: Annotated[int, typer.Option(min=1, max=FOLDS, help="Only the first.")] = FOLDS,
    seeds: Annotated[int, typer.Option(min=1, help="Only the first.")] = 3,
    workers: Annotated[int | None, typer.Option(min=1, help="As for reparam.ablate.")] = None,
) -> None:
    """Prints the figures and the verdict."""
    if variant not in VARIANTS or VARIANTS[variant].mlp != "moe":
        raise BadInput(f"--variant {variant}: is no MoE of the ablation")
    name, settings = load_recipe(recipe)
    table_file = find_table(latency_table, out)
    table = LatencyTable.load(table_file)
    console = Console(stderr=True)
    settings = with_fastest_mult(settings, table, console)
    torch.set_num_threads(settings.threads)
    folder = output_folder(out / f"non_inferiority_{name}")
    study = Study(settings, table, None, folder, console)
    draws = [(fold, seed) for fold in range(folds) for seed in range(seeds)]
    units = [(Unit(ORIGINAL, seed, fold), Unit(variant, seed, fold)) for fold, seed in draws]
    every = [unit for pair in units for unit in pair]
    check_units(study, every)
    train_draws(study, table_file, every, workers or default_workers(settings))
    pairs = []
    for original, changed in units:
        pairs.append((run_unit(study, original), run_unit(study, changed)))
        print(f"{changed.name}: {differences(pairs[-1:])[0]:+.2f} points", flush=True)
    shown, figures = verdict(pairs, margin)
    print(figures)
    whole = folds == FOLDS and seeds == 3
    print("non-inferior" if shown else "not shown", "" if whole else "(not the whole protocol)")
    if not shown:
        raise typer.Exit(EXIT_VERDICT_AGAINST)


if __name__ == "__main__":
    run(app, (TableError, ConversionError))

"""SPINE and CLI: what each replacement costs in accuracy and brings in latency, over several seeds.

    python -m reparam.ablate --preset quick

Each variant and seed is a unit of its own: after an interruption the same command goes on with
the next one, and within a unit at the last epoch. Seeds are trained side by side; then each unit
is measured, with the machine for itself.
"""

from __future__ import annotations

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from cost_models.latency_table import LatencyTable, TableError
from kernels.torch_ops import set_threads
from profiler.command_line import BadInput, output_folder
from profiler.command_line import run as run_command
from profiler.device import cpu_info
from reparam.ablation_results import AblationResults, AblationUnit
from reparam.ablation_summary import summarise
from reparam.ablation_training import default_workers, train_draws
from reparam.ablation_unit import Study, Unit, check_units, run_unit
from reparam.ablation_variants import ATTENTIONS, ORIGINAL, PRESETS, VARIANTS
from reparam.convert import ConversionError
from reparam.recipe import load_recipe
from reparam.recipe_models import with_fastest_mult
from reparam.results import Interval

app = typer.Typer(add_completion=False)
console = Console(stderr=True)

TABLE_MAKERS = (
    "`python -m profiler.sweep --config quick-cpu --out runs/quick` and"
    " `python -m cost_models.fit --store runs/quick/measurements.sqlite --out runs/quick`"
)


@app.command()
def ablate(
    preset: Annotated[str, typer.Option(help=f"{', '.join(PRESETS)}.")] = "quick",
    latency_table: Annotated[
        Path | None,
        typer.Option(help="The one in --out, else in runs/quick, if not given."),
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for ablation.json; its units go to ablation/ in it.")
    ] = Path("runs/quick"),
    recipe: Annotated[
        str | None, typer.Option(help="Recipe in place of the preset's: a name, or a TOML.")
    ] = None,
    variants: Annotated[
        str | None, typer.Option(help="Only these of the preset, by comma; the original is added.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Seeds in place of the preset's.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of images, for a recipe that asks for one.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Trainings at once; by default one per core.")
    ] = None,
) -> None:
    """Trains, deploys and measures the original and what replaces its parts, several seeds each."""
    if preset not in PRESETS:
        raise BadInput(f"--preset {preset}: is none of {', '.join(PRESETS)}")
    chosen = PRESETS[preset]
    names = _names(variants, chosen.names)
    recipe_name, settings = load_recipe(recipe or chosen.recipe)
    if settings.attention != "add":
        raise BadInput(
            f"{recipe_name}: attention: an ablation is of add attention, not {settings.attention}"
        )
    table_file = find_table(latency_table, out)
    table = LatencyTable.load(table_file)
    settings = with_fastest_mult(settings, table, console)
    device = cpu_info(settings.threads)
    torch.set_num_threads(settings.threads)
    set_threads(settings.threads)
    study = Study(settings, table, data, output_folder(out), console)
    units = [Unit(name, seed) for seed in range(seeds or chosen.seeds) for name in names]
    check_units(study, units)
    train_draws(study, table_file, units, workers or default_workers(settings))

    done: list[AblationUnit] = []
    for unit in units:
        console.print(f"{len(done) + 1}/{len(units)}: {unit.name}")
        done.append(run_unit(study, unit))
        results = AblationResults(
            preset=preset,
            recipe=recipe_name,
            model=settings.model.name,
            data=settings.data if data is None else str(data),
            device=device,
            deploy_batch=settings.deploy_batch,
            latency_table_sha256=table.sha256,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            command=shlex.join(["python", "-m", "reparam.ablate", *sys.argv[1:]]),
            rows=[each.row for each in done],
            summaries=summarise([each.row for each in done]),
            missing=[each.name for each in units[len(done) :]],
        )
        results.save(study.out / "ablation.json")
    show(results)


def _names(asked: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    names = known if asked is None else tuple(asked.split(","))
    for name in names:
        if name != ORIGINAL and name not in ATTENTIONS and name not in VARIANTS:
            everything = ", ".join([ORIGINAL, *ATTENTIONS, *VARIANTS])
            raise BadInput(f"--variants {name}: is none of {everything}")
    return tuple(dict.fromkeys([ORIGINAL, *names]))


def find_table(asked: Path | None, out: Path) -> Path:
    """The latency table to use.

    Raises:
        BadInput: If none was named and none is where one would be; says which commands make it.
    """
    if asked is not None:
        return asked
    for folder in (out, Path("runs/quick")):
        if (folder / "latency_table.json").is_file():
            return folder / "latency_table.json"
    raise BadInput(
        f"--latency-table: not given, and {out / 'latency_table.json'} is missing;"
        f" {TABLE_MAKERS} make one"
    )


def show(results: AblationResults) -> None:
    """Prints the comparison."""
    table = Table(title=f"{results.recipe}, {results.device.label}: means over the seeds")
    for heading in ("variant", "top-1 %", "against original", "ms", "ratio", "KiB", "on shift"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for each in results.summaries:
        table.add_row(
            each.title,
            f"{each.top1_mean:.2f}",
            _with_interval(each.difference_mean, each.difference),
            _figure(each.latency_ms),
            _with_interval(each.latency_ratio, each.latency_ratio_interval),
            f"{each.weight_bytes / 1024:.0f}",
            "–" if each.shift_share is None else f"{each.shift_share:.0%}",
        )
    console.print(table)


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _with_interval(value: float | None, interval: Interval | None) -> str:
    if interval is None:
        return _figure(value)
    return f"{_figure(value)} ({interval.low:.2f} … {interval.high:.2f})"


if __name__ == "__main__":
    run_command(app, (TableError, ConversionError))

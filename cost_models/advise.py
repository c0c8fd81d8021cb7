"""SPINE and CLI: a model and a latency table -> what to convert, and whether it pays.

python -m cost_models.advise --model pvt_v2_b0 --table runs/quick-cpu/latency_table.json
python -m cost_models.advise --model deit_tiny_patch16_224        a shipped table of this machine
python -m cost_models.advise --model pvt_v2_b0 --table runs/gpu/latency_table.json --json

Nothing is trained or measured. A layer pays where its whole interval lies below that of the
strongest baseline in the table. An answer exits with 0 whatever it says; with --gate, 1 says that
it does not pay. Bad input exits with 2.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cost_models import advice_text
from cost_models.advice import advise
from cost_models.advice_result import Advice
from cost_models.conversion_plan import SHIFT_FORMS, plan
from cost_models.latency_table import LatencyTable, TableError
from cost_models.shipped_tables import shipped_for, shipped_tables
from profiler.command_line import EXIT_VERDICT_AGAINST, BadInput, output_folder, run
from profiler.device import DeviceInfo, cpu_info
from profiler.model_workloads import ModelError, ModelLayer, model_layers

app = typer.Typer(add_completion=False)

# A sweep of a model: rows of each workload, ours and the baselines', and seconds of each row.
_ROWS_A_WORKLOAD, _SECONDS_A_ROW = 2.5, 0.8
# Of a line that goes into a file.
_WIDTH = 132


@app.command(help=__doc__)
def main(
    model: Annotated[str, typer.Option(help="A timm model.")],
    table: Annotated[
        str | None,
        typer.Option(
            help="latency_table.json, or the name of a table that ships: "
            f"{', '.join(shipped_tables()) or 'none yet'}. Default: the one of this CPU."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at once.")] = 1,
    forms: Annotated[
        str | None,
        typer.Option(help=f"Forms that linears may take, such as {','.join(SHIFT_FORMS[:2])}."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse shapes outside of what was measured.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print advice.json and no more.")] = False,
    out: Annotated[Path | None, typer.Option(help="Folder for advice.json.")] = None,
    gate: Annotated[bool, typer.Option("--gate", help="Exit with 1 if it does not pay.")] = False,
) -> None:
    """Reads top to bottom as the story of a piece of advice."""
    chosen = shift_forms(forms)
    name = table or table_of_this_machine()
    layers = model_layers(model, batch)
    if name is None:
        advice = without_table(model, batch, layers, strict)
    else:
        advice = with_table(model, batch, layers, name, chosen, strict)
    if out is not None:
        advice.save(output_folder(out) / "advice.json")
    show(advice, json)
    if gate and advice.verdict == "does not pay":
        raise typer.Exit(EXIT_VERDICT_AGAINST)


def shift_forms(text: str | None) -> tuple[str, ...]:
    """Names of ``--forms``.

    Raises:
        BadInput: On an unknown one.
    """
    if text is None:
        return SHIFT_FORMS
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in SHIFT_FORMS:
            raise BadInput(f"--forms: {name!r} is none of {', '.join(SHIFT_FORMS)}")
    return names


def table_of_this_machine() -> str | None:
    """Name of the table that ships for this CPU, on one thread before more; None without one."""
    threads = range(1, len(os.sched_getaffinity(0)) + 1)
    return next((name for count in threads if (name := shipped_for(cpu_info(count)))), None)


def with_table(
    model: str,
    batch: int,
    layers: list[ModelLayer],
    name: str,
    forms: tuple[str, ...],
    strict: bool,
) -> Advice:
    """The advice, and what to measure where it is unknown.

    Raises:
        TableError: If the table cannot be read; it then says which sweep would make one.
    """
    try:
        table = LatencyTable.load(name)
    except TableError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        steps = ", then ".join(f"`{command}`" for command in commands(model, batch))
        raise TableError(
            f"{error}; to make one, on that device: {steps} ({duration(layers)})"
        ) from error
    advice = advise(plan(layers, forms), table, model, batch, name, strict)
    if not any(
        "extrapolated" in (one.original.source, one.converted.source if one.converted else "")
        or one.verdict == "unknown"
        for one in advice.decisions
    ):
        return advice
    return advice.model_copy(update={"measure": measure(model, batch, layers, table.device)})


def without_table(model: str, batch: int, layers: list[ModelLayer], strict: bool) -> Advice:
    """What can be said without a table: which sweep to run, and how long it takes."""
    device = cpu_info(1)
    return Advice(
        model=model,
        batch=batch,
        device=device,
        table=None,
        table_sha256=None,
        strict=strict,
        verdict="unknown",
        reason="no latency table of this device ships with the package",
        measure=measure(model, batch, layers, device),
    )


def measure(
    model: str, batch: int, layers: list[ModelLayer], device: DeviceInfo
) -> tuple[str, ...]:
    """The commands that make a table of the model's own shapes, the first with its duration."""
    threads = f" --threads {device.threads}" if device.kind == "cpu" else " --device cuda:0"
    sweep, *rest = commands(model, batch, threads)
    return (f"{sweep} ({duration(layers)})", *rest)


def commands(model: str, batch: int, device: str = "") -> tuple[str, ...]:
    """Sweep, fit, and the question again."""
    run_folder = f"runs/{model}-b{batch}"
    return (
        f"python -m profiler.sweep --model {model} --batch {batch}{device}",
        f"python -m cost_models.fit --store {run_folder}/measurements.sqlite",
        f"python -m cost_models.advise --model {model} --batch {batch} "
        f"--table {run_folder}/latency_table.json --out {run_folder}",
    )


def duration(layers: list[ModelLayer]) -> str:
    """How long the sweep of a model takes, roughly."""
    shapes = dict.fromkeys(layer.shape for layer in layers)
    workloads = sum(len(shape.workloads((*SHIFT_FORMS, *_MULT))) for shape in shapes)
    minutes = workloads * _ROWS_A_WORKLOAD * _SECONDS_A_ROW / 60
    return f"some {math.ceil(minutes)} minutes"


_MULT = ("mult_fp32", "mult_bf16", "mult_int8")


def show(advice: Advice, as_json: bool) -> None:
    """Prints the advice: for people, or for machines."""
    if as_json:
        print(advice.model_dump_json(indent=1))
        return
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    if advice.decisions:
        console.print(advice_text.decision_table(advice))
    for line in advice_text.lines(advice):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run(app, (ModelError, TableError))

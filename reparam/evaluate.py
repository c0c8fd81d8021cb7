"""Measures deployed models: against PyTorch's best, and how attention grows with its tokens.

python -m reparam.evaluate --model deit_tiny_patch16_224 --versus-torch
python -m reparam.evaluate --model pvt_v2_b0 --versus-torch --batch 1,8 --share 0,50,100
python -m reparam.evaluate --model deit_tiny_patch16_224 --dispatch --batch 1
python -m reparam.evaluate --scaling
python -m reparam.evaluate --predicted-versus-measured --table runs/models/latency_table.json \
    --out runs/models

A model is converted as the shipped recipes do (add attention where it can be linear, else quadratic
attention on codes, int8 shifts around it, a mixture of int8 mult and shift experts) and deployed;
its weights do not matter for its latency, the share of tokens on shift does, and is set. Results go
to versus_torch.json, scaling.json and, as rows of layers and models that `cost_models.fit` reads
on, measurements.sqlite in --out; what dispatching costs is only printed.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from rich.console import Console
from rich.table import Table
from timm.data import resolve_data_config
from torch import nn

from cost_models.latency_table import LatencyTable, TableError
from cost_models.layer_models import predict_left_out
from kernels.torch_ops import set_threads
from profiler.command_line import BadInput, one_line, output_folder, run
from profiler.device import cpu_info
from profiler.passes import PASSES, pass_lines
from profiler.samples import PRESETS, TimingSettings
from profiler.store import Measurement, create_store
from reparam.convert import ConversionError, ReparamConfig, reparameterize_by_parts_
from reparam.deploy import deploy
from reparam.dispatch_cost import dispatch_costs, dispatch_table
from reparam.forced_dispatch import force_share_
from reparam.kept_memory import keep_freed_memory
from reparam.mult import MULT_FORMS
from reparam.predicted_measured import Case, measured_rows, table_of
from reparam.results import Interval
from reparam.scaling import attention_sizes, measure_scaling
from reparam.scaling_result import Scaling
from reparam.versus_torch import compare
from reparam.versus_torch_result import Comparison, VersusTorch

app = typer.Typer(add_completion=False)

# Of different depths, widths and numbers of tokens.
MODELS = (
    "deit_tiny_patch16_224",
    "deit_small_patch16_224",
    "vit_small_patch32_224",
    "vit_tiny_patch16_384",
    "pvt_v2_b0",
    "pvt_v2_b1",
)
console = Console()
# Of the shipped recipes.
_MULT = "mult_int8"
_MODEL, _SHARES, _THREADS = "deit_tiny_patch16_224", "0,50,100", 2


@app.command(help=__doc__)
def main(
    model: Annotated[str, typer.Option(help="Any timm model.")] = _MODEL,
    versus_torch: Annotated[
        bool, typer.Option("--versus-torch", help="Whole models against PyTorch's best.")
    ] = False,
    dispatch: Annotated[
        bool, typer.Option("--dispatch", help="MoE layers beside their experts alone.")
    ] = False,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Attention from 64 to 16k tokens, add and softmax.")
    ] = False,
    predicted_versus_measured: Annotated[
        bool,
        typer.Option(
            "--predicted-versus-measured",
            help="MoE layers at 0 to 100 % shift and whole models, against a latency table.",
        ),
    ] = False,
    models: Annotated[
        str, typer.Option(help="With --predicted-versus-measured: timm models, two or more.")
    ] = ",".join(MODELS),
    table: Annotated[
        str | None, typer.Option(help="Latency table of this device: a file or a shipped name.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Images at once, such as 1,8.")] = "1,8",
    share: Annotated[
        str, typer.Option(help="Percent of tokens on the shift expert, such as 0,50,100.")
    ] = _SHARES,
    mult: Annotated[
        str, typer.Option(help=f"Form of the mult expert: {', '.join(MULT_FORMS)}.")
    ] = _MULT,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = _THREADS,
    preset: Annotated[
        str, typer.Option(help=f"Precision of the timing: {', '.join(PRESETS)}.")
    ] = "standard",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/evaluate"),
) -> None:
    """Reads top to bottom as the story of an evaluation."""
    if not (versus_torch or dispatch or scaling or predicted_versus_measured):
        raise BadInput(
            "nothing to do: give --versus-torch, --dispatch, --scaling or"
            " --predicted-versus-measured"
        )
    if preset not in PRESETS:
        raise BadInput(f"--preset {preset}: must be one of {', '.join(PRESETS)}")
    if mult not in MULT_FORMS:
        raise BadInput(f"--mult {mult}: must be one of {', '.join(MULT_FORMS)}")
    if predicted_versus_measured and mult != _MULT:
        raise BadInput(f"--mult {mult}: --predicted-versus-measured is of {_MULT}")
    if predicted_versus_measured and not (versus_torch or dispatch or scaling):
        for option, given, default, instead in (
            ("--model", model, _MODEL, "is of --models"),
            ("--share", share, _SHARES, "is of 0 to 100 %"),
            ("--threads", threads, _THREADS, "is of as many as the table"),
        ):
            if given != default:
                raise BadInput(f"{option} {given}: --predicted-versus-measured {instead}")
    batches = _whole_numbers("--batch", batch, 1, 4096)
    shares = _whole_numbers("--share", share, 0, 100)
    known = _table(table) if predicted_versus_measured else None
    names = list(dict.fromkeys(models.split(",")))
    device = cpu_info(threads)
    set_threads(threads)
    # The originals too: before they are made.
    keep_freed_memory()
    if versus_torch or dispatch or scaling:
        original, deployed_at = prepared(model, mult)
    if known is not None:
        # A name of which nothing can be made is to be known now, not when its turn comes.
        for name in names:
            prepared(name, option="--models")
    folder = output_folder(out)
    header = {
        "device": device,
        "command": shlex.join(["python", "-m", "reparam.evaluate", *sys.argv[1:]]),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if versus_torch:
        comparisons = []
        for images in batches:
            example = example_of(original, images)
            ours = {f"deployed, {part} % shift": deployed_at(part / 100) for part in shares}
            console.print(f"{model}, batch {images}: compiling and measuring, in turns")
            comparisons.append(compare(model, original, ours, example, PRESETS[preset]))
            console.print(_ratios(comparisons[-1]))
        VersusTorch(**header, comparisons=comparisons).save(folder / "versus_torch.json")
    if dispatch:
        for images in batches:
            case = Case(model, original, deployed_at(0.5), example_of(original, images))
            console.print(f"{model}, batch {images}: measuring, in turns")
            for part in shares:
                costs = list(dispatch_costs(case, part / 100, PRESETS[preset]))
                console.print(dispatch_table(model, images, costs))
    if scaling:
        sizes = attention_sizes(deployed_at(0.5))
        if sizes is None:
            raise BadInput(f"--scaling: {model} has no attention that additions replace")
        console.print("growth of attention with its tokens: measuring, in turns")
        rows = measure_scaling(PRESETS[preset], *sizes)
        found = Scaling(**header, heads=sizes[0], head_dim=sizes[1], rows=rows)
        found.save(folder / "scaling.json")
        console.print(found.table())
    if known is not None:
        set_threads(known.device.threads or threads)
        measured = measure_rows(names, batches, known, PRESETS[preset], folder)
        for kind in ("model", "layer"):
            for line in pass_lines([row for row in measured if row.kind == kind]):
                console.print(f"{kind}s, {line}")
        for printed in table_of(*predict_left_out(measured, known)):
            console.print(printed)


def measure_rows(
    names: Sequence[str],
    batches: Sequence[int],
    table: LatencyTable,
    settings: TimingSettings,
    folder: Path,
) -> list[Measurement]:
    """Measures what the store in a folder does not hold yet; returns all of its rows.

    What an interrupted run has stored counts as measured, though it be of fewer passes.
    """
    store = create_store(folder / "measurements.sqlite")

    def cases() -> Iterator[Case]:
        for name in names:
            original, deployed_at = prepared(name)
            for images in batches:
                yield Case(name, original, deployed_at(0.5), example_of(original, images))

    for row in measured_rows(cases, table, settings, store.finished_keys()):
        store.put(row)
        figure = row.reason or _ms(row)
        console.print(f"{row.subject}, {row.lowering}: {figure}, passes: {row.details[PASSES]}")
    rows = list(store.rows())
    store.close()
    return rows


def _ms(row: Measurement) -> str:
    return f"{row.latency_ms:.3f} ms"


def _table(name: str | None) -> LatencyTable:
    """The latency table, which must be of this machine: its rows are set against new ones."""
    if name is None:
        raise BadInput("--table: --predicted-versus-measured needs the latency table of this CPU")
    table = LatencyTable.load(name)
    here = cpu_info(table.device.threads)
    if table.device.fingerprint != here.fingerprint:
        raise BadInput(f"--table {name}: is of {table.device.label}, this is {here.label}")
    return table


def parts_to_convert(mult: str = _MULT) -> tuple[list[ReparamConfig], ...]:
    """What is converted of a model, as far as it has it; of attentions what comes first, if it can.

    Args:
        mult: Form of the mult expert.
    """
    return (
        [ReparamConfig(attention="add"), ReparamConfig(attention="quadratic")],
        [ReparamConfig(attention_linears="shift_int8")],
        [ReparamConfig(mlp="moe", experts={"mult": mult, "shift": "shift_int8"})],
    )


def prepared(
    name: str, mult: str = _MULT, option: str = "--model"
) -> tuple[nn.Module, Callable[[float], nn.Module]]:
    """The original model, and a deployed conversion of it at a share of tokens on shift.

    It is converted as the second stage of the shipped recipes does (``parts_to_convert``).

    Args:
        name: Any timm model.
        mult: Form of the mult expert; the other one is ``shift_int8``.
        option: Where the name was given.

    Raises:
        BadInput: If timm has no such model, or nothing of it can be converted.
    """
    torch.manual_seed(0)
    try:
        original = timm.create_model(name).eval()
        converted = timm.create_model(name).eval()
    # What timm and the hub raise of a name, a folder or a file that they cannot make a model of.
    except (ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise BadInput(f"{option} {name}: {one_line(error)}") from error
    try:
        _, without = reparameterize_by_parts_(converted, *parts_to_convert(mult))
    except ConversionError as error:
        raise BadInput(f"{option} {name}: nothing of it can be converted: {error}") from error
    for reason in without:
        console.print(f"{name} is deployed without that: {reason}", markup=False)

    def deployed_at(share: float) -> nn.Module:
        deployed = deploy(converted)
        force_share_(deployed, share, example_of(original, 1))
        return deployed

    return original, deployed_at


def example_of(model: nn.Module, images: int) -> torch.Tensor:
    """Random images of the size that timm has a model for, ``(images, c, h, w)``."""
    return torch.randn(images, *resolve_data_config({}, model=model)["input_size"])


def _whole_numbers(option: str, text: str, least: int, largest: int) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(least <= number <= largest for number in numbers):
        raise BadInput(f"{option} {text}: must be whole numbers of {least} to {largest}")
    return numbers


def _ratios(comparison: Comparison) -> Table:
    table = Table(
        title=f"{comparison.model}, batch {comparison.batch}, {comparison.image_size} pixels",
        caption=f"best of PyTorch: {comparison.best_torch}; intervals 95 %",
    )
    for heading in ("", "ms", "against PyTorch's best", "against fp32 eager"):
        table.add_column(heading, justify="right" if heading else "left")
    for contestant in comparison.contestants:
        table.add_row(
            contestant.name,
            contestant.reason or _figure(contestant.latency_ms, ".3f"),
            _figure(comparison.speedup.get(contestant.name), ".2f", "×"),
            _figure(comparison.speedup_eager.get(contestant.name), ".2f", "×"),
        )
    return table


def _figure(interval: Interval | None, form: str, unit: str = "") -> str:
    if interval is None:
        return "–"
    return f"{interval.value:{form}}{unit} ({interval.low:{form}} … {interval.high:{form}})"


if __name__ == "__main__":
    run(app, (ConversionError, TableError))

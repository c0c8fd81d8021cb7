"""Measures deployed models: against PyTorch's best, and how attention grows with its tokens.

python -m reparam.evaluate --model deit_tiny_patch16_224 --versus-torch
python -m reparam.evaluate --model pvt_v2_b0 --versus-torch --batch 1,8 --share 0,50,100
python -m reparam.evaluate --scaling

A model is converted as the shipped recipes do (add attention, int8 shifts around it, a mixture of
int8 mult and shift experts) and deployed; its weights do not matter for its latency, the share of
tokens on shift does, and is set. Results go to versus_torch.json and scaling.json in --out.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
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

from kernels.torch_ops import set_threads
from profiler.command_line import BadInput, output_folder, run
from profiler.device import cpu_info
from profiler.samples import PRESETS
from reparam.convert import ConversionError, ReparamConfig, reparameterize_
from reparam.deploy import deploy
from reparam.results import Interval
from reparam.scaling import measure_scaling
from reparam.scaling_result import Scaling
from reparam.versus_torch import compare, force_share_
from reparam.versus_torch_result import Comparison, VersusTorch

app = typer.Typer(add_completion=False)
console = Console()

# As the shipped recipes convert.
_STAGES = (
    ReparamConfig(attention="add"),
    ReparamConfig(attention_linears="shift_int8", mlp="moe"),
)


@app.command(help=__doc__)
def main(
    model: Annotated[str, typer.Option(help="Any timm model.")] = "deit_tiny_patch16_224",
    versus_torch: Annotated[
        bool, typer.Option("--versus-torch", help="Whole models against PyTorch's best.")
    ] = False,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Attention from 64 to 16k tokens, add and softmax.")
    ] = False,
    batch: Annotated[str, typer.Option(help="Images at once, such as 1,8.")] = "1,8",
    share: Annotated[
        str, typer.Option(help="Percent of tokens on the shift expert, such as 0,50,100.")
    ] = "0,50,100",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    preset: Annotated[
        str, typer.Option(help=f"Precision of the timing: {', '.join(PRESETS)}.")
    ] = "standard",
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("runs/evaluate"),
) -> None:
    """Reads top to bottom as the story of an evaluation."""
    if not (versus_torch or scaling):
        raise BadInput("nothing to do: give --versus-torch, --scaling or both")
    if preset not in PRESETS:
        raise BadInput(f"--preset {preset}: must be one of {', '.join(PRESETS)}")
    batches = _whole_numbers("--batch", batch, 1, 4096)
    shares = _whole_numbers("--share", share, 0, 100)
    device = cpu_info(threads)
    folder = output_folder(out)
    set_threads(threads)
    header = {
        "device": device,
        "command": shlex.join(["python", "-m", "reparam.evaluate", *sys.argv[1:]]),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if versus_torch:
        original, deployed_at = prepared(model)
        comparisons = []
        for images in batches:
            example = _example(original, images)
            ours = {f"deployed, {part} % shift": deployed_at(part / 100) for part in shares}
            console.print(f"{model}, batch {images}: compiling and measuring, in turns")
            comparisons.append(compare(model, original, ours, example, PRESETS[preset]))
            console.print(_ratios(comparisons[-1]))
        VersusTorch(**header, comparisons=comparisons).save(folder / "versus_torch.json")
    if scaling:
        console.print("growth of attention with its tokens: measuring, in turns")
        rows = measure_scaling(PRESETS[preset])
        found = Scaling(**header, rows=rows)
        found.save(folder / "scaling.json")
        console.print(found.table())


def prepared(name: str) -> tuple[nn.Module, Callable[[float], nn.Module]]:
    """The original model, and a deployed conversion of it at a share of tokens on shift.

    Raises:
        BadInput: If timm has no such model.
    """
    torch.manual_seed(0)
    try:
        original = timm.create_model(name).eval()
        converted = timm.create_model(name).eval()
    except RuntimeError as error:
        raise BadInput(f"--model {name}: {error}") from error
    for stage in _STAGES:
        reparameterize_(converted, stage)

    def deployed_at(share: float) -> nn.Module:
        deployed = deploy(converted)
        force_share_(deployed, share, _example(original, 1))
        return deployed

    return original, deployed_at


def _example(model: nn.Module, images: int) -> torch.Tensor:
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
    run(app, (ConversionError,))

"""How long until a deployed model has its first result, in a process of its own?

python tests/prove/first_result.py --model pvt_v2_b0

In turns with an empty folder of compiled kernels and with what the process before has left there.
Neither counts imports, nor reading the model. Prints each and the median of their ratios with its
range. Exit code 1 if a process with kept kernels is ever no faster.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer

from kernels.compilation import FOLDER_VARIABLE
from profiler.command_line import EXIT_VERDICT_AGAINST, run
from reparam.convert import ConversionError
from reparam.deployed_file import load_deployed, save_deployed
from reparam.evaluate import example_of, prepared

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    model: Annotated[str, typer.Option(help="Any timm model.")] = "pvt_v2_b0",
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of processes.")] = 3,
) -> None:
    """Reads top to bottom as the story of the comparison."""
    original, deployed_at = prepared(model)
    ratios = []
    with tempfile.TemporaryDirectory() as place:
        saved, example = Path(place, "model.json"), Path(place, "example.pt")
        save_deployed(deployed_at(0.5), saved, create={"model_name": model})
        torch.save(example_of(original, 1), example)
        for number in range(rounds):
            kept = str(Path(place, f"kernels{number}"))
            empty_s, kept_s = (_in_a_process(saved, example, kept) for _ in range(2))
            ratios.append(empty_s / kept_s)
            print(f"{model}: {empty_s:.2f} s with nothing kept, {kept_s:.2f} s with all kernels")
    print(f"{median(ratios):.1f} times as soon ({min(ratios):.1f} to {max(ratios):.1f})")
    if min(ratios) <= 1:
        raise typer.Exit(EXIT_VERDICT_AGAINST)


def _in_a_process(saved: Path, example: Path, kept: str) -> float:
    """Seconds, as a fresh process has seen them."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", str(saved), str(example)],
        env={**os.environ, FOLDER_VARIABLE: kept},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout)


def _first_result(saved: str, example: str) -> None:
    model, x = load_deployed(saved), torch.load(example)
    start = time.perf_counter()
    with torch.no_grad():
        model(x)
    print(time.perf_counter() - start)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        _first_result(*sys.argv[2:])
    else:
        run(app, (ConversionError,))

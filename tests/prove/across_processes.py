"""How far do processes differ in one kernel's latency? Beside another checkout's, in turns.

python tests/prove/across_processes.py --shape 1568x32x256 --around residual
python tests/prove/across_processes.py --shape 42011x20x80 --beside ../before

What addresses a process has is chance, and what all of its samples share: no interval of one
process shows it. Each process binds the kernel to random operands of its own and measures by the
rules of a sweep on one thread; where another guest worked on the core it has no figure. Prints the
medians of all processes in order, and how many times as slow the other checkout is: geometric mean
of the turns with Student's 95 % interval.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import track
from schedules import geometric_mean

from profiler.command_line import BadInput, run

# Of what both checkouts have: it is run by each.
_ONE = """
import json, sys
from functools import partial
from kernels.build import build, set_threads
from kernels.reference import max_abs_error, random_operands
from kernels.workload import linear
from profiler.samples import PRESETS
from profiler.timing import measure_interleaved

form, m, k, n, *around = sys.argv[1:]
set_threads(1)
workload = linear(form, int(m), int(k), int(n), tuple(around))
kernel, operands = build(workload), random_operands(workload)
out, given = kernel.allocate(operands), kernel.pack(operands)
launch = partial(kernel.launch, *given, out)
launch()
assert max_abs_error(workload, operands, out)[1]
print(json.dumps(measure_interleaved({"": launch}, PRESETS["quick"])[""].latency_ms))
"""

app = typer.Typer(add_completion=False)


def latency_ms(checkout: Path, arguments: list[str]) -> float | None:
    """Of a new process, in ms; None where it was contended.

    Raises:
        BadInput: If it fails.
    """
    environment = os.environ | {"PYTHONPATH": str(checkout.resolve())}
    command = [sys.executable, "-c", _ONE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=checkout)
    if done.returncode:
        raise BadInput(f"{checkout}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return None if found is None else float(found)


@app.command(help=__doc__)
def main(
    shape: Annotated[str, typer.Option(help="Tokens, inputs and outputs: 1568x32x256.")],
    form: Annotated[str, typer.Option(help="Of a linear.")] = "shift_int8",
    around: Annotated[str, typer.Option(help="Fused around it, such as residual,gelu.")] = "",
    processes: Annotated[int, typer.Option(min=2, help="Of each checkout.")] = 10,
    beside: Annotated[Path | None, typer.Option(help="Folder of another checkout.")] = None,
) -> None:
    """Reads top to bottom as the turns."""
    sizes, fused = shape.split("x"), [name for name in around.split(",") if name]
    if len(sizes) != 3 or not all(size.isdecimal() for size in sizes):
        raise BadInput(f"--shape {shape}: is no MxKxN")
    if beside is not None and not (beside / "kernels").is_dir():
        raise BadInput(f"--beside {beside}: is no checkout")
    checkouts = {"this": Path(__file__).parents[2]} | ({"beside": beside} if beside else {})
    found: dict[str, list[float | None]] = {name: [] for name in checkouts}
    for turn in track(range(processes), "processes", transient=True):
        # Now the one first, now the other.
        for name in list(checkouts)[:: 1 if turn % 2 == 0 else -1]:
            found[name].append(latency_ms(checkouts[name], [form, *sizes, *fused]))
    for name, figures in found.items():
        known = sorted(figure for figure in figures if figure is not None)
        listed = " ".join(f"{1000 * figure:.4g}" for figure in known)
        gone = f"; {len(figures) - len(known)} contended" if len(known) < len(figures) else ""
        spread = f", largest {known[-1] / known[0]:.2f} times the least" if known else ""
        print(f"{form} {shape} {around} {name}: {listed} µs{spread}{gone}")
    if beside is not None:
        pairs = zip(found["beside"], found["this"], strict=True)
        ratio = geometric_mean([a / b for a, b in pairs if a is not None and b is not None])
        if ratio is not None:
            print(f"beside ÷ this: {ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f})")


if __name__ == "__main__":
    run(app)

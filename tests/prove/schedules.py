"""How fast are default schedules against another one? In turns, on shapes at random.

python tests/prove/schedules.py --against tile_rows=128,panels_outer=0,panels=1
    --lowerings mult.amx_dot,mult.amx_pairs,shift.amx_dot,shift.amx_nibbles

python tests/prove/schedules.py --against tile_rows=2 --lowerings mult.panels,shift.panels
    --config shiftaddvit-paper-one     (AVX2: tiles of whole panels, as before there were half ones)

Shapes are drawn from a sweep, of each lowering as many with more than --wide outputs as with fewer,
and operands are random; every kernel is checked against the oracle first. Prints geometric means
with Student's 95 % interval over the shapes. Exit code 1 if the default is surely slower.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Annotated

import torch
import typer

from kernels.build import LOWERINGS, BuildError, set_threads
from kernels.search import Schedule
from profiler.command_line import EXIT_VERDICT_AGAINST, BadInput, run
from profiler.model_workloads import ModelError
from profiler.samples import PRESETS
from profiler.settings import config_for, settings_for
from profiler.tune import Task, TuneError, launches, tasks_of, time
from reparam.ablation_summary import mean_interval
from reparam.results import Interval

# Beyond, one shape takes longer than all others.
_MOST_MACS = 6e9

app = typer.Typer(add_completion=False)


def geometric_mean(ratios: Sequence[float]) -> Interval | None:
    """With Student's interval of the logarithms; None of fewer than two."""
    found = mean_interval([math.log(ratio) for ratio in ratios])
    if found is None:
        return None
    return Interval(value=math.exp(found.value), low=math.exp(found.low), high=math.exp(found.high))


def schedule_of(text: str) -> Schedule:
    """``name=value,…`` as a schedule.

    Raises:
        BadInput: If it is something else.
    """
    try:
        return {name: int(value) for name, value in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise BadInput(f"--against {text}: must be name=value,…") from error


def drawn(tasks: Sequence[Task], names: Sequence[str], shapes: int, wide: int) -> list[Task]:
    """As many wide ones as others of each lowering, always the same."""
    found: list[Task] = []
    for name in names:
        own = [t for t in tasks if t.lowering == name and t.workload.macs <= _MOST_MACS]
        for is_wide in (True, False):
            some = [task for task in own if (task.workload.n > wide) == is_wide]
            found += random.Random(0).sample(some, min(len(some), shapes))
    return found


@app.command(help=__doc__)
def main(
    lowerings: Annotated[str, typer.Option(help="Names, separated by commas.")],
    against: Annotated[str, typer.Option(help="Values of a schedule; others are as by default.")],
    config: Annotated[str, typer.Option(help="Sweep that shapes are of.")] = "latency-models",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    shapes: Annotated[int, typer.Option(min=2, help="Of each lowering and side of --wide.")] = 12,
    wide: Annotated[int, typer.Option(min=0, help="Outputs.")] = 256,
) -> None:
    """Prints a line for each shape and one for each side."""
    names, other = lowerings.split(","), schedule_of(against)
    if unknown := [name for name in names if name not in LOWERINGS]:
        raise BadInput(f"--lowerings: no {', '.join(unknown)}")
    (setting,) = settings_for(*reversed(config_for(config, None, None)), "cpu", str(threads))
    torch.set_num_threads(threads)
    set_threads(threads)
    ratios: dict[bool, list[float]] = {True: [], False: []}
    for task in drawn(tasks_of(setting), names, shapes, wide):
        timings = time(launches(task), [task.default, {**task.default, **other}], PRESETS["quick"])
        if any(timing.latency_ms is None for timing in timings):
            print(f"{task.label}: {timings[0].reason or timings[1].reason}", flush=True)
            continue
        default_ms, other_ms = (float(timing.latency_ms or 0) for timing in timings)
        ratios[task.workload.n > wide].append(other_ms / default_ms)
        print(f"{task.label}: {other_ms / default_ms:.2f}", flush=True)
    slower = False
    for is_wide, found in ratios.items():
        side = f"{'more than' if is_wide else 'up to'} {wide} outputs, {len(found)} shapes"
        mean = geometric_mean(found)
        if mean is None:
            print(f"{side}: no figure")
            continue
        slower = slower or mean.high < 1
        print(
            f"{side}: the default is {mean.value:.3f} times as fast ({mean.low:.3f} to"
            f" {mean.high:.3f}), at least {min(found):.2f}"
        )
    if slower:
        raise typer.Exit(EXIT_VERDICT_AGAINST)


if __name__ == "__main__":
    run(app, (BuildError, TuneError, ModelError))

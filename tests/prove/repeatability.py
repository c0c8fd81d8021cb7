"""Runs a sweep twice into stores of their own and says how many rows agree.

python tests/prove/repeatability.py --out runs/prove
python tests/prove/repeatability.py --first a.sqlite --second b.sqlite

Interrupted, the same command goes on. Exit code 1 if fewer rows agree than the target asks.
"""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from profiler.command_line import EXIT_VERDICT_AGAINST, BadInput, output_folder, run
from profiler.measurement import CLOCK_RATE, Measurement
from profiler.store import open_store

WITHIN = 0.05
TARGET_SHARE = 0.9

app = typer.Typer(add_completion=False)


def as_measured(row: Measurement) -> float | None:
    """Latency in ms."""
    return row.latency_ms


def at_equal_clock(row: Measurement) -> float | None:
    """Latency in multiply-accumulates that the CPU's own loop makes in that time."""
    rate = row.details.get(CLOCK_RATE)
    return row.latency_ms * float(rate) if row.latency_ms and rate else None


def disagreements(
    first: Sequence[Measurement],
    second: Sequence[Measurement],
    figure: Callable[[Measurement], float | None] = as_measured,
) -> dict[str, list[float]]:
    """Relative differences of the figures of rows of the same key, by lowering.

    A row that only one of the two has a figure for disagrees by as much as can be.

    Args:
        first: Rows of one run.
        second: Of another.
        figure: What is compared.

    Returns:
        ``max(a / b, b / a) - 1`` for each key with a figure in either.
    """
    sides = [{row.key: row for row in rows} for rows in (first, second)]
    found: dict[str, list[float]] = defaultdict(list)
    for key in dict.fromkeys(key for side in sides for key in side):
        rows = [side.get(key) for side in sides]
        figures = [value for row in rows if row is not None and (value := figure(row))]
        lowering = next(row.lowering for row in rows if row is not None)
        if len(figures) == 2:
            found[lowering].append(max(figures) / min(figures) - 1)
        elif figures:
            found[lowering].append(float("inf"))
    return found


def load(location: str) -> list[Measurement]:
    """All rows of a store."""
    with closing(open_store(location)) as store:
        return list(store.rows())


def sweep_twice(config: str, folder: Path) -> list[str]:
    """The two stores; what they hold already is not measured again."""
    stores = [str(folder / f"repeat_{number}.sqlite") for number in (1, 2)]
    for store in stores:
        command = [sys.executable, "-m", "profiler.sweep", "--config", config, "--store", store]
        if subprocess.run(command, check=False).returncode != 0:
            raise BadInput(f"--config {config}: the sweep failed, see above")
    return stores


@app.command(help=__doc__)
def main(
    config: Annotated[str, typer.Option(help="Sweep to run twice.")] = "quick-cpu",
    out: Annotated[Path, typer.Option(help="Folder.")] = Path("runs/prove"),
    first: Annotated[str | None, typer.Option(help="A run that there is already.")] = None,
    second: Annotated[str | None, typer.Option(help="And another.")] = None,
) -> None:
    """Prints the figure, and who disagrees."""
    if (first is None) != (second is None):
        raise BadInput("--first and --second: one needs the other")
    stores = (first, second) if first and second else sweep_twice(config, output_folder(out))
    rows = [load(store) for store in stores]
    found = disagreements(*rows)
    if not found:
        raise BadInput(f"{stores[0]}, {stores[1]}: no rows with a figure")
    for lowering, differences in sorted(found.items()):
        print(f"{lowering:24} {agreement(differences)}, worst {max(differences):.1%}")
    at_one_clock = together(disagreements(*rows, figure=at_equal_clock))
    if at_one_clock:
        print(f"at equal clock: {agreement(at_one_clock)}")
    every = together(found)
    print(f"two runs agree: {agreement(every)} (target {TARGET_SHARE:.0%})")
    if sum(difference <= WITHIN for difference in every) < TARGET_SHARE * len(every):
        raise typer.Exit(EXIT_VERDICT_AGAINST)


def together(found: dict[str, list[float]]) -> list[float]:
    """The differences of all lowerings."""
    return [difference for differences in found.values() for difference in differences]


def agreement(differences: Sequence[float]) -> str:
    """How many are small enough, in words."""
    agreeing = sum(difference <= WITHIN for difference in differences)
    share = agreeing / len(differences)
    return (
        f"{agreeing} of {len(differences)} rows within {WITHIN:.0%}, {share:.1%};"
        f" median {median(differences):.2%}"
    )


if __name__ == "__main__":
    run(app)

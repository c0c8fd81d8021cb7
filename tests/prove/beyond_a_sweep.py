"""What do models of other devices bring beyond the sizes of a sweep, on rows it has not seen?

python tests/prove/beyond_a_sweep.py --store runs/quick/measurements.sqlite
    --rows amd-zen3-avx2-2c-1t --prior amd-zen4-avx512-2c-1t --prior intel-xeon-amx-2c-1t

Fits the store's kernels twice, alone and with the priors, and sets both against the rows of another
sweep of the same device. A prior must be of another device: else it has learned from those rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from cost_models.fit import fit
from cost_models.fitted_model import FittedModel
from cost_models.held_out import interval_coverage, mape
from cost_models.latency_table import LatencyTable, TableError
from cost_models.shipped_rows import shipped_rows
from cost_models.shipped_tables import shipped_tables
from cost_models.training_rows import (
    Row,
    choose_device,
    group_rows,
    of_primitives,
    read_store,
    store_name,
)
from profiler.command_line import BadInput, run

_LEAST_ROWS = 5

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Errors:
    """Of one kernel on rows outside the sizes of a sweep, alone and with priors, in percent.

    Attributes:
        rows: Number of them.
        mape: Mean absolute errors.
        coverage: Shares of rows in their 90 % intervals.
    """

    kernel: str
    rows: int
    mape: tuple[float, float]
    coverage: tuple[float, float]


def errors(alone: FittedModel, both: FittedModel, rows: Sequence[Row]) -> Errors | None:
    """None with fewer than 5 rows outside."""
    outside = alone.predict_many([row.workload for row in rows]).octaves_outside > 0
    far = [row for row, is_far in zip(rows, outside) if is_far]
    if len(far) < _LEAST_ROWS:
        return None
    measured = np.array([row.latency_ms for row in far])
    found = [model.predict_many([row.workload for row in far]) for model in (alone, both)]
    mapes = [mape(one.latency_ms, measured) or 0.0 for one in found]
    covered = [interval_coverage(one.low_ms, one.high_ms, measured) or 0.0 for one in found]
    kernel = f"{alone.form} {alone.lowering}"
    return Errors(kernel, len(far), (mapes[0], mapes[1]), (covered[0], covered[1]))


def compared(alone: LatencyTable, both: LatencyTable, rows: Sequence[Row]) -> list[Errors]:
    """Of each kernel that both have a model of and enough rows are of."""
    found = []
    for first, second in zip(alone.models, both.models):
        own = [
            row
            for row in rows
            if (row.workload.form, row.measurement.lowering) == (first.form, first.lowering)
            and row.workload.is_canonical
        ]
        one = errors(first, second, own)
        if one:
            found.append(one)
    return found


@app.command(help=__doc__)
def main(
    store: Annotated[str, typer.Option(help="The sweep to fit.")],
    rows: Annotated[str, typer.Option(help="Another of the same device: a table that ships.")],
    prior: Annotated[list[str], typer.Option(help="As for cost_models.fit.")],
) -> None:
    """Prints a line for each kernel."""
    if rows not in shipped_tables():
        raise BadInput(f"--rows {rows}: ships not; known: {', '.join(shipped_tables())}")
    swept, others = read_store(store), of_primitives(shipped_rows(rows))
    here = choose_device(of_primitives(swept), store_name(store), None)
    there = choose_device(others, rows, None)
    if there.fingerprint != here.fingerprint:
        raise BadInput(f"--rows {rows}: is of {there.label}, the store of {here.label}")
    for name in prior:
        if LatencyTable.load(name).device.fingerprint == there.fingerprint:
            raise BadInput(f"--prior {name}: is of the device itself")
    tables = [fit(swept, store_name(store), priors=names)[0] for names in ((), prior)]
    every = [row for group in group_rows(others, there).groups.values() for row in group]
    found = compared(tables[0], tables[1], every)
    table = Table(title=f"Beyond the sizes of {store_name(store)}, on rows of {rows}")
    for heading in ("kernel", "rows", "alone", "with priors", "covered alone", "with priors"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    for one in found:
        figures = (*(f"{e:.1f} %" for e in one.mape), *(f"{c:.0f} %" for c in one.coverage))
        table.add_row(one.kernel, str(one.rows), *figures)
    console = Console()
    console.print(table)
    total = sum(one.rows for one in found)
    means = [sum(one.mape[i] * one.rows for one in found) / max(1, total) for i in (0, 1)]
    console.print(f"{total} rows: {means[0]:.1f} % alone, {means[1]:.1f} % with priors")


if __name__ == "__main__":
    run(app, (TableError,))

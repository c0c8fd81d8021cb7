"""How right the latency models are: on held-out kernels, on another device, and how fast.

python -m cost_models.validate                        the rows behind a table that ships
python -m cost_models.validate --store rows.sqlite
python -m cost_models.validate --onto amd-zen3-avx2-2c-1t

kernels   errors on rows that no model has seen, beside work alone, a roofline, the nearest shape
transfer  to other devices of the store and of --onto: these models with a few rows of the other one
speed     fitting, one lookup, many predictions
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import typer
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy.stats import spearmanr

from cost_models.features import Sizes
from cost_models.fit import fit
from cost_models.fitted_model import FittedModel
from cost_models.held_out import error_table, interval_coverage, mape
from cost_models.latency_table import LatencyTable, TableError
from cost_models.rivals import RIVALS
from cost_models.shipped_rows import shipped_rows
from cost_models.shipped_tables import shipped_tables
from cost_models.training_rows import (
    Groups,
    choose_device,
    group_rows,
    of_primitives,
    read_store,
    store_name,
)
from cost_models.transfer import TRANSFER_ROWS, TransferredLatency, choose_rows
from kernels.workload import Workload
from profiler.command_line import BadInput, run
from profiler.device import DeviceInfo
from profiler.store import Measurement

app = typer.Typer(add_completion=False)

_LEAST_TEST_ROWS = 8
_MANY = 100_000


@dataclass(frozen=True)
class TransferError:
    """Errors of one kernel's model on a device that it was carried over to.

    Attributes:
        form, lowering: The kernel.
        rows: Rows of the new device that the model had.
        rows_test: Its other rows, which the errors are of.
        mape: By estimator: ``transfer`` and each of RIVALS, fitted on the same rows, in percent.
        spearman: Rank correlation of predicted and measured latency, likewise.
        coverage: Share of test rows in the transferred model's 90 % interval, in percent.
    """

    form: str
    lowering: str
    rows: int
    rows_test: int
    mape: dict[str, float]
    spearman: dict[str, float]
    coverage: float


def transfer_errors(
    models: Sequence[FittedModel], there: Groups, device: DeviceInfo, number: int = TRANSFER_ROWS
) -> list[TransferError]:
    """Carries each model over to another device and tests it on the rows that it was not given.

    Args:
        models: Of the known device.
        there: Rows of the other one.
        device: The other one.
        number: Rows of it that each model may have.
    """
    found = []
    for model in models:
        rows = there.get((model.form, model.lowering), [])
        if len(rows) < number + _LEAST_TEST_ROWS:
            continue
        workloads = [row.workload for row in rows]
        given = choose_rows(workloads, number)
        rest = sorted(set(range(len(rows))) - set(given))
        known, seen = [workloads[i] for i in given], [rows[i].latency_ms for i in given]
        unseen, truth = [workloads[i] for i in rest], [rows[i].latency_ms for i in rest]
        main = TransferredLatency(model, device).fit(known, seen).predict_interval(unseen)
        predicted = {"transfer": main.latency_ms}
        predicted |= {name: r().fit(known, seen).predict(unseen) for name, r in RIVALS.items()}
        found.append(
            TransferError(
                form=model.form,
                lowering=model.lowering,
                rows=number,
                rows_test=len(rest),
                mape={name: _known(mape(values, truth)) for name, values in predicted.items()},
                spearman={
                    name: float(spearmanr(values, truth).statistic)
                    for name, values in predicted.items()
                },
                coverage=_known(interval_coverage(main.low_ms, main.high_ms, truth)),
            )
        )
    return found


def _known(figure: float | None) -> float:
    assert figure is not None, "there is a row to test on"
    return figure


def transfer_table(errors: Sequence[TransferError], source: str, target: str) -> Table:
    """Errors after a transfer for people, one line a kernel."""
    table = Table(
        title=f"Transfer: {escape(source)} -> {escape(target)}",
        caption=f"each with the same {TRANSFER_ROWS} rows of the new device: MAPE, and Spearman's "
        "rank correlation",
        box=SIMPLE,
        padding=0,
    )
    for heading in ("form", "lowering"):
        table.add_column(heading, no_wrap=True)
    for heading in ("test", "transfer", "covered", *RIVALS):
        table.add_column(heading, justify="right", no_wrap=True)
    for error in errors:
        both = {name: f"{error.mape[name]:.1f}% {error.spearman[name]:.3f}" for name in error.mape}
        table.add_row(
            escape(error.form),
            escape(error.lowering),
            str(error.rows_test),
            both["transfer"],
            f"{error.coverage:.0f}%",
            *(both[name] for name in RIVALS),
        )
    return table


def speed_lines(table: LatencyTable, rows: int, fit_s: float) -> list[str]:
    """How long fitting took, and what a lookup and many predictions take here."""
    model = max(table.models, key=lambda one: len(one.points))
    generator = np.random.default_rng(0)
    octaves = generator.uniform([0, 0, 4, 4], [0, 16, 12, 12], (_MANY, 4))
    start = time.perf_counter()
    model.predict_many(Sizes(*(2.0**octaves).round().T))
    many_s = time.perf_counter() - start
    known = next(e.workload for e in table.entries if e.workload.form == model.form)
    shapes = [known.with_sizes(m=1000 + i) for i in range(200)]
    index_us = _each_us(table, [known.with_sizes(m=999)], model.lowering)
    first_us = _each_us(table, shapes, model.lowering)
    again_us = _each_us(table, shapes, model.lowering)
    return [
        f"fitting {rows} rows: {fit_s:.1f} s ({2000 * fit_s / max(1, rows):.0f} s for 2,000)",
        f"lookup: {first_us:.1f} µs for a shape that was never asked for, {again_us:.1f} µs again;"
        f" the first of a table {index_us / 1000:.1f} ms",
        f"{_MANY} predictions of {model.form} {model.lowering} ({len(model.points)} training rows)"
        f": {many_s:.2f} s",
    ]


def _each_us(table: LatencyTable, shapes: Sequence[Workload], lowering: str) -> float:
    start = time.perf_counter()
    for workload in shapes:
        table.lookup(workload, lowering)
    return 1e6 * (time.perf_counter() - start) / len(shapes)


def _others(measurements: Sequence[Measurement], known: DeviceInfo) -> list[DeviceInfo]:
    devices = {row.device.fingerprint: row.device for row in measurements}
    return [info for key, info in sorted(devices.items()) if key != known.fingerprint]


@app.command(help=__doc__)
def main(
    store: Annotated[
        str | None, typer.Option(help="Measurements: an SQLite file or a SQLAlchemy URL.")
    ] = None,
    shipped: Annotated[
        str, typer.Option(help="Without --store: name of a table that ships.")
    ] = shipped_tables()[0],
    device: Annotated[
        str | None,
        typer.Option(help="Fingerprint of the device to model; others are transferred to."),
    ] = None,
    onto: Annotated[
        str | None, typer.Option(help="A further store, or table that ships, to transfer to.")
    ] = None,
) -> None:
    """Reads top to bottom as the three questions."""
    console = Console()
    name = shipped if store is None else store_name(store)
    hot = of_primitives(shipped_rows(shipped) if store is None else read_store(store))
    known = choose_device(hot, name, device)
    if onto is not None:
        further = shipped_rows(onto) if onto in shipped_tables() else read_store(onto)
        others = [r for r in of_primitives(further) if r.device.fingerprint != known.fingerprint]
        if not others:
            raise BadInput(
                f"--onto {store_name(onto)}: no hot row of another device to transfer to"
            )
        hot += others
    start = time.perf_counter()
    table, result = fit(hot, name, known.fingerprint)
    fit_s = time.perf_counter() - start
    console.print(error_table(result.fits, result.device))
    for other in _others(hot, known):
        there = group_rows(hot, other).groups
        errors = transfer_errors(table.models, there, other)
        if errors:
            console.print(transfer_table(errors, known.label, other.label))
        else:
            console.print(f"no transfer to {other.label}: too few rows", markup=False)
    rows = sum(len(one.points) + one.learned_from_shared * one.rows_shared for one in result.fits)
    for line in speed_lines(table, rows, fit_s) if table.models else ():
        console.print(line, markup=False, highlight=False)


if __name__ == "__main__":
    run(app, (TableError,))

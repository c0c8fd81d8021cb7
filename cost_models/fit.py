"""SPINE and CLI: measurements -> latency models -> latency table, with held-out errors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import geometric_mean
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track
from sklearn.base import clone

from cost_models.entry import EnergySource, Entry
from cost_models.fit_result import FitResult, LoweringFit
from cost_models.fitted_model import FittedModel
from cost_models.held_out import error_table, is_locked, validate
from cost_models.latency_table import MODELLED_ENERGY, LatencyTable, TableError
from cost_models.layer_models import fit_overheads, predict_left_out
from cost_models.models import MIN_ROWS, LearnedLatency
from cost_models.operation_energy import UnknownOperation, operation_energy
from cost_models.own_speeds import OwnSpeed
from cost_models.priors import priors_of
from cost_models.shipped_tables import shipped_tables
from cost_models.training_rows import (
    Row,
    choose_device,
    group_rows,
    of_primitives,
    read_store,
    store_name,
)
from profiler.command_line import BadInput, output_folder, run
from profiler.interleaved import speeds_over_int8
from profiler.store import Measurement

NO_PRIOR = "none"

app = typer.Typer(add_completion=False)


def fit(
    measurements: Iterable[Measurement],
    source: str,
    device: str | None = None,
    seed: int = 0,
    priors: Sequence[str] = (),
) -> tuple[LatencyTable, FitResult]:
    """Measurements -> table and held-out errors.

    Args:
        measurements: Rows of a store.
        source: Name of the store; goes into both results.
        device: Fingerprint; needed where the rows are of several devices.
        seed: Of the search for hyper-parameters.
        priors: Tables of other devices, by name or file, whose models are carried over to answer
            for what lies outside of the rows.

    Raises:
        TableError: If one of those cannot be read.
        BadInput: If no row can be used, or the rows are of several devices.
    """
    every = list(measurements)
    hot = of_primitives(every)
    info = choose_device(hot, source, device)
    found = group_rows(hot, info)
    groups, skipped = found.groups, dict(found.skipped)
    if not groups:
        raise BadInput(f"{source}: no hot row of a primitive on {info.label} has a latency")
    fits: list[LoweringFit] = []
    models: list[FittedModel] = []
    energy_models: list[FittedModel] = []
    known = priors_of(priors, info)
    progress = Console(stderr=True)
    for (form, lowering), rows in track(
        groups.items(), "fitting", console=progress, transient=True
    ):
        modelled = [row for row in rows if row.workload.is_canonical]
        if len(modelled) < MIN_ROWS:
            skipped[f"{form} {lowering}"] = (
                f"{len(modelled)} rows, a model needs {MIN_ROWS}; only measured shapes are known"
            )
            continue
        is_baseline = modelled[0].measurement.is_baseline
        model = LearnedLatency(form, lowering, is_baseline, info, seed)
        shared, others = found.shared[form, lowering], known.get((form, lowering), {})
        fits.append(validate(model, modelled, shared, others))
        models.append(model.fitted_)
        energy_models += energy_model(model, modelled)
    created_at = datetime.now(UTC).isoformat(timespec="seconds")
    table = LatencyTable(
        device=info,
        created_at=created_at,
        store=source,
        entries=tuple(to_entry(row) for rows in groups.values() for row in rows),
        models=tuple(models),
        energy_models=tuple(energy_models),
        own_speeds=own_speeds(row for row in hot if row.device.fingerprint == info.fingerprint),
    )
    predicted, without = predict_left_out(every, table)
    table = table.model_copy(update={"overheads": fit_overheads(predicted) or None})
    result = FitResult(
        store=source,
        device=info,
        seed=seed,
        created_at=created_at,
        fits=fits,
        skipped=skipped
        | {f"what {subject} takes beside its kernels": why for subject, why in without.items()},
    )
    return table, result


def energy_model(latency: LearnedLatency, rows: Sequence[Row]) -> list[FittedModel]:
    """The model of measured energy in mJ beside one of latency; none where too few were measured.

    Args:
        latency: The kernel's latency model.
        rows: Of the same kernel; those of locked groups are left out.
    """
    known = [
        (row.workload, row.measurement.energy_mj)
        for row in rows
        if row.measurement.energy_mj is not None and not is_locked(row.workload)
    ]
    if len(known) < MIN_ROWS:
        return []
    model = clone(latency).fit([w for w, _ in known], [energy_mj for _, energy_mj in known])
    return [model.fitted_]


def own_speeds(rows: Iterable[Measurement]) -> dict[str, OwnSpeed]:
    """By form, from the hot rows of one device."""
    return {
        form: OwnSpeed(
            mean=geometric_mean(speeds),
            least=min(speeds),
            most=max(speeds),
            products=len(speeds),
        )
        for form, speeds in sorted(speeds_over_int8(rows).items())
    }


def to_entry(row: Row) -> Entry:
    """A measured row as the table keeps it; a missing energy is modelled and says so."""
    measured = row.measurement
    energy_mj, reason = measured.energy_mj, None
    source: EnergySource | None = "measured"
    if energy_mj is None:
        energy_mj, source, reason = _modelled_energy(row)
    return Entry(
        workload=row.workload,
        lowering=measured.lowering,
        is_baseline=measured.is_baseline,
        latency_ms=row.latency_ms,
        low_ms=row.low_ms,
        high_ms=row.high_ms,
        weight_bytes=measured.weight_bytes,
        energy_mj=energy_mj,
        energy_source=source,
        energy_reason=reason,
        on_shared_core=measured.on_shared_core,
    )


def _modelled_energy(row: Row) -> tuple[float | None, EnergySource | None, str]:
    missing = row.measurement.energy_reason
    try:
        energy_mj = operation_energy(row.workload).with_memory_mj
    except UnknownOperation as error:
        return None, None, f"{missing}; {error}"
    return energy_mj, "modelled", f"{missing}; {MODELLED_ENERGY}"


@app.command()
def main(
    store: Annotated[
        str, typer.Option(help="Measurements to fit on: an SQLite file or a SQLAlchemy URL.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Folder for the results; the store's own if not given.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Fingerprint, where the store holds several devices.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of the search for hyper-parameters.")
    ] = 0,
    prior: Annotated[
        list[str] | None,
        typer.Option(
            help="Table whose models are carried over to answer for sizes outside of the rows: a"
            f" file, the name of one that ships, or {NO_PRIOR}. All that ship if not given."
        ),
    ] = None,
) -> None:
    """Fits latency models and writes latency_table.json and fit.json."""
    if out is None and "://" in store:
        raise BadInput("--out: is needed with a database URL as --store")
    priors = shipped_tables() if prior is None else [name for name in prior if name != NO_PRIOR]
    table, result = fit(read_store(store), store_name(store), device, seed, priors)
    folder = output_folder(Path(store).parent if out is None else out)
    table.save(folder / "latency_table.json")
    result.save(folder / "fit.json")
    console = Console()
    console.print(error_table(result.fits, result.device))
    for subject, reason in result.skipped.items():
        console.print(f"no model of {subject}: {reason}", markup=False, soft_wrap=True)
    if table.caution:
        console.print(f"caution: {table.caution}", markup=False, soft_wrap=True)
    console.print(
        f"{len(table.entries)} measured rows and {len(table.models)} models -> "
        f"{folder / 'latency_table.json'}",
        markup=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    run(app, (TableError,))

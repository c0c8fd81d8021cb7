"""SPINE and CLI: measurements -> latency models -> latency table, with held-out errors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from cost_models.fit_result import FitResult, LoweringFit
from cost_models.fitted_model import FittedModel
from cost_models.latency_table import (
    MODELLED_ENERGY,
    EnergySource,
    Entry,
    LatencyTable,
    TableError,
    is_canonical,
)
from cost_models.models import MIN_ROWS, LearnedLatency
from cost_models.operation_energy import UnknownOperation, operation_energy
from cost_models.validate import error_table, validate
from kernels.workload import Workload
from profiler.command_line import BadInput, output_folder, run
from profiler.device import DeviceInfo
from profiler.store import Measurement, open_store

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Row:
    """A hot measurement of one primitive, narrowed to what a model needs."""

    workload: Workload
    latency_ms: float
    low_ms: float
    high_ms: float
    measurement: Measurement


def fit(
    measurements: Iterable[Measurement],
    store_name: str,
    device: str | None = None,
    seed: int = 0,
) -> tuple[LatencyTable, FitResult]:
    """Measurements -> table and held-out errors.

    Args:
        measurements: Rows of a store.
        store_name: Goes into both results.
        device: Fingerprint; needed where the rows are of several devices.
        seed: Of the split and of the search for hyper-parameters.

    Raises:
        BadInput: If no row can be used, or the rows are of several devices.
    """
    of_primitives = [
        row
        for row in measurements
        if row.kind == "primitive" and row.workload is not None and row.cache == "hot"
    ]
    info = choose_device(of_primitives, store_name, device)
    groups, skipped = group_rows(
        row for row in of_primitives if row.device.fingerprint == info.fingerprint
    )
    if not groups:
        raise BadInput(f"{store_name}: no hot row of a primitive on {info.label} has a latency")
    fits: list[LoweringFit] = []
    models: list[FittedModel] = []
    progress = Console(stderr=True)
    for (form, lowering), rows in track(
        groups.items(), "fitting", console=progress, transient=True
    ):
        modelled = [row for row in rows if is_canonical(row.workload)]
        if len(modelled) < MIN_ROWS:
            skipped[f"{form} {lowering}"] = (
                f"{len(modelled)} rows, a model needs {MIN_ROWS}; only measured shapes are known"
            )
            continue
        workloads = [row.workload for row in modelled]
        latencies = [row.latency_ms for row in modelled]
        is_baseline = modelled[0].measurement.is_baseline
        model = LearnedLatency(form, lowering, is_baseline, info, seed)
        fits.append(validate(model, workloads, latencies, seed))
        models.append(model.fit(workloads, latencies).fitted_)
    created_at = datetime.now(UTC).isoformat(timespec="seconds")
    table = LatencyTable(
        device=info,
        created_at=created_at,
        store=store_name,
        entries=tuple(to_entry(row) for rows in groups.values() for row in rows),
        models=tuple(models),
    )
    result = FitResult(
        store=store_name,
        device=info,
        seed=seed,
        created_at=created_at,
        fits=fits,
        skipped=skipped,
    )
    return table, result


def choose_device(rows: list[Measurement], store_name: str, fingerprint: str | None) -> DeviceInfo:
    """The device to model: one table answers for one device.

    Raises:
        BadInput: If there is none, several and no choice, or not the one chosen.
    """
    found = {row.device.fingerprint: row.device for row in rows}
    if not found:
        raise BadInput(
            f"{store_name}: no hot rows of primitives; measure some with `python -m profiler.sweep`"
        )
    names = "; ".join(f"{key} = {info.label}" for key, info in sorted(found.items()))
    if fingerprint is not None and fingerprint not in found:
        raise BadInput(f"--device {fingerprint}: not in {store_name}; there are: {names}")
    if fingerprint is None and len(found) > 1:
        raise BadInput(f"{store_name}: several devices; choose one with --device: {names}")
    return found[fingerprint or next(iter(found))]


def group_rows(
    rows: Iterable[Measurement],
) -> tuple[dict[tuple[str, str], list[Row]], dict[str, str]]:
    """Rows with a latency and its interval by form and lowering, and why others are left out.

    Returns:
        The groups, and by form and lowering the reason of those that have no row at all.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    reasons: dict[tuple[str, str], str] = {}
    for row in rows:
        assert row.workload is not None
        key = (row.workload.form, row.lowering)
        if row.latency_ms is None:
            reasons[key] = f"{row.status}: {row.reason}"
        elif row.latency_low_ms is None or row.latency_high_ms is None:
            reasons[key] = "rows have no confidence interval of their latency"
        elif not 0 < row.latency_low_ms <= row.latency_ms <= row.latency_high_ms:
            reasons[key] = "latency lies outside its confidence interval"
        else:
            groups.setdefault(key, []).append(
                Row(row.workload, row.latency_ms, row.latency_low_ms, row.latency_high_ms, row)
            )
    skipped = {
        f"{form} {lowering}": f"no usable row; the last one: {reason}"
        for (form, lowering), reason in reasons.items()
        if (form, lowering) not in groups
    }
    return dict(sorted(groups.items())), skipped


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
        int, typer.Option(min=0, max=2**32 - 1, help="Seed of the held-out split.")
    ] = 0,
) -> None:
    """Fits latency models and writes latency_table.json and fit.json."""
    if out is None and "://" in store:
        raise BadInput("--out: is needed with a database URL as --store")
    source = open_store(store)
    try:
        measurements = list(source.rows())
    finally:
        source.close()
    # A URL may carry a password in front of its last slash or behind a question mark.
    store_name = store.rpartition("/")[2].partition("?")[0]
    table, result = fit(measurements, store_name, device, seed)
    folder = output_folder(Path(store).parent if out is None else out)
    table.save(folder / "latency_table.json")
    part = folder / "fit.json.part"
    result.save(part)
    part.replace(folder / "fit.json")
    console = Console()
    console.print(error_table(result.fits, result.device))
    for subject, reason in result.skipped.items():
        console.print(f"no model of {subject}: {reason}", markup=False, soft_wrap=True)
    console.print(
        f"{len(table.entries)} measured rows and {len(table.models)} models -> "
        f"{folder / 'latency_table.json'}",
        markup=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    run(app, (TableError,))

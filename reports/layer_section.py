"""Section on the layers of a deployed model: measured, predicted, weight bytes, memory."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from cost_models.latency_table import LatencyTable
from cost_models.work import Work, WorkError
from profiler.store import Measurement
from reports import model_plots
from reports.comparisons import latency
from reports.formats import (
    Cell,
    bytes_cell,
    milliseconds_cell,
    missing,
    number_cell,
    percent,
    percent_cell,
)
from reports.html import MAX_MARKS, Picture, Section, Table
from reports.run_folder import RunFolder

MAX_LAYERS_DRAWN = 40


def layers(run: RunFolder) -> Section:
    """By how much, layer by layer: what is measured against the sum of its kernels."""
    title = "Layer by layer"
    if run.rows is None:
        return Section("layers", title, missing=run.absence("measurements.sqlite"))
    rows = [row for row in run.rows if row.kind == "layer" or _is_predicted_model(row)]
    if not rows:
        return Section(
            "layers",
            title,
            missing="measurements.sqlite holds no layer of a deployed model. "
            f"This makes them: {run.more_commands['layers']}",
        )
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for row in rows:
        if row.kind == "model":
            groups.setdefault(("whole models", row.device.label), []).append(row)
            continue
        model = f"{row.details.get('model') or row.subject}, batch {row.details.get('batch', '?')}"
        groups.setdefault((model, row.device.label), []).append(row)
    pictures = tuple(
        picture
        for index, ((model, _), some) in enumerate(groups.items())
        if (picture := _picture(model, some, index, run.table))
    )
    tables = tuple(
        _table(model, device, some, run.table) for (model, device), some in groups.items()
    )
    lead = (
        "Measured is the layer or model as it is deployed; predicted is the sum of its kernels in "
        "the latency table (modelled where a kernel was not measured) and, where the table has "
        "one, a fitted overhead for what is no kernel: routing, launches, what is left to torch.",
        *_errors(run.table),
    )
    return Section("layers", title, lead, pictures, tables, (run.more_commands["layers"],))


def _name(row: Measurement) -> str:
    if row.kind == "model":
        return f"{row.subject}, {row.lowering}"
    share = row.details.get("share")
    part = "" if share is None else f", {share} % shift"
    return f"{row.details.get('layer') or row.subject}{part}"


def _detail(row: Measurement, name: str) -> float | None:
    value = row.details.get(name)
    return float(value) if isinstance(value, int | float) else None


def _is_predicted_model(row: Measurement) -> bool:
    return row.kind == "model" and "kernel_ms" in row.details


def _errors(table: LatencyTable | None) -> tuple[str, ...]:
    known = [one for one in (table.overheads or () if table else ()) if one.mape is not None]
    return tuple(
        f"On {one.models} {one.lowering} models, each predicted from the {one.kind}s of the "
        f"others, that is off by {percent(one.mape)} (MAPE of {one.rows} rows)."
        for one in known
    )


def _predicted_ms(row: Measurement, table: LatencyTable | None) -> float | None:
    kernel_ms = _detail(row, "kernel_ms")
    overhead = table.overhead(row.kind, row.lowering) if table else None
    if kernel_ms is None or overhead is None:
        return kernel_ms
    try:
        work = Work.of_details(row.details)
    except WorkError:
        return kernel_ms
    return float(overhead.latency_ms(kernel_ms, work.counts))


def _picture(
    model: str, rows: Sequence[Measurement], index: int, table: LatencyTable | None
) -> Picture | None:
    drawn = sorted(rows, key=lambda row: -(row.latency_ms or 0))[:MAX_LAYERS_DRAWN]
    kept = [row for row in rows if row in drawn]
    frame = pd.DataFrame(
        [
            {
                "layer": _name(row),
                "measured_ms": row.latency_ms,
                "measured_low_ms": row.latency_low_ms,
                "measured_high_ms": row.latency_high_ms,
                "predicted_ms": _predicted_ms(row, table),
                "predicted_low_ms": None,
                "predicted_high_ms": None,
                "weight_bytes": row.weight_bytes,
                "peak_memory_bytes": row.peak_memory_bytes,
            }
            for row in kept[:MAX_MARKS]
        ]
    ).astype({"measured_ms": float, "predicted_ms": float})
    if frame[["measured_ms", "predicted_ms"]].isna().all(axis=None):
        return None
    return Picture(
        f"layers-{index}",
        f"Latency by layer, {model}",
        model_plots.measured_predicted,
        frame,
        f"Measured and predicted latency of {len(frame)} layers; figures in the table.",
        "Filled: measured. Hollow: predicted.",
        {"axis": "latency, ms a batch"},
    )


def _table(
    model: str, device: str, rows: Sequence[Measurement], table: LatencyTable | None
) -> Table:
    cells: list[tuple[str | Cell, ...]] = []
    for row in rows:
        predicted = _predicted_ms(row, table)
        ratio = 100 * (predicted / row.latency_ms - 1) if predicted and row.latency_ms else None
        tokens = {
            name.removeprefix("tokens."): value
            for name, value in row.details.items()
            if name.startswith("tokens.")
        }
        cells.append(
            (
                _name(row),
                row.lowering,
                milliseconds_cell(latency(row)) if row.latency_ms else missing(row.reason),
                number_cell(predicted, "not recorded"),
                percent_cell(ratio, "needs both"),
                bytes_cell(row.weight_bytes, "not recorded"),
                bytes_cell(row.peak_memory_bytes, "not tracked"),
                ", ".join(f"{expert} {count}" for expert, count in tokens.items())
                or missing("no experts"),
            )
        )
    return Table(
        f"Layers of {model} on {device}",
        (
            "layer",
            "form",
            "measured",
            "predicted, ms",
            "predicted − measured",
            "weight bytes",
            "peak memory",
            "tokens by expert",
        ),
        tuple(cells),
    )

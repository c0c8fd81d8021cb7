"""Section on the layers of a deployed model: measured, predicted, weight bytes, memory."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from profiler.store import Measurement
from reports import model_plots
from reports.comparisons import latency
from reports.formats import (
    Cell,
    bytes_cell,
    milliseconds_cell,
    missing,
    number_cell,
    percent_cell,
)
from reports.html import MAX_MARKS, Picture, Section, Table
from reports.run_folder import RunFolder

LAYERS = "python -m reparam.evaluate --predicted-versus-measured"
MAX_LAYERS_DRAWN = 40


def layers(run: RunFolder) -> Section:
    """By how much, layer by layer: what is measured against the sum of its kernels."""
    title = "Layer by layer"
    if run.rows is None:
        return Section("layers", title, missing=run.absence("measurements.sqlite"))
    rows = [row for row in run.rows if row.kind == "layer"]
    if not rows:
        return Section(
            "layers",
            title,
            missing="measurements.sqlite holds no layer of a deployed model. "
            f"This makes them: {LAYERS}",
        )
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for row in rows:
        model = f"{row.details.get('model') or row.subject}, batch {row.details.get('batch', '?')}"
        groups.setdefault((model, row.device.label), []).append(row)
    pictures = tuple(
        picture
        for index, ((model, _), some) in enumerate(groups.items())
        if (picture := _picture(model, some, index))
    )
    tables = tuple(_table(model, device, some) for (model, device), some in groups.items())
    lead = (
        "Measured is the layer as it is deployed; predicted is the sum of its kernels in the "
        "latency table (modelled where a kernel was not measured). What lies between them is "
        "routing, gathering and launching.",
    )
    return Section("layers", title, lead, pictures, tables, (LAYERS,))


def _name(row: Measurement) -> str:
    return str(row.details.get("layer") or row.subject)


def _detail(row: Measurement, name: str) -> float | None:
    value = row.details.get(name)
    return float(value) if isinstance(value, int | float) else None


def _predicted_ms(row: Measurement) -> float | None:
    with_overhead = _detail(row, "predicted_ms")
    return _detail(row, "kernel_ms") if with_overhead is None else with_overhead


def _picture(model: str, rows: Sequence[Measurement], index: int) -> Picture | None:
    drawn = sorted(rows, key=lambda row: -(row.latency_ms or 0))[:MAX_LAYERS_DRAWN]
    kept = [row for row in rows if row in drawn]
    frame = pd.DataFrame(
        [
            {
                "layer": _name(row),
                "measured_ms": row.latency_ms,
                "measured_low_ms": row.latency_low_ms,
                "measured_high_ms": row.latency_high_ms,
                "predicted_ms": _predicted_ms(row),
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
        "Filled: measured. Hollow: predicted, the sum of the layer's kernels.",
        {"axis": "latency, ms a batch"},
    )


def _table(model: str, device: str, rows: Sequence[Measurement]) -> Table:
    cells: list[tuple[str | Cell, ...]] = []
    for row in rows:
        predicted = _predicted_ms(row)
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

"""Section on the measurement itself: noise floor, intervals, contaminated samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from profiler.store import Measurement
from reports import map_plots
from reports.formats import Cell, count_cell, missing, percent, percent_cell
from reports.html import MAX_MARKS, Picture, Section, Table
from reports.run_folder import SWEEP, RunFolder


def noise(run: RunFolder) -> Section:
    """How sure of what was measured: the noise floor and how exact each figure is."""
    title = "Noise floor and precision"
    if run.rows is None:
        return Section("noise", title, missing=run.absence("measurements.sqlite"))
    frame = pd.DataFrame(
        [
            {
                "product": row.workload.product if row.workload else row.subject,
                "lowering": row.lowering,
                "origin": "baseline" if row.is_baseline else "ours",
                "latency_ms": row.latency_ms,
                "half_width_percent": half_width,
                "samples_kept": row.samples_kept,
                "samples_discarded": row.samples_discarded,
                "stopped_by": row.stop_reason,
            }
            for row in run.rows
            if (half_width := _half_width_percent(row)) is not None
        ]
    )
    floors = _floors(run.rows)
    lead = [
        f"A kernel measured against itself differs by up to {percent(100 * max(floors))}. No "
        "difference below the floor of its own sweep is called one."
        if floors
        else "The noise floor was not measured: no kernel of ours was set against itself."
    ]
    pictures: tuple[Picture, ...] = ()
    if len(frame):
        exact = float(100 * (frame.half_width_percent.round(6) <= 2).mean())
        lead.append(f"{percent(exact)} of the latencies are known to ±2 % or better.")
        pictures = (
            Picture(
                "precision",
                "How exact each latency is",
                map_plots.precision,
                frame.iloc[:: math.ceil(len(frame) / MAX_MARKS)],
                f"Half-widths of {len(frame)} intervals, median "
                f"{percent(float(frame.half_width_percent.median()))}.",
                "Half the 95 % interval of the median latency, relative to it.",
                {"floor_percent": 100 * max(floors) if floors else None},
            ),
        )
    return Section("noise", title, tuple(lead), pictures, (_by_sweep(run.rows),), (SWEEP,))


def _floors(rows: Sequence[Measurement]) -> list[float]:
    return [row.noise_floor for row in rows if row.noise_floor is not None]


def _half_width_percent(row: Measurement) -> float | None:
    low, high = row.latency_low_ms, row.latency_high_ms
    if row.latency_ms is None or low is None or high is None:
        return None
    return 50 * (high - low) / row.latency_ms


def _by_sweep(rows: Sequence[Measurement]) -> Table:
    groups: dict[tuple[str, str, str], list[Measurement]] = {}
    for row in rows:
        groups.setdefault((row.run, row.device.label, row.cache), []).append(row)
    cells: list[tuple[str | Cell, ...]] = []
    for (name, device, cache), some in groups.items():
        floors = _floors(some)
        kept, dropped = (
            sum(getattr(row, f"samples_{what}") for row in some) for what in ("kept", "discarded")
        )
        samples = kept + dropped
        cells.append(
            (
                name or "unnamed",
                device,
                cache,
                percent_cell(100 * max(floors)) if floors else missing("not measured"),
                count_cell(len(some)),
                count_cell(sum(row.status != "ok" for row in some)),
                count_cell(sum(row.on_shared_core for row in some)),
                percent_cell(100 * dropped / samples if samples else None, "no samples"),
            )
        )
    return Table(
        "Noise floor by sweep, device and cache state",
        (
            "sweep",
            "device",
            "cache",
            "noise floor",
            "rows",
            "rows without a figure",
            "rows on a shared core",
            "samples dropped",
        ),
        tuple(cells),
        is_open=len(cells) <= 6,
    )

"""Section on the latency models: how sure are the predictions."""

from __future__ import annotations

import math

import pandas as pd

from cost_models.fit_result import Point
from reports import kernel_plots, model_plots
from reports.fit_errors import extrapolated_in_words, held_out_mape
from reports.formats import (
    Cell,
    count_cell,
    ends,
    milliseconds_cell,
    missing,
    percent,
    percent_cell,
    significant,
)
from reports.html import MAX_MARKS, Picture, Section, Table
from reports.run_folder import FINETUNE, FIT, RunFolder


def prediction(run: RunFolder) -> Section:
    """How sure: predicted against measured latency, for kernels and end to end."""
    title = "How sure: predicted against measured"
    end_to_end = _end_to_end(run)
    pictures, tables = list(end_to_end[0]), list(end_to_end[1])
    commands = (FIT, FINETUNE) if tables else (FIT,)
    if run.fit is None:
        absence = run.absence("fit.json")
        return Section(
            "prediction",
            title,
            pictures=tuple(pictures),
            tables=tuple(tables),
            commands=commands[1:],
            missing=absence,
        )
    points = pd.DataFrame(
        [point.model_dump() for fit in run.fit.fits for point in fit.points],
        columns=list(Point.model_fields),
    )
    error = held_out_mape(run)
    apart = extrapolated_in_words(run)
    held_out = int((points.split == "test").sum())
    lead: tuple[str, ...] = (
        f"On {held_out} held-out rows the latency model is off by {percent(error)} (MAPE"
        f"{': ' if apart else ''}{apart}); within ±10 %: "
        f"{percent(held_out_mape(run, 'within_10_percent'))}; inside their 90 % interval: "
        f"{percent(held_out_mape(run, 'interval_coverage'))}. A fitted roofline is off by "
        f"{percent(held_out_mape(run, 'mape_roofline'))}, the nearest measured neighbour by "
        f"{percent(held_out_mape(run, 'mape_nearest'))}.",
    )
    if shared := sum(fit.rows_shared for fit in run.fit.fits):
        text = f"{shared} rows of a core that another guest of the host used are left out"
        if carried := sum(fit.learned_from_shared for fit in run.fit.fits):
            text += (
                f"; {carried} of {len(run.fit.fits)} models learn from them, as of another device"
            )
        lead = (*lead, text + ".")
    if names := sorted({fit.beyond for fit in run.fit.fits if fit.beyond}):
        carried = sum(fit.beyond is not None for fit in run.fit.fits)
        text = (
            f"Beyond those sizes {carried} of {len(run.fit.fits)} models answer by that of another"
        )
        lead = (*lead, f"{text} device, carried over by the rows of this one: {', '.join(names)}.")
    drawn = _drawn(points)
    if not points.empty:
        pictures.insert(
            0,
            Picture(
                "predicted",
                "Predicted over measured latency of kernels",
                kernel_plots.predicted_measured,
                drawn,
                f"Predicted against measured latency of {len(points)} rows, {held_out} of them "
                f"held out; mean absolute error of those {percent(error)}.",
                "Each mark is one kernel at one size, log scales; bars are 90 % prediction "
                "intervals. The model that is drawn here has not seen the held-out rows."
                + (
                    f" {len(drawn)} of {len(points)} rows are drawn."
                    if len(drawn) < len(points)
                    else ""
                ),
            ),
        )
    tables.insert(0, _error_table(run))
    if run.fit.skipped:
        tables.append(
            Table("Not modelled", ("form and lowering", "reason"), tuple(run.fit.skipped.items()))
        )
    return Section("prediction", title, lead, tuple(pictures), tuple(tables), commands)


def _drawn(points: pd.DataFrame) -> pd.DataFrame:
    """The held-out rows first, then as many others as the page holds, evenly picked."""
    ordered = points.sort_values("split", kind="stable").reset_index(drop=True)
    held_out = int((ordered.split == "test").sum())
    room = max(0, MAX_MARKS - held_out)
    rest = ordered.index[held_out:]
    step = max(1, math.ceil(len(rest) / room)) if room else len(rest) + 1
    return ordered.loc[[*ordered.index[:held_out][:MAX_MARKS], *(rest[::step] if room else [])]]


def _error_table(run: RunFolder) -> Table:
    reason = "no held-out row"
    return Table(
        "Held-out errors by form and lowering, beside roofline and nearest neighbour",
        (
            "form",
            "lowering",
            "rows train",
            "rows test",
            "MAPE",
            "MAPE inside",
            "within ±10 %",
            "in 90 % interval",
            "MAPE roofline",
            "MAPE nearest",
        ),
        tuple(
            (
                fit.form,
                fit.lowering,
                count_cell(fit.rows_train),
                count_cell(fit.rows_test),
                percent_cell(fit.mape, reason),
                percent_cell(fit.inside.mape if fit.inside else None, "none inside"),
                percent_cell(fit.within_10_percent, reason),
                percent_cell(fit.interval_coverage, reason),
                percent_cell(fit.mape_roofline, reason),
                percent_cell(fit.mape_nearest, reason),
            )
            for fit in (run.fit.fits if run.fit else ())
        ),
    )


def _end_to_end(run: RunFolder) -> tuple[list[Picture], list[Table]]:
    if run.results is None:
        return [], []
    variants = run.results.variants
    rows: list[tuple[str | Cell, ...]] = []
    for one in variants:
        measured, predicted = one.latency_ms, one.predicted_latency_ms
        error = 100 * (predicted / measured.value - 1) if predicted and measured else None
        rows.append(
            (
                one.title,
                milliseconds_cell(measured) if measured else missing(one.latency_reason),
                Cell(
                    f"{significant(predicted)} ms",
                    predicted,
                    one.predicted_reason,
                    ends(one.predicted_interval) if one.predicted_interval else "no interval",
                )
                if predicted
                else missing(one.predicted_reason),
                percent_cell(error, "needs both"),
            )
        )
    table = Table(
        f"End to end at batch {run.results.deploy_batch}: measured and predicted",
        ("variant", "measured", "predicted", "error"),
        tuple(rows),
    )
    frame = pd.DataFrame(
        [
            {
                "variant": one.title,
                "measured_ms": one.latency_ms.value if one.latency_ms else None,
                "measured_low_ms": one.latency_ms.low if one.latency_ms else None,
                "measured_high_ms": one.latency_ms.high if one.latency_ms else None,
                "predicted_ms": one.predicted_latency_ms,
                "predicted_low_ms": one.predicted_interval.low if one.predicted_interval else None,
                "predicted_high_ms": one.predicted_interval.high
                if one.predicted_interval
                else None,
            }
            for one in variants
        ]
    ).astype({"predicted_ms": float, "measured_ms": float} if variants else {})
    if not variants or frame[["measured_ms", "predicted_ms"]].isna().all(axis=None):
        return [], [table] if rows else []
    picture = Picture(
        "end-to-end",
        "Measured and predicted latency of the whole model",
        model_plots.measured_predicted,
        frame,
        "Measured and predicted end-to-end latency of each variant; figures in the table.",
        "Filled: measured end to end. Hollow: predicted from the latency table, of the whole model "
        "where the table knows of such, else of the converted layers alone: the table says which.",
        {"axis": "latency, ms a batch"},
    )
    return [picture], [table]

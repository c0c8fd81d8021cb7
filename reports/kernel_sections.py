"""Sections on the kernels and on the models of their latency."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

import pandas as pd

from profiler.store import Measurement
from reports import kernel_plots, plots
from reports.comparisons import (
    Comparison,
    OwnMult,
    Ratio,
    compare,
    count_outcomes,
    latency,
    settings,
    speed_ratio,
    speedups,
)
from reports.formats import (
    Cell,
    bytes_cell,
    count_cell,
    ends,
    milliseconds_cell,
    missing,
    number_cell,
    percent,
    percent_cell,
    significant,
    times_cell,
)
from reports.html import Picture, Section, Table
from reports.run_folder import FINETUNE, FIT, SWEEP, RunFolder
from reports.verdict import held_out_mape, short_label

# The dot plot names its products; with more of them it would be a list, not a picture.
MAX_PRODUCTS_DRAWN = 24


def kernels(run: RunFolder) -> Section:
    """Where it pays: our kernels against every baseline, product by product."""
    title = "Where it pays: kernels"
    if run.rows is None:
        return Section("kernels", title, missing=run.absence("measurements.sqlite"))
    main = run.device.fingerprint if run.device else None
    groups = settings(compare(run.rows), main)
    lead: list[str] = [_completeness(run.rows)]
    pictures: list[Picture] = []
    tables: list[Table] = []
    for index, group in enumerate(groups):
        setting = f"{short_label(group[0].device)}, {group[0].cache} cache"
        counts = count_outcomes(group)
        if not counts:
            lead.append(f"{setting}: nothing to set {_products(len(group))} against.")
            continue
        lead.append(
            f"{setting}: shift or add pays in {counts['pays']} products, does not pay in "
            f"{counts['does not pay']}, is undecided in {counts['undecided']}."
        )
        pictures += _pictures(group, setting, index)
        tables += [
            _product_table(group, setting, is_open=index == 0 and len(group) <= 20),
            _ratio_table(group, setting),
        ]
    others = [row for row in run.rows if row.kind != "primitive"]
    if others:
        tables.append(_measurement_table(others, "Measured layers and models"))
    primitives = [row for row in run.rows if row.kind == "primitive"]
    if primitives:
        tables.append(_measurement_table(primitives, "Every kernel measurement"))
    return Section("kernels", title, tuple(lead), tuple(pictures), tuple(tables), (SWEEP,))


def _products(count: int) -> str:
    return f"{count} product{'s' * (count != 1)}"


def _completeness(rows: Sequence[Measurement]) -> str:
    status = Counter(row.status for row in rows)
    kept = sum(row.samples_kept for row in rows)
    dropped = sum(row.samples_discarded for row in rows)
    absent = ", ".join(f"{status[name]} {name}" for name in status if name != "ok")
    return (
        f"{status['ok']} of {len(rows)} measurements have a figure"
        f"{f' ({absent})' if absent else ''}; {dropped} of {kept + dropped} samples were "
        "contaminated and dropped. A ratio above 1× means that ours is faster."
    )


def _pictures(group: Sequence[Comparison], setting: str, index: int) -> list[Picture]:
    frame = speedups(group)
    if frame.empty:
        return []
    products = list(dict.fromkeys(frame["product"]))
    drawn = products[:MAX_PRODUCTS_DRAWN]
    part = (
        f" The {len(drawn)} largest of {len(products)} products."
        if len(drawn) < len(products)
        else ""
    )
    alt = "; ".join(
        f"{form}: {significant(some.ratio.median())}× in the median of {len(some)} products"
        for form, some in frame.groupby("form")
    )
    return [
        Picture(
            f"speedups-{index}",
            partial(kernel_plots.speedups_by_product, frame[frame["product"].isin(drawn)]),
            f"Speed of our kernels against the best baseline that ran, {setting}. {alt}.",
            f"{setting}. Best baseline that ran ÷ our best lowering of each form, log scale, with "
            f"conservative 95 % intervals.{part} Products with a failed baseline are shown "
            "against those that ran; the table says so and calls nothing fastest.",
        ),
        Picture(
            f"sizes-{index}",
            partial(kernel_plots.speedups_by_size, frame),
            f"The same ratios over the size of the product, one panel a form, {setting}. {alt}.",
            f"{setting}. The same ratios over the size of the product: one mark a product. "
            "Undecided: the interval spans 1×, or a faster result while a baseline failed.",
        ),
    ]


def _named(row: Measurement | None, reason: str | None) -> Cell:
    if row is None:
        return missing(reason)
    form = row.workload.form if row.workload else ""
    name = row.lowering if row.is_baseline else f"{row.lowering} ({form})"
    figure = milliseconds_cell(latency(row))
    return Cell(name, None, figure.text, figure.interval)


def _weights(own: OwnMult | None, comparison: Comparison) -> str:
    if own is None:
        row = comparison.replacement
        return bytes_cell(row.weight_bytes if row else None).text
    shift, mult = (bytes_cell(row.weight_bytes).text for row in (own.shift, own.mult))
    return f"{shift} / {mult}"


def _own_cell(comparison: Comparison) -> Cell:
    own = comparison.own_mult()
    if own is None:
        kind = comparison.product.split()[0]
        return missing("not both measured" if kind == "linear" else "attention has no int8 mult")
    names = f"{own.mult.lowering} ÷ {own.shift.lowering}"
    schedule = "" if own.same_schedule else ", schedules differ"
    return times_cell(own.ratio, names + schedule)


def _outcome_cell(outcome: str, ratio: Ratio | None, why: str) -> Cell:
    if ratio is None:
        return Cell(outcome, None, why)
    reason = f"{significant(ratio.value)}× the best mult" + (f"; {why}" if why else "")
    return Cell(outcome, None, reason, ends(ratio))


def _product_table(group: Sequence[Comparison], setting: str, is_open: bool) -> Table:
    rows = []
    for one in group:
        outcome, ratio, why = one.verdict
        ours, baseline = one.replacement, one.fastest_baseline
        gain = speed_ratio(latency(baseline), latency(ours)) if ours and baseline else None
        no_gain = one.no_fastest or "no shift or add kernel with a figure"
        rows.append(
            (
                Cell(one.product),
                _named(one.winner, one.no_fastest),
                _named(baseline, one.no_fastest),
                _named(ours, "none with a figure"),
                times_cell(gain) if gain else missing(no_gain),
                _own_cell(one),
                _weights(one.own_mult(), one),
                _outcome_cell(outcome, ratio, why),
            )
        )
    return Table(
        f"Products: winner, baselines, ratios — {setting}",
        (
            "product",
            "winner of all",
            "fastest baseline",
            "best shift or add",
            "fastest baseline ÷ it",
            "our mult_int8 ÷ our shift_int8",
            "weight bytes shift / mult",
            "does it pay",
        ),
        tuple(rows),
        is_open,
        "Square brackets: conservative interval, low end of one latency over high end of the "
        "other. “Does it pay” sets the best shift or add kernel against every multiplication, "
        "the baselines' and our own. Nothing is called fastest where a baseline failed.",
    )


def _ratio_table(group: Sequence[Comparison], setting: str) -> Table:
    names = sorted({row.lowering for one in group for row in one.rows if row.is_baseline})
    rows: list[tuple[str | Cell, ...]] = []
    for one in group:
        baselines = {row.lowering: row for row in one.rows if row.is_baseline}
        for ours in one.ours:
            cells = []
            for name in names:
                row = baselines.get(name)
                if row is None:
                    cells.append(missing("not measured"))
                elif row.status != "ok":
                    cells.append(missing(f"{row.status}: {row.reason}"))
                else:
                    ratio = speed_ratio(latency(row), latency(ours))
                    cells.append(times_cell(ratio))
            form = ours.workload.form if ours.workload else ""
            rows.append((one.product, form, ours.lowering, *cells))
    return Table(
        f"Each of our lowerings against every baseline (baseline ÷ ours) — {setting}",
        ("product", "form", "our lowering", *names),
        tuple(rows),
    )


def _measurement_table(rows: Sequence[Measurement], caption: str) -> Table:
    columns = (
        "subject",
        "form",
        "lowering",
        "baseline",
        "device",
        "cache",
        "status",
        "latency_ms",
        "low_ms",
        "high_ms",
        "p10_ms",
        "p90_ms",
        "kept",
        "dropped",
        "stopped by",
        "weight bytes",
        "max abs error",
        "run",
    )
    cells = tuple(
        (
            row.workload.product if row.workload else row.subject,
            row.workload.form if row.workload else row.kind,
            row.lowering,
            "yes" if row.is_baseline else "no",
            row.device.label,
            row.cache,
            Cell(row.status, None, row.reason),
            number_cell(row.latency_ms, digits=4),
            number_cell(row.latency_low_ms, digits=4),
            number_cell(row.latency_high_ms, digits=4),
            number_cell(row.latency_p10_ms, digits=4),
            number_cell(row.latency_p90_ms, digits=4),
            count_cell(row.samples_kept),
            count_cell(row.samples_discarded),
            row.stop_reason or missing(None),
            count_cell(row.weight_bytes),
            number_cell(row.max_abs_error),
            row.run,
        )
        for row in rows
    )
    return Table(caption, columns, cells, note="All rows with all columns: measurements.sqlite.")


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
        columns=["label", "split", "measured_ms", "predicted_ms", "low_ms", "high_ms"],
    )
    error = held_out_mape(run)
    held_out = int((points.split == "test").sum())
    lead = (
        f"On {held_out} held-out rows the latency model is off by {percent(error)} (MAPE); within "
        f"±10 %: {percent(held_out_mape(run, 'within_10_percent'))}; inside their 90 % interval: "
        f"{percent(held_out_mape(run, 'interval_coverage'))}. A fitted roofline is off by "
        f"{percent(held_out_mape(run, 'mape_roofline'))}, the nearest measured neighbour by "
        f"{percent(held_out_mape(run, 'mape_nearest'))}.",
    )
    if not points.empty:
        pictures.insert(
            0,
            Picture(
                "predicted",
                partial(kernel_plots.predicted_measured, points),
                f"Predicted against measured latency of {len(points)} rows, {held_out} of them "
                f"held out; mean absolute error of those {percent(error)}.",
                "Each mark is one kernel at one size, log scales; bars are 90 % prediction "
                "intervals. The model that is drawn here has not seen the held-out rows.",
            ),
        )
    tables.insert(0, _error_table(run))
    if run.fit.skipped:
        tables.append(
            Table("Not modelled", ("form and lowering", "reason"), tuple(run.fit.skipped.items()))
        )
    return Section("prediction", title, lead, tuple(pictures), tuple(tables), commands)


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
                    None,
                    ends(one.predicted_interval) if one.predicted_interval else "no interval",
                )
                if predicted
                else missing(one.predicted_reason),
                percent_cell(error, "needs both"),
            )
        )
    table = Table(
        f"End to end at batch {run.results.deploy_batch}: measured and predicted",
        ("variant", "measured", "predicted, sum of the layers", "error"),
        tuple(rows),
    )
    frame = pd.DataFrame(
        [
            {
                "title": one.title,
                "measured": one.latency_ms.value if one.latency_ms else None,
                "measured_low": one.latency_ms.low if one.latency_ms else None,
                "measured_high": one.latency_ms.high if one.latency_ms else None,
                "predicted": one.predicted_latency_ms,
                "predicted_low": one.predicted_interval.low if one.predicted_interval else None,
                "predicted_high": one.predicted_interval.high if one.predicted_interval else None,
            }
            for one in variants
        ]
    ).astype({"predicted": float, "measured": float} if variants else {})
    if not variants or frame[["measured", "predicted"]].isna().all(axis=None):
        return [], [table] if rows else []
    picture = Picture(
        "end-to-end",
        partial(plots.end_to_end, frame),
        "Measured and predicted end-to-end latency of each variant; figures in the table.",
        "Filled: measured end to end. Hollow: predicted, the sum over the layers from the latency "
        "table. What lies between them is what the table does not know of: everything around the "
        "layers.",
    )
    return [picture], [table]

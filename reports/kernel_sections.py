"""Section on the kernels: where it pays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from profiler.store import Measurement
from reports import kernel_plots
from reports.comparisons import (
    Comparison,
    OwnMult,
    Ratio,
    compare,
    form_of,
    latency,
    outcomes_in_words,
    settings,
    speed_over_rival,
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
    short_label,
    significant,
    times_cell,
)
from reports.html import MAX_MARKS, Picture, Section, Table
from reports.run_folder import SWEEP, RunFolder

# The dot plot names its products; with more of them it would be a list, not a picture.
MAX_PRODUCTS_DRAWN = 24


def kernels(run: RunFolder) -> Section:
    """Where it pays: our kernels against every baseline, product by product."""
    title = "Kernel by kernel"
    if run.rows is None:
        return Section("kernels", title, missing=run.absence("measurements.sqlite"))
    main = run.device.fingerprint if run.device else None
    groups = settings(compare(run.rows), main)
    lead: list[str] = [_completeness(run.rows)]
    pictures: list[Picture] = []
    tables: list[Table] = []
    for index, group in enumerate(groups):
        setting = f"{short_label(group[0].device)}, {group[0].cache} cache"
        counted = outcomes_in_words(group)
        if not counted:
            lead.append(f"{setting}: nothing to set {_products(len(group))} against.")
            continue
        lead.append(f"{setting}, faster than every multiplication measured: {counted}.")
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
            f"Speed-up product by product, {setting}",
            kernel_plots.speedups_by_product,
            frame[frame["product"].isin(drawn)],
            f"Speed of our kernels against the best baseline that ran, {setting}. {alt}.",
            f"{setting}. Best baseline that ran ÷ our best lowering of each form, log scale, with "
            f"95 % intervals.{part} Products with a failed baseline are shown "
            "against those that ran; the table says so and calls nothing fastest.",
        ),
        Picture(
            f"sizes-{index}",
            f"Speed-up over the size of the product, {setting}",
            kernel_plots.speedups_by_size,
            frame.head(MAX_MARKS),
            f"The same ratios over the size of the product, one panel a form, {setting}. {alt}.",
            f"{setting}. The same ratios over the size of the product: one mark a product. "
            "Undecided: the interval spans 1×, the difference is below the noise floor, or ours "
            "is faster while a baseline failed.",
        ),
    ]


def _named(row: Measurement | None, reason: str | None) -> Cell:
    if row is None:
        return missing(reason)
    form = form_of(row)
    name = row.lowering if row.is_baseline else f"{row.lowering} ({form})"
    figure = milliseconds_cell(latency(row))
    return Cell(name, None, f"{figure.text} {figure.interval}")


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
    reason = f"{significant(ratio.value)}× the best mult {ends(ratio)}"
    return Cell(outcome, None, reason + (f"; {why}" if why else ""))


def _product_table(group: Sequence[Comparison], setting: str, is_open: bool) -> Table:
    rows = []
    for one in group:
        outcome, ratio, why = one.verdict
        ours, baseline = one.replacement, one.fastest_baseline
        gain = speed_over_rival(ours, baseline) if ours and baseline else None
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
            "our mult_int8 or mult_int7 ÷ our shift_int8",
            "weight bytes shift / mult",
            "does it pay",
        ),
        tuple(rows),
        is_open,
        "Square brackets: the 95 % interval of the ratio where both were in the same rounds (the "
        "fastest baseline, our own mult); else low end of one latency over high end of the "
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
                    ratio = speed_over_rival(ours, row)
                    cells.append(times_cell(ratio))
            form = form_of(ours)
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
            form_of(row) or row.kind,
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

"""Section on where it pays: speed-ups by shape, break-even over tokens and widths, roofline."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import median

import numpy as np
import pandas as pd

from cost_models.latency_table import LatencyTable, TableError
from kernels.forms import FORMS
from kernels.workload import linear
from reports import map_plots
from reports.comparisons import Comparison, form_of, latency, main_setting, speedups
from reports.formats import short_label, significant
from reports.html import MAX_MARKS, Picture, Section
from reports.run_folder import FIT, SWEEP, RunFolder

# A map names its products; with more of them it would be a list, not a picture.
MAX_PRODUCTS_DRAWN = 24
OWN_MULT, ADD = "shift_int8 ÷ own mult", "add, attention"

_GRID_TOKENS = np.geomspace(16, 4096, 9)
_GRID_WIDTHS = np.geomspace(32, 1024, 6)


def where(run: RunFolder) -> Section:
    """Where it pays: by shape, by tokens and width, and how near the machine's roof."""
    title = "By shape, tokens and width"
    if run.rows is None:
        return Section("where", title, missing=run.absence("measurements.sqlite"))
    group = main_setting(run.rows or (), run.device)
    if not group:
        return Section(
            "where", title, ("No product was measured on this device.",), (), (), (SWEEP,)
        )
    setting = f"{short_label(group[0].device)}, {group[0].cache} cache"
    pictures = [_heat_map(group), _break_even(group, run.table), _roofline(group)]
    return Section(
        "where",
        title,
        (f"{setting}. Blue is faster and orange slower than the rival named under each map.",),
        tuple(filter(None, pictures)),
        (),
        (SWEEP, FIT) if run.table else (SWEEP,),
    )


def _heat_map(group: Sequence[Comparison]) -> Picture | None:
    products = [one.product for one in group][:MAX_PRODUCTS_DRAWN]
    ratios = speedups(group)
    if ratios.empty:
        return None
    ratios = ratios[ratios["product"].isin(products)].rename(
        columns={"form": "column", "lowering": "ours", "baseline": "against"}
    )
    # One column serves all attention products: the form is in the product's name.
    ratios["column"] = [
        ADD if FORMS.get(form, {}).get("w_layout") == "kn" else form for form in ratios["column"]
    ]
    names = [form for form in FORMS if form in set(ratios["column"])]
    own = pd.DataFrame(
        [
            {
                "product": one.product,
                "column": OWN_MULT,
                "ours": found.shift.lowering,
                "against": found.mult.lowering,
                "ratio": found.ratio.value,
                "low": found.ratio.low,
                "high": found.ratio.high,
                "outcome": found.ratio.outcome,
            }
            for one in group[:MAX_PRODUCTS_DRAWN]
            if (found := one.own_mult())
        ]
    )
    frame = pd.concat([ratios.drop(columns="macs"), own])
    frame["column"] = pd.Categorical(frame["column"], [*names, OWN_MULT, ADD])
    frame = frame.sort_values("column", kind="stable").astype({"column": str})
    shown = "" if len(group) <= len(products) else f" The {len(products)} largest products."
    return Picture(
        "heat-map",
        "Speed-up by shape and form",
        map_plots.heat_map,
        frame,
        "; ".join(
            f"{column}: {significant(part.ratio.median())}× in the median of {len(part)} products"
            for column, part in frame.groupby("column", sort=False)
        ),
        "Speed of our best lowering of each form over the fastest baseline that ran on the same "
        f"product; “{OWN_MULT}” is over our own multiplication in 8 or 7 bits.{shown} A product "
        "is batch × tokens × inputs × outputs. Intervals are in the table.",
    )


def _width(one: Comparison) -> float:
    workload = one.rows[0].workload
    assert workload is not None
    if one.is_attention:
        return float(workload.b * workload.n)
    return math.sqrt(workload.k * workload.n)


def _break_even(group: Sequence[Comparison], table: LatencyTable | None) -> Picture | None:
    rows = []
    for one in group[:MAX_MARKS]:
        outcome, ratio, why = one.verdict
        ours, workload = one.replacement, one.rows[0].workload
        if ratio is None or ours is None or workload is None:
            continue
        rows.append(
            {
                "panel": "add, attention" if one.is_attention else "shift, linears",
                "product": one.product,
                "tokens": workload.tokens,
                "width": _width(one),
                "outcome": outcome,
                "ratio": ratio.value,
                "low": ratio.low,
                "high": ratio.high,
                "ours": f"{ours.lowering} ({form_of(ours)})",
                "why": why or None,
            }
        )
    if not rows:
        return None
    frame = pd.DataFrame(rows)
    modelled = _modelled(table) if table else pd.DataFrame()
    behind = (
        " Behind them, what the latency table predicts for square linears (modelled): blue where "
        "the best shift kernel beats every multiplication it knows."
        if len(modelled)
        else ""
    )
    counts = Counter(zip(frame.panel, frame.outcome))
    return Picture(
        "break-even",
        "Break-even over tokens and widths",
        map_plots.break_even,
        frame,
        "; ".join(f"{panel}: {outcome} {count}" for (panel, outcome), count in counts.items()),
        "Marks are measured: the best shift or add kernel against every multiplication measured, "
        "the baselines' and our own. Width: root of inputs × outputs of a linear, batch × heads × "
        f"value dimension of an attention product.{behind}",
        {"modelled": modelled},
    )


def _modelled(table: LatencyTable) -> pd.DataFrame:
    """Predicted speed of the best shift over the best mult, cell by cell, where both are known."""
    token_ends = map_plots.cell_edges(_GRID_TOKENS)
    width_ends = map_plots.cell_edges(_GRID_WIDTHS)
    cells = []
    for i, tokens in enumerate(_GRID_TOKENS):
        for j, width in enumerate(_GRID_WIDTHS):
            shift, mult = (
                _best(table, side, round(tokens), round(width)) for side in ("shift", "mult")
            )
            if shift and mult:
                cells.append(
                    {
                        "panel": "shift, linears",
                        "tokens_from": token_ends[0][i],
                        "tokens_to": token_ends[1][i],
                        "width_from": width_ends[0][j],
                        "width_to": width_ends[1][j],
                        "ratio": mult / shift,
                    }
                )
    return pd.DataFrame(cells)


def _best(table: LatencyTable, primitive: str, tokens: int, width: int) -> float | None:
    """Lowest predicted latency in ms inside the measured shapes; None where nothing is known."""
    found = []
    for form in table.forms:
        if FORMS.get(form, {}).get("primitive") != primitive or FORMS[form]["w_layout"] != "nk":
            continue
        for lowering in table.lowerings(form):
            try:
                workload = linear(form, tokens, width, width)
                found.append(table.lookup(workload, lowering, strict=True).latency_ms)
            except TableError:
                continue
    return min(found, default=None)


def _roofline(group: Sequence[Comparison]) -> Picture | None:
    rows = []
    roofs: dict[str, list[float]] = {}
    for row in (row for one in group for row in one.ours if not one.is_attention):
        workload = row.workload
        assert workload is not None
        rate = workload.macs / latency(row).value / 1e6
        share = row.details.get("roofline_share")
        if share:
            roofs.setdefault(workload.x_dtype, []).append(rate / float(share))
        rows.append(
            {
                "product": workload.product,
                "form": form_of(row),
                "lowering": row.lowering,
                "macs_per_byte": workload.macs / workload.traffic_bytes,
                "gmacs_per_s": rate,
                "share_of_roof": None if share is None else float(share),
            }
        )
    if not rows:
        return None
    frame = pd.DataFrame(rows).astype({"share_of_roof": float})
    known = {dtype: median(rates) for dtype, rates in sorted(roofs.items())}
    shares = frame.share_of_roof.dropna()
    return Picture(
        "roofline",
        "Roofline of our linear kernels",
        map_plots.roofline,
        frame.iloc[:: math.ceil(len(frame) / MAX_MARKS)],
        f"Rates of {len(frame)} kernels; "
        + (
            f"in the median {significant(100 * shares.median())} % of the roof of their type"
            if len(shares)
            else "no roof was measured"
        ),
        "Dashed: the arithmetic peak of each type, measured in the same sweep. Left is bound by "
        "memory, right by arithmetic."
        if known
        else "The machine's roofs were not measured in this sweep.",
        {"roofs": known},
    )

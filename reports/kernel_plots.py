"""Figures on kernels and their models, drawn with the axes of plots."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from reports.palette import (
    FORM_MARKS,
    INK,
    MUTED,
    OTHER_MARK,
    OUTCOME_MARKS,
    PURPLE,
    SKY,
    SURFACE,
    in_legend_order,
)
from reports.plots import (
    Canvas,
    axes_grid,
    error_bars,
    finite,
    is_narrow,
    log_scale,
    mark,
    row_labels,
    shared_legend,
    styled,
)


@styled
def speedups_by_product(data: pd.DataFrame, width_px: int) -> Canvas:
    """Baseline ÷ ours for each product, one mark a form.

    Args:
        data: What ``comparisons.speedups`` returns.
        width_px: Width to draw for.
    """
    products = list(dict.fromkeys(data["product"]))
    narrow = is_narrow(width_px)
    forms = in_legend_order(data.form)
    legend_px = 24 * math.ceil(len(forms) / (2 if narrow else 6))
    figure, ((axes,),) = axes_grid(
        width_px, 80 + legend_px + len(products) * (46 if narrow else 30)
    )
    log_scale(axes, "x", [*finite(data.ratio, data.low, data.high), 1.0], "×", 5 if narrow else 8)
    for form in forms:
        part = data[data.form == form]
        colour, marker = FORM_MARKS.get(form, OTHER_MARK)
        # Shift and mult of equal speed would hide each other on one line.
        side = {"mult": -0.13, "shift": 0.13}.get(form.partition("_")[0], 0.0)
        rows = [products.index(product) + side + 0.12 * narrow for product in part["product"]]
        axes.errorbar(
            part.ratio,
            rows,
            xerr=error_bars(part.ratio, part.low, part.high),
            fmt=marker,
            color=colour,
            markersize=7.5,
            markerfacecolor=colour,
            markeredgecolor=SURFACE,
            elinewidth=1.4,
            label=form,
        )
        mark(axes, part.index, part.ratio, rows)
    axes.axvline(1, color=INK, linewidth=1.2)
    row_labels(axes, products, width_px)
    axes.set_xlabel("best baseline that ran ÷ ours (right of 1× ours is faster)")
    figure.legend(loc="outside upper left", ncols=2 if narrow else 6)
    return figure


@styled
def speedups_by_size(data: pd.DataFrame, width_px: int) -> Canvas:
    """Baseline ÷ ours over the size of the product, one panel a form.

    Args:
        data: What ``comparisons.speedups`` returns.
        width_px: Width to draw for.
    """
    forms = in_legend_order(data.form)
    columns = min(2 if is_narrow(width_px) else 4, len(forms))
    rows = math.ceil(len(forms) / columns)
    figure, grid = axes_grid(width_px, 80 + rows * 165, rows, columns, sharex=True, sharey=True)
    panels = list(grid.flat)
    ratios = [*finite(data.ratio, data.low, data.high), 1.0]
    for panel in panels[len(forms) :]:
        panel.set_visible(False)
    for panel, form in zip(panels, forms):
        part = data[data.form == form]
        panel.set_title(form)
        panel.axhline(1, color=INK, linewidth=1)
        for outcome, (colour, marker, label) in OUTCOME_MARKS.items():
            some = part[part.outcome == outcome]
            panel.errorbar(
                some.macs,
                some.ratio,
                yerr=error_bars(some.ratio, some.low, some.high),
                fmt=marker,
                color=colour,
                markersize=6,
                markeredgecolor=colour,
                markerfacecolor=SURFACE if outcome == "undecided" else colour,
                elinewidth=1.1,
                label=label,
            )
        mark(panel, part.index, part.macs, part.ratio)
        log_scale(panel, "x", finite(data.macs), "", 3)
        log_scale(panel, "y", ratios, "×", 5)
    figure.supxlabel("multiply-accumulates of the product", fontsize=11.5, color=MUTED)
    figure.supylabel("baseline ÷ ours", fontsize=11.5, color=MUTED)
    shared_legend(figure, panels[: len(forms)], 2 if columns < 3 else 3)
    return figure


@styled
def predicted_measured(data: pd.DataFrame, width_px: int) -> Canvas:
    """Predicted against measured latency with the ±10 % band.

    Args:
        data: split (train or test), measured_ms, predicted_ms, low_ms, high_ms.
        width_px: Width to draw for.
    """
    figure, ((axes,),) = axes_grid(width_px, 460 if not is_narrow(width_px) else 380)
    values = finite(data.measured_ms, data.predicted_ms)
    ends = np.array([min(values) / 1.25, max(values) * 1.25])
    axes.fill_between(
        ends, ends * 0.9, ends * 1.1, color=SKY, alpha=0.3, linewidth=0, label="±10 %"
    )
    axes.plot(ends, ends, color=MUTED, linewidth=1, label="predicted = measured")
    for split, colour, marker, face, label in (
        ("train", MUTED, "o", SURFACE, "seen by the model (train)"),
        ("test", PURPLE, "D", PURPLE, "held out (test)"),
    ):
        part = data[data.split == split]
        axes.errorbar(
            part.measured_ms,
            part.predicted_ms,
            yerr=error_bars(part.predicted_ms, part.low_ms, part.high_ms),
            fmt=marker,
            color=colour,
            markersize=6 if split == "test" else 4.5,
            markerfacecolor=face,
            elinewidth=1 if split == "test" else 0.5,
            alpha=1 if split == "test" else 0.75,
            label=label,
        )
    mark(axes, data.index, data.measured_ms, data.predicted_ms)
    for which in "xy":
        log_scale(axes, which, values, "", 6)
    axes.set_xlabel("measured latency, ms")
    axes.set_ylabel("predicted latency, ms")
    figure.legend(loc="outside upper left", ncols=1 if is_narrow(width_px) else 4)
    return figure

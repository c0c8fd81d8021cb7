"""Maps: speed-ups by shape, break-even over tokens and widths, rooflines, growth with tokens."""

from __future__ import annotations

import bisect
from collections.abc import Mapping

import numpy as np
import pandas as pd

from reports.layout import plain_number
from reports.palette import (
    FORM_MARKS,
    HEAT,
    INK,
    LINE,
    MUTED,
    OTHER_MARK,
    OUTCOME_MARKS,
    SURFACE,
    in_legend_order,
)
from reports.plots import (
    Axes,
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

# Where one colour ends and the next begins; between 0.95 and 1.05 nothing is gained or lost.
HEAT_ENDS = (0.67, 0.95, 1.05, 1.5, 2.5, 5.0)


def heat(ratio: float) -> str:
    """The colour of a speed ratio."""
    return HEAT[bisect.bisect_right(HEAT_ENDS, ratio)]


@styled
def heat_map(data: pd.DataFrame, width_px: int) -> Canvas:
    """Speed ratios by product and form; each written on its colour.

    Args:
        data: product, column, ratio; one row a cell.
        width_px: Width to draw for.
    """
    narrow = is_narrow(width_px)
    products, columns = (list(dict.fromkeys(data[name])) for name in ("product", "column"))
    figure, ((axes,),) = axes_grid(width_px, 150 + len(products) * (46 if narrow else 28))
    ys = [products.index(name) + 0.16 * narrow for name in data["product"]]
    xs = [columns.index(name) for name in data.column]
    for x, y, ratio in zip(xs, ys, data.ratio):
        axes.barh(y, 0.96, left=x - 0.48, height=0.6 if narrow else 0.9, color=heat(ratio))
        axes.text(
            x,
            y,
            f"{ratio:.2g}" if ratio < 10 else f"{ratio:.0f}",
            ha="center",
            va="center",
            fontsize=9.5 if narrow else 11,
        )
    mark(axes, data.index, xs, ys, width=0.96, height=0.9)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    row_labels(axes, products, width_px)
    axes.xaxis.tick_top()
    axes.set_xticks(
        range(len(columns)),
        columns,
        rotation=90 if narrow else 32,
        ha="center" if narrow else "left",
    )
    axes.tick_params(axis="x", length=0, labelcolor=INK, labelsize=9.5 if narrow else 11)
    axes.spines["bottom"].set_visible(False)
    axes.grid(visible=False)
    return figure


@styled
def break_even(data: pd.DataFrame, width_px: int, modelled: pd.DataFrame) -> Canvas:
    """Where shift and add beat every multiplication, over tokens and widths.

    Args:
        data: What was measured: panel, tokens, width, outcome.
        width_px: Width to draw for.
        modelled: What the latency table predicts behind it: panel, tokens, width, ratio, and the
            edges of each cell tokens_from, tokens_to, width_from, width_to. May be empty.
    """
    narrow = is_narrow(width_px)
    panels = list(dict.fromkeys(data.panel))
    rows, columns = (len(panels), 1) if narrow else (1, len(panels))
    figure, grid = axes_grid(width_px, 90 + rows * 290, rows, columns)
    for axes, panel in zip(grid.flat, panels):
        part = data[data.panel == panel]
        behind = modelled[modelled.panel == panel] if len(modelled) else modelled
        for cell in behind.itertuples():
            axes.fill_between(
                [cell.tokens_from, cell.tokens_to],
                cell.width_from,
                cell.width_to,
                color=heat(float(cell.ratio)),  # type: ignore[arg-type]
                linewidth=0,
            )
        for outcome, (colour, marker, label) in OUTCOME_MARKS.items():
            some = part[part.outcome == outcome]
            axes.plot(
                some.tokens,
                some.width,
                linestyle="none",
                marker=marker,
                color=colour,
                markersize=9,
                markeredgecolor=colour if outcome == "undecided" else SURFACE,
                markerfacecolor=SURFACE if outcome == "undecided" else colour,
                label=label,
            )
        mark(axes, part.index, part.tokens, part.width)
        axes.set_title(panel)
        edges = behind[["tokens_from", "tokens_to"]].to_numpy().ravel() if len(behind) else []
        sides = behind[["width_from", "width_to"]].to_numpy().ravel() if len(behind) else []
        log_scale(axes, "x", [*finite(part.tokens), *edges], "", 5)
        log_scale(axes, "y", [*finite(part.width), *sides], "", 5)
        axes.set_xlabel("tokens")
        axes.set_ylabel("width")
    shared_legend(figure, grid.flat, 1 if narrow else 3)
    return figure


@styled
def roofline(data: pd.DataFrame, width_px: int, roofs: Mapping[str, float]) -> Canvas:
    """Rate of each kernel over its arithmetic intensity, under the measured roofs.

    Args:
        data: form, macs_per_byte, gmacs_per_s.
        width_px: Width to draw for.
        roofs: Measured peak by type of the activations, in 10^9 multiply-accumulates a second.
    """
    narrow = is_narrow(width_px)
    figure, ((axes,),) = axes_grid(width_px, 400 if narrow else 420)
    forms = in_legend_order(data.form)
    for form in forms:
        part = data[data.form == form]
        colour, marker = FORM_MARKS.get(form, OTHER_MARK)
        axes.plot(
            part.macs_per_byte,
            part.gmacs_per_s,
            linestyle="none",
            marker=marker,
            color=colour,
            markersize=6.5,
            markeredgecolor=SURFACE,
            label=form,
        )
    mark(axes, data.index, data.macs_per_byte, data.gmacs_per_s)
    log_scale(axes, "x", finite(data.macs_per_byte), "", 6)
    log_scale(axes, "y", [*finite(data.gmacs_per_s), *roofs.values()], "", 6)
    for dtype, roof in roofs.items():
        axes.axhline(roof, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.annotate(
            f"{dtype} roof, {plain_number(roof)}",
            (0.01, roof),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=10.5,
        )
    axes.set_xlabel("multiply-accumulates a byte of compulsory traffic")
    axes.set_ylabel("10⁹ multiply-accumulates a second")
    shared_legend(figure, [axes], 2 if narrow else 5)
    return figure


@styled
def growth(data: pd.DataFrame, width_px: int) -> Canvas:
    """Latency over the number of tokens, one line a series.

    Args:
        data: series, tokens, latency_ms, latency_low_ms, latency_high_ms.
        width_px: Width to draw for.
    """
    narrow = is_narrow(width_px)
    names = list(dict.fromkeys(data.series))
    figure, ((axes,),) = axes_grid(width_px, 330 + len(names) * (19 if narrow else 10))
    marks = list(dict.fromkeys(FORM_MARKS.values()))
    styles = ("-", (0, (5, 3)), (0, (1, 2)))
    for index, name in enumerate(names):
        part = data[data.series == name].sort_values("tokens")
        colour, marker = marks[(index * 5) % len(marks)]
        axes.errorbar(
            part.tokens,
            part.latency_ms,
            yerr=error_bars(part.latency_ms, part.latency_low_ms, part.latency_high_ms),
            marker=marker,
            color=colour,
            linestyle=styles[index % len(styles)],
            linewidth=1.4,
            markersize=6.5,
            label=name,
        )
    mark(axes, data.index, data.tokens, data.latency_ms)
    log_scale(axes, "x", finite(data.tokens), "", 6)
    log_scale(axes, "y", finite(data.latency_ms), "", 6)
    axes.set_xlabel("tokens")
    axes.set_ylabel("latency, ms")
    shared_legend(figure, [axes], 1 if narrow else 2)
    return figure


@styled
def precision(data: pd.DataFrame, width_px: int, floor_percent: float | None) -> Canvas:
    """Half-width of each row's 95 % interval over its latency.

    Args:
        data: origin (``ours`` or ``baseline``), latency_ms, half_width_percent.
        width_px: Width to draw for.
        floor_percent: The noise floor, drawn as a line; None where it was not measured.
    """
    figure, ((axes,),) = axes_grid(width_px, 300)
    for origin, marker, face in (("ours", "o", MUTED), ("baseline", "s", SURFACE)):
        part = data[data.origin == origin]
        axes.plot(
            part.latency_ms,
            part.half_width_percent,
            linestyle="none",
            marker=marker,
            color=MUTED,
            markerfacecolor=face,
            markersize=5,
            label=origin,
        )
    mark(axes, data.index, data.latency_ms, data.half_width_percent)
    _line(axes, 2.0, "aim of a sweep, ±2 %", LINE)
    if floor_percent is not None:
        _line(axes, floor_percent, "noise floor", INK)
    log_scale(axes, "x", finite(data.latency_ms), "", 6)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("latency, ms")
    axes.set_ylabel("half-width of the interval, %")
    shared_legend(figure, [axes], 2 if is_narrow(width_px) else 4)
    return figure


def _line(axes: Axes, height: float, label: str, colour: str) -> None:
    axes.axhline(height, color=colour, linewidth=1.4, label=label)


def cell_edges(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both ends of the cells around positive values on a log axis; half a step at the ends."""
    logs = np.log(values)
    middles = (logs[1:] + logs[:-1]) / 2
    first, last = logs[0] - (middles[0] - logs[0]), logs[-1] + (logs[-1] - middles[-1])
    edges = np.exp(np.concatenate([[first], middles, [last]]))
    return edges[:-1], edges[1:]

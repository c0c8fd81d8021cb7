"""Tables to figures: the only module that imports matplotlib.

Each takes a table and a width in pixels, so that a phone gets its own drawing with text as large
as on a desk.
"""

from __future__ import annotations

import functools
import io
import math
import re
import textwrap
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from reports.layout import log_ticks, plain_number, spread
from reports.palette import (
    BLUE,
    CSS_VARIABLE,
    INK,
    OTHER_MARK,
    PURPLE,
    STYLE,
    SURFACE,
    VARIANT_MARKS,
    VERMILLION,
)

WIDE_PX, NARROW_PX = 860, 350


Draw = Callable[[pd.DataFrame, int], Figure]


def styled(draw: Draw) -> Draw:
    """Draws in the style of the report."""

    @functools.wraps(draw)
    def in_style(data: pd.DataFrame, width_px: int) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(data, width_px)

    return in_style


def to_svg(figure: Figure, name: str) -> str:
    """A figure as inline SVG with real text and themed colours.

    Args:
        figure: What a function of this module returned.
        name: Unique on the page: it keeps the identifiers of two figures apart.
    """
    written = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure.savefig(written, format="svg", dpi=72, transparent=True)
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    svg = re.sub(r"<svg[^>]*>", f"<svg {box.group(0) if box else ''}>", svg, count=1)
    svg = svg.replace("xlink:href", "href")
    for colour, variable in CSS_VARIABLE.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return svg


def axes_grid(
    width_px: int,
    height_px: float,
    rows: int = 1,
    columns: int = 1,
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[Figure, np.ndarray]:
    """A figure of that size and its axes ``(rows, columns)``; one unit of it is one pixel."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(width_px / 72, height_px / 72), dpi=72, layout=layout)
    return figure, figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)


def is_narrow(width_px: int) -> bool:
    """Whether a phone is drawn for."""
    return width_px < 600


def finite(*columns: pd.Series) -> list[float]:
    """All known numbers of some columns."""
    values = [float(value) for column in columns for value in column if value is not None]
    return [value for value in values if math.isfinite(value)]


def log_scale(axes: Axes, which: str, values: Sequence[float], unit: str = "", most: int = 6):
    """Log axis over the values with at most ``most`` plainly written ticks at 1, 2 and 5."""
    (low, high), ticks = log_ticks(values, most)
    getattr(axes, f"set_{which}scale")("log")
    getattr(axes, f"set_{which}lim")(low, high)
    axis = getattr(axes, f"{which}axis")
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda tick, _: f"{plain_number(tick)}{unit}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def row_labels(axes: Axes, labels: Sequence[str], width_px: int) -> None:
    """Names of horizontal rows: beside the axis, or above each row where there is no room."""
    axes.set_ylim(len(labels) - 0.5, -0.5 - 0.3 * is_narrow(width_px))
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines["left"].set_visible(False)
    if not is_narrow(width_px):
        axes.set_yticks(range(len(labels)), labels)
        return
    axes.set_yticks([])
    for row, label in enumerate(labels):
        axes.text(
            0, row - 0.36, label, transform=axes.get_yaxis_transform(), va="center", fontsize=11
        )


def _gutter_labels(
    axes: Axes, points: Sequence[tuple[float, float]], labels: Sequence[str], colours, width_px: int
) -> None:
    """Writes each label to the right of the axes, tied to its point, none over another."""
    narrow = is_narrow(width_px)
    low, high = axes.get_ylim()
    wrapped = [textwrap.fill(label, 13 if narrow else 34) for label in labels]
    height = axes.figure.bbox.height * 0.75
    lines = max(text.count("\n") + 1 for text in wrapped)
    fractions = spread([(y - low) / (high - low) for _, y in points], lines * 15 / height)
    for point, text, fraction, colour in zip(points, wrapped, fractions, colours):
        axes.annotate(
            text,
            xy=point,
            xytext=(1.05, fraction),
            textcoords="axes fraction",
            va="center",
            fontsize=10.5 if narrow else 11.5,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.8, "alpha": 0.6},
        )


def error_bars(value: pd.Series, low: pd.Series, high: pd.Series) -> np.ndarray:
    """Distances to both ends; 0 where an end is unknown."""
    centre = value.astype(float)
    below = (centre - low.astype(float)).fillna(0).clip(lower=0)
    above = (high.astype(float) - centre).fillna(0).clip(lower=0)
    return np.array([below, above])


@styled
def accuracy_latency(data: pd.DataFrame, width_px: int) -> Figure:
    """Top-1 against measured latency.

    Args:
        data: name, title, latency_ms, latency_low, latency_high, top1, top1_low, top1_high,
            deployed (False: the accuracy is of the trained form).
        width_px: Width to draw for.
    """
    figure, ((axes,),) = axes_grid(width_px, 330)
    colours = [VARIANT_MARKS.get(name, OTHER_MARK)[0] for name in data.name]
    for (_, row), colour in zip(data.iterrows(), colours):
        one = row.to_frame().T
        axes.errorbar(
            row.latency_ms,
            row.top1,
            xerr=error_bars(one.latency_ms, one.latency_low, one.latency_high),
            yerr=error_bars(one.top1, one.top1_low, one.top1_high),
            fmt=VARIANT_MARKS.get(row["name"], OTHER_MARK)[1],
            color=colour,
            markersize=9,
            markeredgecolor=colour,
            markerfacecolor=colour if row.deployed else SURFACE,
            elinewidth=1.6,
        )
    axes.margins(0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel("measured latency, ms a batch (left is faster)")
    axes.set_ylabel("top-1, %")
    _gutter_labels(axes, list(zip(data.latency_ms, data.top1)), list(data.title), colours, width_px)
    return figure


@styled
def end_to_end(data: pd.DataFrame, width_px: int) -> Figure:
    """Measured and predicted latency of each variant.

    Args:
        data: title, measured, measured_low, measured_high, predicted, predicted_low,
            predicted_high, all in ms, missing where there is none.
        width_px: Width to draw for.
    """
    narrow = is_narrow(width_px)
    figure, ((axes,),) = axes_grid(width_px, 90 + len(data) * (50 if narrow else 42))
    for kind, colour, marker, shift in (
        ("measured", INK, "o", -0.02),
        ("predicted", PURPLE, "D", 0.18),
    ):
        part = data[data[kind].notna()]
        axes.errorbar(
            part[kind],
            [row + shift for row in part.index],
            xerr=error_bars(part[kind], part[f"{kind}_low"], part[f"{kind}_high"]),
            fmt=marker,
            color=colour,
            markersize=7.5,
            markerfacecolor=colour if kind == "measured" else SURFACE,
            elinewidth=1.6,
            label=kind,
        )
    axes.set_xlim(left=0)
    row_labels(axes, list(data.title), width_px)
    axes.set_xlabel("latency, ms a batch")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


@styled
def routing(data: pd.DataFrame, width_px: int) -> Figure:
    """Share of tokens on each expert by layer, one panel a variant.

    Args:
        data: title, layer, expert, share, optimal_share; shares in percent.
        width_px: Width to draw for.
    """
    narrow = is_narrow(width_px)
    titles = list(dict.fromkeys(data.title))
    layers = list(dict.fromkeys(data.layer))
    rows, columns = (len(titles), 1) if narrow else (1, len(titles))
    height = 90 + rows * (40 + len(layers) * (42 if narrow else 30))
    figure, grid = axes_grid(width_px, height, rows, columns, sharey=not narrow, sharex=True)
    experts = list(dict.fromkeys(data.expert))
    for panel, title in zip(grid.flat, titles):
        part = data[data.title == title]
        left, best = np.zeros(len(layers)), np.zeros(len(layers))
        for index, expert in enumerate(experts):
            some = part[part.expert == expert].set_index("layer").reindex(layers).fillna(0)
            colour = BLUE if expert.startswith("mult") else VERMILLION
            hatch = None if expert.startswith("mult") else "////"
            panel.barh(
                np.arange(len(layers)) + 0.12 * narrow,
                some.share,
                left=left,
                height=0.46,
                color=colour,
                hatch=hatch,
                edgecolor=SURFACE,
                linewidth=0,
                label=expert,
            )
            left, best = left + some.share.to_numpy(), best + some.optimal_share.to_numpy()
            if index < len(experts) - 1:
                panel.plot(
                    best,
                    np.arange(len(layers)) + 0.12 * narrow,
                    linestyle="none",
                    marker="d",
                    color=INK,
                    markeredgecolor=SURFACE,
                    markersize=10,
                    label="optimum of the loss",
                )
        panel.set_title(textwrap.fill(title, 42))
        panel.set_xlim(0, 100)
        row_labels(panel, layers, width_px)
        panel.set_xlabel("share of tokens, %")
    handles, labels = grid.flat[0].get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    figure.legend(unique.values(), unique.keys(), loc="outside upper left", ncols=2 + (not narrow))
    return figure


@styled
def training(data: pd.DataFrame, width_px: int) -> Figure:
    """Validation accuracy, training loss and, where one was used, latency loss by epoch.

    Args:
        data: name, title, step (epochs since the variant's first), stage, validation_top1,
            train_loss, latency_loss.
        width_px: Width to draw for.
    """
    narrow = is_narrow(width_px)
    panels = {
        "validation_top1": "validation top-1, %",
        "train_loss": "training loss",
        "latency_loss": "latency loss",
    }
    drawn = [column for column in panels if data[column].notna().any()]
    rows, columns = (len(drawn), 1) if narrow else (1, len(drawn))
    figure, grid = axes_grid(width_px, 60 + rows * 210, rows, columns)
    for axes, column in zip(grid.flat, drawn):
        for name, part in data.groupby("name", sort=False):
            colour, marker = VARIANT_MARKS.get(str(name), OTHER_MARK)
            axes.plot(
                part.step,
                part[column].astype(float),
                color=colour,
                marker=marker,
                markersize=4.5,
                markevery=max(1, len(part) // 8),
                label=part.title.iloc[0],
            )
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("epoch")
        axes.set_ylabel(panels[column])
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=1 if narrow else 3)
    return figure


@styled
def bars(data: pd.DataFrame, width_px: int) -> Figure:
    """Horizontal bars with their figures written out; modelled ones hatched.

    Args:
        data: name, title, value (missing: no bar), text (written beside the bar), modelled, axis
            (the label of the axis with its unit, equal in all rows).
        width_px: Width to draw for.
    """
    narrow = is_narrow(width_px)
    figure, ((axes,),) = axes_grid(width_px, 60 + len(data) * (48 if narrow else 38))
    for row, (_, one) in enumerate(data.iterrows()):
        colour = VARIANT_MARKS.get(one["name"], OTHER_MARK)[0]
        value = 0.0 if pd.isna(one.value) else one.value
        axes.barh(
            row + 0.14 * narrow,
            value,
            height=0.44,
            color=colour,
            alpha=0.85,
            hatch="////" if one.modelled else None,
            edgecolor=SURFACE,
            linewidth=0,
        )
        axes.annotate(
            one.text,
            (value, row + 0.14 * narrow),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set_xlim(0, max(finite(data.value), default=1) * (1.55 if narrow else 1.3))
    row_labels(axes, list(data.title), width_px)
    axes.set_xlabel(data.axis.iloc[0])
    return figure

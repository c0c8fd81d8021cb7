"""Figures on models: accuracy, latency, routing, training, storage, energy."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd

from reports.layout import spread
from reports.palette import BLUE, INK, MUTED, OTHER_MARK, PURPLE, SURFACE, VARIANT_MARKS, VERMILLION
from reports.plots import (
    Axes,
    Canvas,
    axes_grid,
    error_bars,
    finite,
    is_narrow,
    mark,
    row_labels,
    shared_legend,
    styled,
    whole_numbers,
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


@styled
def accuracy_cost(data: pd.DataFrame, width_px: int, cost: str, axis: str) -> Canvas:
    """Top-1 against what an inference costs, with the front that nothing beats in both.

    Args:
        data: name, variant, the columns ``cost``, ``cost_low`` and ``cost_high`` (with the unit
            last, as in ``latency_low_ms``), top1, top1_low, top1_high, on_front, and hollow: True
            for a figure of another kind, said by the caption.
        width_px: Width to draw for.
        cost: Column on the horizontal axis.
        axis: What that axis says.
    """
    figure, ((axes,),) = axes_grid(width_px, 340)
    quantity, _, unit = cost.rpartition("_")
    low, high = (f"{quantity}_{end}_{unit}" for end in ("low", "high"))
    front = data[data.on_front].sort_values(cost)
    axes.step(
        front[cost], front.top1, where="post", color=MUTED, linewidth=1, linestyle=(0, (4, 3))
    )
    colours = [VARIANT_MARKS.get(name, OTHER_MARK)[0] for name in data.name]
    for (_, row), colour in zip(data.iterrows(), colours):
        one = row.to_frame().T
        axes.errorbar(
            row[cost],
            row.top1,
            xerr=error_bars(one[cost], one[low], one[high]),
            yerr=error_bars(one.top1, one.top1_low, one.top1_high),
            fmt=VARIANT_MARKS.get(row["name"], OTHER_MARK)[1],
            color=colour,
            markersize=9,
            markeredgecolor=colour,
            markerfacecolor=SURFACE if row.hollow else colour,
            elinewidth=1.6,
        )
    mark(axes, data.index, data[cost], data.top1)
    axes.margins(0.12)
    axes.set_xlim(left=0)
    axes.set_xlabel(axis)
    axes.set_ylabel("top-1, %")
    _gutter_labels(axes, list(zip(data[cost], data.top1)), list(data.variant), colours, width_px)
    return figure


@styled
def measured_predicted(data: pd.DataFrame, width_px: int, axis: str) -> Canvas:
    """Measured and predicted latency of each variant or layer, row by row.

    Args:
        data: The first column names the rows; measured_ms, measured_low_ms, measured_high_ms,
            predicted_ms, predicted_low_ms, predicted_high_ms, missing where there is none.
        width_px: Width to draw for.
        axis: What the axis says.
    """
    narrow = is_narrow(width_px)
    figure, ((axes,),) = axes_grid(width_px, 90 + len(data) * (50 if narrow else 42))
    for kind, colour, marker, shift in (
        ("measured", INK, "o", -0.02),
        ("predicted", PURPLE, "D", 0.18),
    ):
        part = data[data[f"{kind}_ms"].notna()]
        rows = [row + shift for row in part.index]
        axes.errorbar(
            part[f"{kind}_ms"],
            rows,
            xerr=error_bars(part[f"{kind}_ms"], part[f"{kind}_low_ms"], part[f"{kind}_high_ms"]),
            fmt=marker,
            color=colour,
            markersize=7.5,
            markerfacecolor=colour if kind == "measured" else SURFACE,
            elinewidth=1.6,
            label=kind,
        )
        mark(axes, part.index, part[f"{kind}_ms"], rows)
    axes.set_xlim(left=0)
    row_labels(axes, [str(name) for name in data.iloc[:, 0]], width_px)
    axes.set_xlabel(axis)
    figure.legend(loc="outside upper left", ncols=2)
    return figure


@styled
def routing(data: pd.DataFrame, width_px: int) -> Canvas:
    """Share of tokens on each expert by layer, one panel a variant.

    Args:
        data: variant, layer, expert, share_percent, optimal_share_percent.
        width_px: Width to draw for.
    """
    narrow = is_narrow(width_px)
    titles = list(dict.fromkeys(data.variant))
    layers = list(dict.fromkeys(data.layer))
    rows, columns = (len(titles), 1) if narrow else (1, len(titles))
    height = 90 + rows * (40 + len(layers) * (42 if narrow else 30))
    figure, grid = axes_grid(width_px, height, rows, columns, sharey=not narrow, sharex=True)
    experts = list(dict.fromkeys(data.expert))
    for panel, title in zip(grid.flat, titles):
        part = data[data.variant == title]
        left, best = np.zeros(len(layers)), np.zeros(len(layers))
        for index, expert in enumerate(experts):
            given = part[part.expert == expert]
            some = given.set_index("layer")[["share_percent", "optimal_share_percent"]]
            some = some.reindex(layers).fillna(0)
            colour = BLUE if expert.startswith("mult") else VERMILLION
            hatch = None if expert.startswith("mult") else "////"
            rows_y = np.arange(len(layers)) + 0.12 * narrow
            mark(
                panel,
                given.index,
                [
                    left[layers.index(row.layer)] + row.share_percent / 2
                    for row in given.itertuples()
                ],
                [rows_y[layers.index(layer)] for layer in given.layer],
                width=list(given.share_percent),
                height=0.46,
            )
            panel.barh(
                rows_y,
                some.share_percent,
                left=left,
                height=0.46,
                color=colour,
                hatch=hatch,
                edgecolor=SURFACE,
                linewidth=0,
                label=expert,
            )
            left = left + some.share_percent.to_numpy()
            best = best + some.optimal_share_percent.to_numpy()
            if index < len(experts) - 1:
                panel.plot(
                    best,
                    rows_y,
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
    shared_legend(figure, grid.flat, 2 + (not narrow))
    return figure


@styled
def dispatch_examples(
    data: pd.DataFrame,
    width_px: int,
    images: Sequence[Sequence[Sequence[int]]],
    grids: Sequence[Sequence[Sequence[bool]]],
) -> Canvas:
    """Images, and beside each by layer which patches went to a shift expert.

    Args:
        data: image (its number), label, guess, layer.
        width_px: Width to draw for.
        images: Grey values from 0 to 255 by number.
        grids: By row of ``data``, whether each patch did.
    """
    layers = list(dict.fromkeys(data.layer))
    height = 30 + len(images) * (width_px / (1 + len(layers)) + 34)
    figure, axes = axes_grid(width_px, height, len(images), 1 + len(layers))
    for panel in axes.flat:
        panel.set_visible(False)
    for number, image in enumerate(images):
        grey = [f"#{value:02x}{value:02x}{value:02x}" for row in image for value in row]
        _cells(axes[number][0], len(image), len(image[0]), grey)
    columns = (data.image, data.label, data.guess, data.layer)
    for index, (number, label, guess, layer, grid) in enumerate(zip(*columns, grids)):
        axes[number][0].set_title(f"{label} as {guess}", fontsize=9)
        panel = axes[number][1 + layers.index(layer)]
        flat = [to_shift for line in grid for to_shift in line]
        colours = [VERMILLION if to_shift else BLUE for to_shift in flat]
        hatches = ["////" if to_shift else None for to_shift in flat]
        high, wide = len(grid), len(grid[0])
        _cells(panel, high, wide, colours, hatches)
        panel.set_title(textwrap.shorten(layer, 22), fontsize=9)
        mark(panel, [index], [wide / 2 - 0.5], [high / 2 - 0.5], width=float(wide), height=high)
    return figure


def _cells(
    axes: Axes,
    rows: int,
    columns: int,
    colours: Sequence[str],
    hatches: Sequence[str | None] = (),
) -> None:
    axes.set_visible(True)
    ys, xs = np.divmod(np.arange(rows * columns), columns)
    bars = axes.barh(ys, 1.0, left=xs - 0.5, height=1.0, color=colours, linewidth=0)
    for bar, hatch in zip(bars, hatches):
        bar.set(hatch=hatch, edgecolor=SURFACE)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), xticks=[], yticks=[])
    axes.set_aspect("equal")


@styled
def training(data: pd.DataFrame, width_px: int) -> Canvas:
    """Validation accuracy, training loss and, where one was used, latency loss by epoch.

    Args:
        data: name, variant, step (epochs since the variant's first), stage, validation_top1,
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
                label=part.variant.iloc[0],
            )
            drawn_rows = part[part[column].notna()]
            mark(axes, drawn_rows.index, drawn_rows.step, drawn_rows[column])
        whole_numbers(axes)
        axes.set_xlabel("epoch")
        axes.set_ylabel(panels[column])
    shared_legend(figure, grid.flat, 1 if narrow else 3)
    return figure


@styled
def bars(data: pd.DataFrame, width_px: int, value: str, axis: str) -> Canvas:
    """Horizontal bars with their figures written out; modelled ones hatched.

    Args:
        data: name, variant, the column ``value`` (missing: no bar), text (written beside the
            bar) and modelled.
        width_px: Width to draw for.
        value: Column that is drawn.
        axis: What the axis says.
    """
    narrow = is_narrow(width_px)
    figure, ((axes,),) = axes_grid(width_px, 60 + len(data) * (48 if narrow else 38))
    lengths = data[value].astype(float).fillna(0.0)
    ys = [row + 0.14 * narrow for row in data.index]
    for y, length, (_, one) in zip(ys, lengths, data.iterrows()):
        axes.barh(
            y,
            length,
            height=0.44,
            color=VARIANT_MARKS.get(one["name"], OTHER_MARK)[0],
            alpha=0.85,
            hatch="////" if one.modelled else None,
            edgecolor=SURFACE,
            linewidth=0,
        )
        axes.annotate(one.text, (length, y), xytext=(6, 0), textcoords="offset points", va="center")
    mark(axes, data.index, lengths / 2, ys, width=list(lengths), height=0.44)
    axes.set_xlim(0, max(finite(lengths), default=1) * (1.55 if narrow else 1.3))
    row_labels(axes, list(data.variant), width_px)
    axes.set_xlabel(axis)
    return figure

"""The drawing board of all figures: size, axes, marks, SVG. The only module with matplotlib.

Each figure takes a table and a width in pixels, so that a phone gets its own drawing with text as
large as on a desk. Rows of the table that are drawn are marked: a reader who points at a mark is
shown that row.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from reports.layout import log_ticks, plain_number
from reports.palette import CSS_VARIABLE, INK, STYLE

WIDE_PX, NARROW_PX = 860, 350
# Large enough for a finger.
_MARK_RADIUS_PX = 10
# Of every cell and line: without the white space a page is some percent smaller.
_PATH = re.compile(r' d="[^"]+"')
_BETWEEN_COMMANDS = re.compile(r"\s*([MLCQHVAz])\s*")
# A hundredth of a pixel is finer than any screen.
_LONG_NUMBER = re.compile(r"\d+\.\d{3,}")


@dataclass(frozen=True)
class Mark:
    """Where a row of the table is drawn, in the units of its axes.

    Attributes:
        row: Position in the table.
        x, y: Its centre.
        width, height: Of a bar or a cell; 0 for a point.
    """

    axes: Axes
    row: int
    x: float
    y: float
    width: float = 0.0
    height: float = 0.0


class Canvas(Figure):
    """A figure that knows where the rows of its table are."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.marks: list[Mark] = []


Draw = Callable[..., Canvas]


def styled(draw: Draw) -> Draw:
    """Draws in the style of the report, from a table whose index counts its rows."""

    @functools.wraps(draw)
    def in_style(data: pd.DataFrame, width_px: int, **options: Any) -> Canvas:
        with matplotlib.rc_context(STYLE):
            return draw(data.reset_index(drop=True), width_px, **options)

    return in_style


def mark(
    axes: Axes,
    rows: Iterable[int],
    xs: Iterable[float],
    ys: Iterable[float],
    width: float | Iterable[float] = 0.0,
    height: float = 0.0,
) -> None:
    """Says which rows of the table lie where; ``width`` may differ from bar to bar."""
    canvas = axes.get_figure(root=True)
    assert isinstance(canvas, Canvas)
    widths = cycle([width]) if isinstance(width, float) else width
    canvas.marks += [
        Mark(axes, int(row), float(x), float(y), float(wide), height)
        for row, x, y, wide in zip(rows, xs, ys, widths)
    ]


def to_svg(figure: Canvas, name: str) -> str:
    """A figure as inline SVG with real text and themed colours.

    Args:
        figure: What a drawing function returned.
        name: Unique on the page: it keeps the identifiers of two figures apart.
    """
    written = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        _lay_out(figure)
        figure.savefig(written, format="svg", dpi=72, transparent=True)
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    box = re.search(r'viewBox="[^"]*"', svg)
    svg = re.sub(r"<svg[^>]*>", f"<svg {box.group(0) if box else ''}>", svg, count=1)
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r"<[^>]+>", lambda tag: _LONG_NUMBER.sub(_rounded, tag.group(0)), svg)
    svg = _PATH.sub(lambda path: _BETWEEN_COMMANDS.sub(r"\1", path.group(0)), svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    for colour, variable in CSS_VARIABLE.items():
        svg = svg.replace(colour, f"var(--{variable})")
    end = svg.rindex("</svg>")
    return f'{svg[:end]}<g class="marks">{"".join(_shapes(figure))}</g></svg>'


def _lay_out(figure: Canvas) -> None:
    """Once and for all: to save a figure that is not laid out draws the whole of it twice."""
    engine = figure.get_layout_engine()
    if engine is not None:
        # Texts are as wide as this canvas says.
        FigureCanvasSVG(figure)
        engine.execute(figure)
        figure.set_layout_engine(None)


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number.group(0)):.2f}"


def _shapes(figure: Canvas) -> Iterable[str]:
    height_px = figure.bbox.height
    for one in figure.marks:
        to_px = one.axes.transData.transform
        x, y = to_px((one.x, one.y))
        if not (math.isfinite(x) and math.isfinite(y)):
            continue
        if not one.width:
            yield (
                f'<circle cx="{x:.1f}" cy="{height_px - y:.1f}" r="{_MARK_RADIUS_PX}" '
                f'data-row="{one.row}"/>'
            )
            continue
        left, low = to_px((one.x - one.width / 2, one.y - one.height / 2))
        right, high = to_px((one.x + one.width / 2, one.y + one.height / 2))
        top = height_px - max(low, high)
        yield (
            f'<rect x="{min(left, right):.1f}" y="{top:.1f}" width="{abs(right - left):.1f}" '
            f'height="{abs(high - low):.1f}" data-row="{one.row}"/>'
        )


def axes_grid(
    width_px: int,
    height_px: float,
    rows: int = 1,
    columns: int = 1,
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[Canvas, np.ndarray]:
    """A figure of that size and its axes ``(rows, columns)``; one unit of it is one pixel."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Canvas(figsize=(width_px / 72, height_px / 72), dpi=72, layout=layout)
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


def whole_numbers(axes: Axes) -> None:
    """Ticks of the x axis at whole numbers only."""
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


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


def error_bars(value: pd.Series, low: pd.Series, high: pd.Series) -> np.ndarray:
    """Distances to both ends; 0 where an end is unknown."""
    centre = value.astype(float)
    below = (centre - low.astype(float)).fillna(0).clip(lower=0)
    above = (high.astype(float) - centre).fillna(0).clip(lower=0)
    return np.array([below, above])


def shared_legend(figure: Canvas, panels: Iterable[Axes], columns: int) -> None:
    """One legend above all panels, each name once."""
    found: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels()):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside upper left", ncols=columns)

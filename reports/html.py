"""Content of a report to one self-contained HTML page; every string is escaped."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from reports.formats import DASH, Cell, significant
from reports.plots import NARROW_PX, WIDE_PX, Draw, to_svg

TEMPLATES = Path(__file__).parent / "templates"
# Longer tables would make the page heavy; the rest is in the file that the table is made from.
MAX_ROWS = 500
# Each mark of a picture is drawn twice and has a row in the table behind.
MAX_MARKS = 300


@dataclass(frozen=True)
class Verdict:
    """The answer in one sentence, and what it rests on.

    Attributes:
        status: One of the words that the page has a colour and a sign for.
        headline: The sentence.
        details: Further sentences.
    """

    status: Literal["pays", "does not pay", "mixed", "undecided"]
    headline: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Card:
    """A key figure; ``figure`` is a dash where there is none and ``detail`` says why."""

    label: str
    figure: str
    detail: str


@dataclass(frozen=True)
class Picture:
    """A figure, drawn once for a wide and once for a narrow screen, with its table behind it.

    Attributes:
        name: Unique on the page.
        title: What it is about, in a few words.
        draw: Takes the table, a width in pixels and the options.
        data: The table: what is drawn, shown beside a mark that is pointed at, and copied.
        alt: What the picture shows, for those who cannot see it.
        caption: How to read it.
        options: Further arguments of ``draw``.
    """

    name: str
    title: str
    draw: Draw
    data: pd.DataFrame
    alt: str
    caption: str
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table; ``is_open`` shows it without a click."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | Cell, ...], ...]
    is_open: bool = False
    note: str = ""


@dataclass(frozen=True)
class Section:
    """One question and its answer.

    Attributes:
        anchor: Identifier in the page's address.
        missing: Which file is missing and which command makes it, or None.
        lead: The answer in words.
        commands: What made the figures of this section.
    """

    anchor: str
    title: str
    lead: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    commands: tuple[str, ...] = ()
    missing: str | None = None


@dataclass(frozen=True)
class Part:
    """The sections that answer one of the reader's questions."""

    question: str
    sections: tuple[Section, ...]


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    subtitle: str
    verdict: Verdict
    cards: tuple[Card, ...]
    parts: tuple[Part, ...]
    missing: tuple[str, ...] = ()


def _cell(cell: str | Cell) -> Cell:
    return cell if isinstance(cell, Cell) else Cell(cell)


def _drawings(picture: Picture) -> dict[str, Markup]:
    widths = {"wide": WIDE_PX, "narrow": NARROW_PX}
    # to_svg escapes every name that is drawn; nothing else in it comes from the data.
    return {
        kind: Markup(
            to_svg(picture.draw(picture.data, width, **picture.options), f"{picture.name}-{kind}")
        )
        for kind, width in widths.items()
    }


def _plain(value: object) -> Cell:
    """A value of a picture's table; figures keep the digits that a copy of them needs."""
    if value is None or value is pd.NA or value != value:
        return Cell(DASH)
    if isinstance(value, bool | np.bool_):
        return Cell("yes" if value else "no")
    if isinstance(value, int | np.integer):
        return Cell(str(value), int(value))
    if isinstance(value, float | np.floating):
        return Cell(significant(float(value), 4), float(f"{value:.6g}"))
    return Cell(str(value))


def table_behind(picture: Picture) -> Table:
    """The table that a picture is drawn from, row by row in the order of its marks."""
    rows = tuple(
        tuple(_plain(value) for value in row)
        for row in picture.data.itertuples(index=False, name=None)
    )
    return Table(f"Figures of “{picture.title}”", tuple(map(str, picture.data.columns)), rows)


def _numeric(table: Table) -> list[bool]:
    """Whether a column holds figures: those are set to the right."""
    return [
        any(_cell(row[index]).value is not None for row in table.rows)
        for index in range(len(table.columns))
    ]


def render(page: Page) -> str:
    """The page as HTML: styles, script and drawings inline, nothing loaded from elsewhere."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(
        page=page,
        style=Markup((TEMPLATES / "report.css").read_text()),
        script=Markup((TEMPLATES / "report.js").read_text()),
        as_cell=_cell,
        drawings=_drawings,
        table_behind=table_behind,
        numeric=_numeric,
        max_rows=MAX_ROWS,
    )

"""Content of a report to one self-contained HTML page; every string is escaped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from reports.formats import Cell
from reports.plots import NARROW_PX, WIDE_PX, Figure, to_svg

TEMPLATES = Path(__file__).parent / "templates"
# Longer tables would make the page heavy; the rest is in the file that the table is made from.
MAX_ROWS = 500


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
    """A figure, drawn once for a wide and once for a narrow screen.

    Attributes:
        name: Unique on the page.
        draw: Takes a width in pixels.
        alt: What the picture shows, for those who cannot see it.
        caption: How to read it.
    """

    name: str
    draw: Callable[[int], Figure]
    alt: str
    caption: str


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
        lead: The answer in words.
        commands: What made the figures of this section.
        missing: Which file is missing and which command makes it, or None.
    """

    anchor: str
    title: str
    lead: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    commands: tuple[str, ...] = ()
    missing: str | None = None


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    subtitle: str
    verdict: Verdict
    cards: tuple[Card, ...]
    sections: tuple[Section, ...]
    missing: tuple[str, ...] = ()


def _cell(cell: str | Cell) -> Cell:
    return cell if isinstance(cell, Cell) else Cell(cell)


def _drawings(picture: Picture) -> dict[str, Markup]:
    widths = {"wide": WIDE_PX, "narrow": NARROW_PX}
    # to_svg escapes every name that is drawn; nothing else in it comes from the data.
    return {
        name: Markup(to_svg(picture.draw(width), f"{picture.name}-{name}"))
        for name, width in widths.items()
    }


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
        script=Markup((TEMPLATES / "sort.js").read_text()),
        as_cell=_cell,
        drawings=_drawings,
        numeric=_numeric,
        max_rows=MAX_ROWS,
    )

"""Numbers as people read them. A missing figure is a dash with its reason, never 0."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from profiler.device import DeviceInfo

DASH = "—"


class WithInterval(Protocol):
    """Anything with a value and the two ends of its interval."""

    @property
    def value(self) -> float: ...  # noqa: D102

    @property
    def low(self) -> float | None: ...  # noqa: D102

    @property
    def high(self) -> float | None: ...  # noqa: D102


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: What is shown.
        value: What the column is sorted by; None for text and for missing figures.
        reason: Why there is no figure, or what the figure needs to be understood.
        interval: Both ends, written below the figure.
    """

    text: str
    value: float | None = None
    reason: str | None = None
    interval: str | None = None


def missing(reason: str | None) -> Cell:
    """The cell of a figure that there is not."""
    return Cell(DASH, None, reason)


def significant(value: float, digits: int = 3) -> str:
    """A number with that many significant digits, without an exponent and with a true minus."""
    if not math.isfinite(value):
        return DASH
    if value == 0:
        return "0"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, decimals)
    return f"{rounded:.{max(decimals, 0)}f}".replace("-", "−")


def signed(value: float, decimals: int = 2) -> str:
    """A difference with its sign."""
    return f"{value:+.{decimals}f}".replace("-", "−")


def percent(value: float | None, decimals: int = 1) -> str:
    """A figure that is already in percent."""
    return DASH if value is None else f"{value:.{decimals}f} %"


def ends(interval: WithInterval, write: Callable[[float], str] = significant) -> str:
    """``[low, high]``, or that there is no interval."""
    if interval.low is None or interval.high is None:
        return "no interval"
    return f"[{write(interval.low)}, {write(interval.high)}]"


def milliseconds_cell(interval: WithInterval) -> Cell:
    """A latency with its interval, in ms."""
    return Cell(f"{significant(interval.value)} ms", interval.value, None, ends(interval))


def times_cell(ratio: WithInterval, reason: str | None = None) -> Cell:
    """A ratio of latencies with its interval."""
    return Cell(f"{significant(ratio.value)}×", ratio.value, reason, ends(ratio))


def points_cell(difference: WithInterval) -> Cell:
    """A difference of percentages with its interval, in points."""
    return Cell(signed(difference.value), difference.value, None, ends(difference, signed))


def top1_cell(interval: WithInterval) -> Cell:
    """An accuracy in percent with its interval."""
    limits = ends(interval, lambda value: f"{value:.2f}")
    return Cell(f"{interval.value:.2f} %", interval.value, None, limits)


def bytes_text(count: int | None) -> str:
    """A size in decimal units."""
    if count is None:
        return DASH
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{significant(count / size)} {unit}"
    return f"{count} B"


def bytes_cell(count: int | None, reason: str | None = None) -> Cell:
    """A size as a cell, sorted by bytes."""
    return missing(reason) if count is None else Cell(bytes_text(count), count)


def number_cell(value: float | None, reason: str | None = None, digits: int = 3) -> Cell:
    """A plain number as a cell."""
    return missing(reason) if value is None else Cell(significant(value, digits), value)


def count_cell(value: int | None, reason: str | None = None) -> Cell:
    """A whole number as a cell."""
    return missing(reason) if value is None else Cell(str(value), value)


def percent_cell(value: float | None, reason: str | None = None) -> Cell:
    """A figure in percent as a cell."""
    return missing(reason) if value is None else Cell(percent(value), value)


def short_label(device: DeviceInfo) -> str:
    """The device's name and threads; its vector extensions stand in the table of the machine."""
    return (
        f"{device.name}, {device.threads} thread{'s' * (device.threads != 1)}"
        if device.kind == "cpu"
        else device.name
    )

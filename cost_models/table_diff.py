"""Two latency tables -> what differs between them. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from cost_models.entry import Entry
from cost_models.latency_table import LatencyTable

# Two tables are two jobs: on one machine they scatter by this much without any cause.
THRESHOLD = 0.1

Change = Literal["same", "faster", "slower", "only in the first", "only in the second"]


@dataclass(frozen=True)
class EntryDiff:
    """One workload and lowering in two tables.

    Attributes:
        label, lowering: What was measured.
        change: Of the second against the first. ``faster`` and ``slower`` are those whose intervals
            lie apart and whose medians differ by more than the threshold.
        first_ms, second_ms: None in the table that has none.
        speed: first ÷ second; None where one is missing.
    """

    label: str
    lowering: str
    change: Change
    first_ms: float | None
    second_ms: float | None
    speed: float | None


def diff(
    first: LatencyTable, second: LatencyTable, threshold: float = THRESHOLD
) -> tuple[EntryDiff, ...]:
    """Every measured workload of either table, in the order of the first.

    Args:
        first, second: Tables, of one device or of two.
        threshold: Relative difference of the medians below which nothing is called different.
    """
    left = {(entry.workload, entry.lowering): entry for entry in first.entries}
    right = {(entry.workload, entry.lowering): entry for entry in second.entries}
    return tuple(
        _entry_diff(left.get(key), right.get(key), threshold)
        for key in dict.fromkeys([*left, *right])
    )


def _entry_diff(first: Entry | None, second: Entry | None, threshold: float) -> EntryDiff:
    either = first or second
    assert either is not None
    return EntryDiff(
        label=either.workload.label,
        lowering=either.lowering,
        change=_change(first, second, threshold),
        first_ms=first.latency_ms if first else None,
        second_ms=second.latency_ms if second else None,
        speed=first.latency_ms / second.latency_ms if first and second else None,
    )


def _change(first: Entry | None, second: Entry | None, threshold: float) -> Change:
    if first is None:
        return "only in the second"
    if second is None:
        return "only in the first"
    if first.low_ms > second.high_ms and first.latency_ms > second.latency_ms * (1 + threshold):
        return "faster"
    if second.low_ms > first.high_ms and second.latency_ms > first.latency_ms * (1 + threshold):
        return "slower"
    return "same"


def models_only_in(one: LatencyTable, other: LatencyTable) -> tuple[str, ...]:
    """Forms and lowerings that one table has a model of and the other has not."""
    known = {(model.form, model.lowering) for model in other.models}
    return tuple(
        f"{model.form} {model.lowering}"
        for model in one.models
        if (model.form, model.lowering) not in known
    )


def geometric_mean_speed(rows: Sequence[EntryDiff]) -> float | None:
    """Of the second over the first, over what both have; None if nothing is in both."""
    logs = [math.log(row.speed) for row in rows if row.speed]
    return math.exp(sum(logs) / len(logs)) if logs else None


def summary(first: LatencyTable, second: LatencyTable, rows: Sequence[EntryDiff]) -> list[str]:
    """The differences in a few sentences."""
    counts = Counter(row.change for row in rows)
    speed = geometric_mean_speed(rows)
    found = [", ".join(f"{number} {change}" for change, number in counts.items()) or "no rows"]
    if first.sha256 == second.sha256:
        return ["the two tables are equal"]
    if first.device.fingerprint != second.device.fingerprint:
        found.append(f"two devices: {first.device.label} and {second.device.label}")
    if speed:
        found.append(f"the second is {speed:.3f}× as fast as the first (geometric mean)")
    for which, here, there in (("first", first, second), ("second", second, first)):
        if names := models_only_in(here, there):
            found.append(f"models only in the {which}: {', '.join(names)}")
    return found


def diff_table(rows: Sequence[EntryDiff]) -> Table:
    """What is not the same, for people."""
    table = Table(box=SIMPLE, padding=0)
    table.add_column("workload", overflow="fold")
    table.add_column("lowering", no_wrap=True)
    for heading in ("first, ms", "second, ms", "speed", "change"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if row.change == "same":
            continue
        figures = (row.first_ms, row.second_ms, row.speed)
        table.add_row(
            escape(row.label),
            escape(row.lowering),
            *("-" if figure is None else f"{figure:.4g}" for figure in figures),
            row.change,
        )
    return table

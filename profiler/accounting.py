"""Where the time of a sweep went: what the harness itself costs, and how many rows it earned."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

from profiler.measurement import Measurement

# Rows are counted as precise when their interval is within ± this much of the median.
PRECISE = 0.02


def process_age_s() -> float:
    """Seconds since this process was started, imports included."""
    return time.time() - psutil.Process().create_time()


@dataclass
class Accounting:
    """Seconds by what they went to.

    ``building`` is the compilers', packing and the first launch, at which torch compiles;
    ``sampling`` is all time inside the clock's rounds, warm-ups included; ``energy`` are its
    windows. Everything else is the harness: start-up, random operands, checks against the oracle,
    statistics, the store, tables.
    """

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def charge(self, name: str) -> Iterator[None]:
        """Adds the time that its block takes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def lines(self, wall_s: float, rows: Sequence[Measurement]) -> list[str]:
        """Two lines for people.

        Args:
            wall_s: What is to be accounted for.
            rows: Those that were measured in that time.
        """
        own = ("building", "sampling", "energy")
        harness_s = wall_s - sum(self.seconds[name] for name in own)
        parts = [f"{name} {s:.1f} s" for name, s in self.seconds.items() if s >= 0.05]
        return [
            f"{wall_s:.1f} s since start: {', '.join(parts)}; the harness (all but"
            f" {', '.join(own)}; sampling includes warm-ups) {harness_s:.1f} s,"
            f" {harness_s / wall_s:.1%}",
            rate(wall_s, rows),
        ]


def relative_half_width(row: Measurement) -> float | None:
    """Half of a row's 95 % interval over its median; None without a figure."""
    if row.latency_ms is None or row.latency_low_ms is None or row.latency_high_ms is None:
        return None
    return (row.latency_high_ms - row.latency_low_ms) / 2 / row.latency_ms


def rate(wall_s: float, rows: Sequence[Measurement]) -> str:
    """How many rows with a figure a minute, and how many of them precise."""
    measured = [row for row in rows if row.latency_ms is not None]
    widths = [width for row in measured if (width := relative_half_width(row)) is not None]
    precise = sum(width <= PRECISE for width in widths)
    minutes = wall_s / 60
    share = f", {precise / len(measured):.0%}" if measured else ""
    return (
        f"{len(measured)} rows measured, {len(measured) / minutes:.0f} a minute; within"
        f" ±{PRECISE:.0%}: {precise} rows, {precise / minutes:.0f} a minute{share}"
    )

"""What a row noted of rounds that it shared with rivals: how many times as fast it was.

Latencies of two rows may be of different minutes; two identical programs then look up to 1.6 times
apart on a host that others work on, and 1 % in interleaved rounds. Pure functions, no clock.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from profiler.measurement import Measurement
from profiler.ratios import Ratio


def schedule_of(lowering: str) -> str:
    """The schedule in a lowering's name; small weights are multiplied by that of the others."""
    return lowering.partition(".")[2].removeprefix("small_")


def detail_name(types: str) -> str:
    """What a row's details call the latency of a shift over that of our mult."""
    return f"shift_over_{types}_mult"


def speed_over(row: Measurement, types: str) -> Ratio | None:
    """How many times as fast as our mult a shift was, with its 95 % interval.

    Returns:
        None where they were not measured in common rounds.
    """
    ratio = _noted(row, detail_name(types))
    return Ratio(1 / ratio.value, 1 / ratio.high, 1 / ratio.low) if ratio else None


def speed_over_baseline(row: Measurement, lowering: str) -> Ratio | None:
    """The same over a baseline, which was the fastest; None over any other."""
    is_noted = row.details.get("speedup_baseline") == lowering
    return _noted(row, "speedup") if is_noted else None


def _noted(row: Measurement, name: str) -> Ratio | None:
    values = [row.details.get(f"{name}{end}") for end in ("", "_low", "_high")]
    return Ratio(*(float(value or 0) for value in values)) if all(values) else None


def speeds_over_int8(rows: Iterable[Measurement]) -> dict[str, list[float]]:
    """How many times as fast as our int8 mult each of our other forms was, a product each.

    A mult of 7 bits is set against it through the shift that both shared rounds with.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        over_int8 = speed_over(row, "int8")
        if row.workload is None or over_int8 is None:
            continue
        found[row.workload.form].append(over_int8.value)
        over_int7 = speed_over(row, "int7")
        if over_int7 and row.workload.form == "shift_int8":
            found["mult_int7"].append(over_int8.value / over_int7.value)
    return dict(found)

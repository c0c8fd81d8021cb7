"""What two candidates of one run say of each other: their ratio, and an A/A pair's noise floor.

Pure functions, no clock.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from profiler.samples import FEWEST_BURSTS, Timing, median_interval


@dataclass(frozen=True)
class Ratio:
    """A ratio of two latencies measured in one run, with its 95 % interval."""

    value: float
    low: float
    high: float


def paired_ratio(numerator: Timing, denominator: Timing) -> Ratio | None:
    """Ratio of two candidates of one run, by rounds: what both saw at the same time cancels.

    Returns:
        The median of the rounds' ratios with its interval; None with fewer than 6 common rounds
        or where one of them was contended.
    """
    if numerator.latency_ms is None or denominator.latency_ms is None:
        return None
    ratios = [
        above / below
        for above, below in zip(numerator.rounds_ms, denominator.rounds_ms, strict=False)
        if above is not None and below is not None
    ]
    if len(ratios) < FEWEST_BURSTS:
        return None
    return Ratio(float(np.median(ratios)), *median_interval(ratios))


def noise_floor(first: Timing, second: Timing) -> float | None:
    """The relative difference below which nothing of a run is to be called a difference.

    The largest difference that the 95 % interval of their ratio allows between two candidates
    that are known to be equal.

    Args:
        first, second: An A/A pair: one kernel bound twice, to operands and outputs of its own
            (where they lie in memory is part of the noise), and measured interleaved.

    Returns:
        Such as 0.004 for 0.4 %; None where ``paired_ratio`` has none.
    """
    ratio = paired_ratio(first, second)
    return None if ratio is None else max(ratio.high, 1 / ratio.low) - 1

"""The same candidates measured in several passes, some time apart, as one measurement.

A virtual machine's core is slower or faster for seconds to minutes, by more than the samples of one
measurement tell: clocks, caches and memory are shared with guests who come and go. Passes that lie
apart meet several such states, so that a median over them is of the machine and not of a moment.
Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from statistics import fmean

import numpy as np

from profiler.measurement import Measurement
from profiler.samples import CLOCK_RATE, FEWEST_BURSTS, Timing, TimingSettings, timing_of

# Names in ``Timing.details``: how many passes a figure is of, and how far their medians lie apart,
# the largest over the least, less 1.
PASSES, PASS_SPREAD = "passes", "pass_spread"

# Times as slow as the fastest of its kind, from which on one pass is enough.
FAR_BEHIND = 4.0

_MEANS = ("waiting_share", "others_share", "own_core_share", CLOCK_RATE)


def of_a_pass(settings: TimingSettings, passes: int) -> TimingSettings:
    """The time of a measurement shared out among its passes."""
    return replace(
        settings,
        rounds_min=max(FEWEST_BURSTS, math.ceil(settings.rounds_min / passes)),
        min_time_s=settings.min_time_s / passes,
        max_time_s=settings.max_time_s / passes,
    )


def pool(passes: Sequence[Mapping[str, Timing]]) -> dict[str, Timing]:
    """What all passes say together of each candidate.

    A pass that gave no figure, or only one of a core that a neighbour worked on, does not count
    where another gave a better one. Rounds of one pass stay beside each other, so that ratios of
    candidates are still of what both saw at the same time.

    Args:
        passes: Timings by name of each pass; a pass may have none.

    Returns:
        A Timing for each name.
    """
    lengths = [max((len(t.rounds_ms) for t in timings.values()), default=0) for timings in passes]
    found = {}
    for name in dict.fromkeys(chain.from_iterable(passes)):
        rounds = [timings[name].rounds_ms if name in timings else () for timings in passes]
        filled = ((*some, *[None] * (length - len(some))) for some, length in zip(rounds, lengths))
        together = _together([timings[name] for timings in passes if name in timings])
        found[name] = replace(together, rounds_ms=tuple(chain.from_iterable(filled)))
    return found


def far_behind(first: Mapping[str, Timing], rivals: Iterable[str]) -> set[str]:
    """Those of some rivals that another of them is FAR_BEHIND times as fast as.

    A further pass would say nothing new of them, and take the longest: PyTorch's bf16 takes seconds
    a launch on a CPU that has no instruction for it.

    Args:
        first: Timings by name of the first pass.
        rivals: Names.
    """
    known = {name: first[name].latency_ms for name in rivals if name in first}
    latencies = {name: latency_ms for name, latency_ms in known.items() if latency_ms}
    least_ms = min(latencies.values(), default=0.0)
    return {name for name, latency_ms in latencies.items() if latency_ms > FAR_BEHIND * least_ms}


def _together(parts: Sequence[Timing]) -> Timing:
    measured = [part for part in parts if part.latency_ms is not None]
    chosen = [part for part in measured if not part.on_shared_core] or measured or parts[-1:]
    medians = [part.latency_ms for part in chosen if part.latency_ms is not None]
    details = dict(chosen[-1].details) | {PASSES: len(chosen)}
    for key in _MEANS:
        values = [float(part.details[key] or 0) for part in chosen if key in part.details]
        if values:
            details[key] = round(fmean(values), 4)
    if len(medians) < 2:
        return replace(chosen[-1], details=details)
    details[PASS_SPREAD] = round(max(medians) / min(medians) - 1, 4)
    unsure = [part.stop_reason for part in chosen if part.stop_reason != "precision"]
    return timing_of(
        np.concatenate([part.samples_ms for part in chosen]),
        tuple(chain.from_iterable(part.bursts_ms for part in chosen)),
        samples_discarded=sum(part.samples_discarded for part in chosen),
        stop_reason=unsure[0] if unsure else "precision",
        details=details,
    )


def pass_lines(rows: Sequence[Measurement]) -> list[str]:
    """How far the passes of a row lie apart; nothing where there was one only."""
    spreads = [float(row.details[PASS_SPREAD] or 0) for row in rows if PASS_SPREAD in row.details]
    if not spreads:
        return []
    half, most = np.quantile(spreads, (0.5, 0.9))
    return [f"measured again a while later: half of the rows within {half:.1%}, 90 % {most:.1%}"]

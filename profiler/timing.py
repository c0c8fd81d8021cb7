"""Timing: warm-up, bursts of samples and the stopping rule. No files are written.

Candidates of one product are measured interleaved in one process (A B C A B C …), so that
whatever drifts drifts under all of them alike, and their ratio means something even where their
absolute figures move. What the samples then say is worked out in ``profiler.samples``; a GPU's
samples are taken by ``profiler.timing_cuda``.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any

import numpy as np

from profiler.contamination import NO_CONTAMINATION, Contamination, host_contamination
from profiler.ratios import Ratio, noise_floor, paired_ratio
from profiler.samples import (
    PRESETS,
    Burst,
    Timing,
    TimingSettings,
    has_plateaued,
    summarise,
)

__all__ = [
    "NO_CONTAMINATION",
    "PRESETS",
    "Candidate",
    "Contamination",
    "Ratio",
    "Sample",
    "Timing",
    "TimingSettings",
    "cache_flush",
    "host_contamination",
    "measure_interleaved",
    "noise_floor",
    "paired_ratio",
]

Launch = Callable[[], Any]
Facts = Mapping[str, str | float | int | bool | None]

# The largest private cache of a core in use, where the machine does not tell.
_PRIVATE_CACHE_BYTES = 2**22


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Sample:
    """One sample: ms per launch, and whether the clock was too low; None if the device is mum."""

    latency_ms: float
    throttled: bool | None = None


@dataclass(frozen=True)
class Candidate:
    """One thing to time, ready to be sampled.

    Attributes:
        warm: Launches for about a sample's length and returns ms per launch, hot.
        sample: Takes one sample.
        number: Launches in one sample.
        samples_per_burst: As many as fill a burst.
        before: Done before each sample; what it waits for is not the sample's.
        facts: Read at the end, into ``Timing.details``.
        clock_mhz: Present clock of the device, None where it does not tell.
        rest: Done before the warm-up of each burst: lets what the candidate before it has left
            running come to an end.
    """

    warm: Callable[[], float]
    sample: Callable[[], Sample]
    number: int
    samples_per_burst: int
    before: Callable[[], Any] = _nothing
    facts: Callable[[], Facts] = field(default=dict)
    clock_mhz: Callable[[], float | None] = lambda: None
    rest: Callable[[], Any] = _nothing


def measure_interleaved(
    launches: Mapping[str, Launch],
    settings: TimingSettings = PRESETS["standard"],
    clock: Callable[[], float] = time.perf_counter,
    contamination: Contamination | None = None,
    synchronise: Callable[[], Any] = lambda: None,
    flush: Callable[[], Any] | None = None,
    clock_rate: Callable[[], float] | None = None,
) -> dict[str, Timing]:
    """Times candidates against each other: in each round a warm-up and a burst of every one.

    A launch is a Python call; that call, some 50 ns, is part of every figure.

    Args:
        launches: Candidates by name; each call is one launch.
        settings: How long and how precisely.
        clock: Seconds, only growing.
        contamination: Counters of lost time; those of this machine by default.
        synchronise: Waits for what was launched; the clock is read after it.
        flush: For a cold cache: empties it before each sample, which is then a single launch.
            See ``cache_flush``.
        clock_rate: How fast the CPU's clock is now, to be noted beside the figures; see
            ``profiler.clock``.

    Returns:
        A Timing for each name, in the same order.
    """
    with without_garbage_collection():
        candidates = {
            name: _host_candidate(launch, settings, clock, synchronise, flush)
            for name, launch in launches.items()
        }
        counters = contamination or host_contamination()
        if clock_rate:
            counters = replace(counters, clock_rate=clock_rate)
        return interleave(candidates, settings, clock, counters)


def cache_flush(last_level_cache_bytes: int) -> Callable[[], Any]:
    """A call that replaces the contents of the caches.

    Writes twice the last-level cache's size, then reads it. A private cache need not be part of
    that one, so on each other CPU twice the private cache's size is read as well.

    Args:
        last_level_cache_bytes: As in ``DeviceInfo``.
    """
    buffer = np.zeros(2 * last_level_cache_bytes // 8)
    private = buffer[: 2 * _private_cache_bytes() // 8]

    def flush() -> float:
        np.add(buffer, 1.0, out=buffer)
        _on_each_usable_cpu(private.sum)
        return float(buffer.sum())

    return flush


def _private_cache_bytes() -> int:
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
        return int(size.removesuffix("K")) * 2**10
    except (OSError, ValueError):
        return _PRIVATE_CACHE_BYTES


def _on_each_usable_cpu(work: Callable[[], Any]) -> None:
    """Does it there, and lets this thread run wherever it could before."""
    if not hasattr(os, "sched_setaffinity"):
        return
    usable = os.sched_getaffinity(0)
    try:
        for cpu in usable:
            os.sched_setaffinity(0, {cpu})
            work()
    finally:
        os.sched_setaffinity(0, usable)


def _host_candidate(
    launch: Launch,
    settings: TimingSettings,
    clock: Callable[[], float],
    synchronise: Callable[[], Any],
    flush: Callable[[], Any] | None,
) -> Candidate:
    def hot_ms(number: int) -> float:
        synchronise()
        start = clock()
        for _ in repeat(None, number):
            launch()
        synchronise()
        return (clock() - start) * 1e3

    def whole_ms() -> float:
        start = clock()
        if flush:
            flush()
        hot_ms(number)
        return (clock() - start) * 1e3

    hot_number = launches_per_sample(hot_ms, settings.sample_ms)
    plateaued = first_warm_up(lambda: hot_ms(hot_number), settings, clock)
    hot_number = launches_per_sample(hot_ms, settings.sample_ms)
    number = 1 if flush else hot_number
    step_ms = min(whole_ms() for _ in range(2))
    return Candidate(
        warm=lambda: hot_ms(hot_number) / hot_number,
        sample=lambda: Sample(hot_ms(number) / number),
        number=number,
        samples_per_burst=max(1, round(settings.burst_ms / step_ms)),
        before=flush or _nothing,
        facts=lambda: {"plateaued": plateaued},
        rest=lambda: time.sleep(settings.rest_ms / 1e3),
    )


def launches_per_sample(elapsed_ms: Callable[[int], float], sample_ms: float) -> int:
    """Launches that fill a sample; the shorter of two trials, since either may be disturbed."""
    number = 1
    while (taken_ms := min(elapsed_ms(number) for _ in range(2))) < sample_ms / 2:
        number *= 2
    return max(1, round(number * sample_ms / taken_ms))


def first_warm_up(
    warm: Callable[[], float],
    settings: TimingSettings,
    clock: Callable[[], float],
    clock_mhz: Callable[[], float | None] = lambda: None,
) -> bool:
    """Brings a candidate and its device from rest to a plateau, and says whether it got there."""
    least_ms = max(settings.warmup_ms, settings.warmup_max_ms / 10)
    return _warm_up(warm, least_ms, settings.warmup_max_ms, clock, clock_mhz)


def _warm_up(
    warm: Callable[[], float],
    least_ms: float,
    most_ms: float,
    clock: Callable[[], float],
    clock_mhz: Callable[[], float | None],
) -> bool:
    """Launches until both the samples and the device's clock have plateaued.

    Returns:
        Whether they have; False when ``most_ms`` ended it.
    """
    latencies: list[float] = []
    clocks: list[float] = []
    start = clock()
    while True:
        latencies.append(warm())
        if (mhz := clock_mhz()) is not None:
            clocks.append(mhz)
        spent_ms = (clock() - start) * 1e3
        if spent_ms < least_ms:
            continue
        settled = has_plateaued(latencies) and (not clocks or has_plateaued(clocks))
        if settled or spent_ms >= most_ms:
            return settled


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Holds while samples are taken."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def interleave(
    candidates: Mapping[str, Candidate],
    settings: TimingSettings,
    clock: Callable[[], float],
    contamination: Contamination,
) -> dict[str, Timing]:
    """Rounds of bursts until each candidate is precise enough or out of time.

    Args:
        candidates: By name, each warmed up once.
        settings: How long and how precisely.
        clock: Seconds, only growing.
        contamination: Counters of lost time.
    """
    finished: dict[str, Timing] = {}
    bursts: dict[str, list[Burst]] = {name: [] for name in candidates}
    spent_s = dict.fromkeys(candidates, 0.0)
    while len(finished) < len(candidates):
        for name, candidate in candidates.items():
            if name in finished:
                continue
            start = clock()
            bursts[name].append(_take_burst(candidate, settings, clock, contamination))
            spent_s[name] += clock() - start
            if timing := _finish(bursts[name], spent_s[name], settings):
                details = {**timing.details, **candidate.facts()}
                finished[name] = replace(timing, details=details)
    return {name: finished[name] for name in candidates}


def _take_burst(
    candidate: Candidate,
    settings: TimingSettings,
    clock: Callable[[], float],
    contamination: Contamination,
) -> Burst:
    most_ms = max(settings.warmup_ms, settings.warmup_max_ms / 10)
    look, clock_rate = contamination.core_share, contamination.clock_rate
    # Before the rest: it runs on our threads, which spin on for a while and yield to no end where
    # a candidate's own take all cores.
    rates = [clock_rate()] if clock_rate else []
    candidate.rest()
    _warm_up(candidate.warm, settings.warmup_ms, most_ms, clock, candidate.clock_mhz)
    samples, waited_ms = [], []
    start = clock()
    stolen_s, others_s = contamination.stolen_s(), contamination.others_s()
    shares = [look()] if look else []
    for _ in range(candidate.samples_per_burst):
        candidate.before()
        waited_s = contamination.waited_s()
        samples.append(candidate.sample())
        waited_ms.append((contamination.waited_s() - waited_s) * 1e3)
        if look:
            shares.append(look())
    throttled = tuple(each.throttled for each in samples if each.throttled is not None)
    burst = Burst(
        number=candidate.number,
        latencies_ms=tuple(sample.latency_ms for sample in samples),
        waited_ms=tuple(waited_ms),
        stolen_ms=(contamination.stolen_s() - stolen_s) * 1e3,
        length_ms=(clock() - start) * 1e3,
        others_ms=(contamination.others_s() - others_s) * 1e3,
        # A probe that vanished midway says nothing of the burst.
        throttled=throttled if len(throttled) == len(samples) else (),
        core_shares=tuple(min(around) for around in pairwise(shares)),
    )
    return replace(burst, clock_rates=(*rates, clock_rate())) if clock_rate else burst


def _finish(bursts: Sequence[Burst], spent_s: float, settings: TimingSettings) -> Timing | None:
    """The stopping rule: the Timing if enough was sampled, else None.

    Beyond ``max_time_s`` up to twice ``rounds_min`` bursts are taken, as long as too few are clean:
    one disturbed burst must not cost a slow kernel its figure. For ``patience`` times that long it
    waits for as many bursts on a core of its own.
    """
    if len(bursts) < settings.rounds_min or spent_s < settings.min_time_s:
        return None
    timing = summarise(bursts, settings, "precision")
    if timing.on_shared_core and spent_s < settings.patience * settings.max_time_s:
        return None
    if timing.latency_ms and timing.latency_low_ms and timing.latency_high_ms:
        width_ms = timing.latency_high_ms - timing.latency_low_ms
        if width_ms / 2 <= settings.precision * timing.latency_ms:
            return timing
    clean_bursts = sum(median is not None for median in timing.bursts_ms)
    enough = clean_bursts >= settings.rounds_min or len(bursts) >= 2 * settings.rounds_min
    if spent_s < settings.max_time_s or not enough:
        return None
    return summarise(bursts, settings, "max_time")

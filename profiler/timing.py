"""Timing: warm-up, samples, contamination and the stopping rule. No files are written.

Candidates of one product are measured interleaved in one process (A B C A B C …), so that
whatever drifts drifts under all of them alike, and their ratio means something even where their
absolute figures move. What the samples then say is worked out in ``profiler.samples``.
"""

from __future__ import annotations

import gc
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from profiler.samples import (
    PRESETS,
    Burst,
    Ratio,
    Timing,
    TimingSettings,
    paired_ratio,
    summarise,
)

__all__ = [
    "NO_CONTAMINATION",
    "PRESETS",
    "Contamination",
    "Ratio",
    "Timing",
    "TimingSettings",
    "cache_flush",
    "host_contamination",
    "measure_cuda",
    "measure_interleaved",
    "paired_ratio",
]

Launch = Callable[[], Any]


@dataclass(frozen=True)
class Contamination:
    """Counters of the time lost to others. Both only grow.

    Attributes:
        waited_s: Time that threads of this process were ready and had no CPU; read per sample.
        stolen_s: Time that the hypervisor gave to other guests; read per burst, since it is
            counted in ticks of 10 ms.
    """

    waited_s: Callable[[], float]
    stolen_s: Callable[[], float]


NO_CONTAMINATION = Contamination(lambda: 0.0, lambda: 0.0)


@dataclass(frozen=True)
class _Candidate:
    """One thing to time: ``sample`` returns ms per launch over ``number`` launches."""

    warm_up: Callable[[], None]
    sample: Callable[[], float]
    number: int
    samples_per_burst: int


def host_contamination() -> Contamination:
    """Counters of this machine.

    An involuntary context switch alone does not say whether 5 µs or 40 ms were lost, and a
    quiet machine makes some 20 a second, so that hardly a sample of 50 ms would be free of one.
    The scheduler's run-queue delay, summed over all threads, says how long it was. Where it
    cannot be read, each involuntary switch counts as 1 ms.

    Source: Linux Documentation/scheduler/sched-stats.rst, /proc/<pid>/schedstat; proc_stat(5).
    """
    delays = Path("/proc/self/schedstat").is_file()
    steal = Path("/proc/stat").is_file()
    return Contamination(
        waited_s=_run_queue_delay_s if delays else _involuntary_switches_ms,
        stolen_s=_steal_s if steal else lambda: 0.0,
    )


def _run_queue_delay_s() -> float:
    delay_ns = 0
    for task in Path("/proc/self/task").iterdir():
        try:
            delay_ns += int((task / "schedstat").read_bytes().split()[1])
        except OSError:  # the thread ended since the listing
            continue
    return delay_ns / 1e9


def _involuntary_switches_ms() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw / 1e3


def _steal_s() -> float:
    with Path("/proc/stat").open() as stat:
        return int(stat.readline().split()[8]) / 100


def measure_interleaved(
    launches: Mapping[str, Launch],
    settings: TimingSettings = PRESETS["standard"],
    clock: Callable[[], float] = time.perf_counter,
    contamination: Contamination | None = None,
    synchronise: Callable[[], Any] = lambda: None,
    flush: Callable[[], Any] | None = None,
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

    Returns:
        A Timing for each name, in the same order.
    """
    return _interleave(
        {
            name: partial(_host_candidate, launch, settings, clock, synchronise, flush)
            for name, launch in launches.items()
        },
        settings,
        clock,
        contamination or host_contamination(),
    )


def cache_flush(last_level_cache_bytes: int) -> Callable[[], Any]:
    """A call that replaces the contents of the caches: writes twice their size, then reads it.

    Args:
        last_level_cache_bytes: As in ``DeviceInfo``.
    """
    buffer = np.zeros(2 * last_level_cache_bytes // 8)

    def flush() -> float:
        np.add(buffer, 1.0, out=buffer)
        return float(buffer.sum())

    return flush


def _host_candidate(
    launch: Launch,
    settings: TimingSettings,
    clock: Callable[[], float],
    synchronise: Callable[[], Any],
    flush: Callable[[], Any] | None,
) -> _Candidate:
    def elapsed_ms(number: int) -> float:
        if flush:
            flush()
        synchronise()
        start = clock()
        for _ in repeat(None, number):
            launch()
        synchronise()
        return (clock() - start) * 1e3

    def warm_up() -> None:
        end = clock() + settings.warmup_ms / 1e3
        while True:
            launch()
            synchronise()
            if clock() >= end:
                return

    def whole_ms() -> float:
        start = clock()
        elapsed_ms(number)
        return (clock() - start) * 1e3

    warm_up()
    number = 1 if flush else _launches_per_sample(elapsed_ms, settings.sample_ms)
    step_ms = min(whole_ms() for _ in range(2))
    return _Candidate(
        warm_up=warm_up,
        sample=lambda: elapsed_ms(number) / number,
        number=number,
        samples_per_burst=max(1, round(settings.burst_ms / step_ms)),
    )


def _launches_per_sample(elapsed_ms: Callable[[int], float], sample_ms: float) -> int:
    """Launches that fill a sample; the shorter of two trials, since either may be disturbed."""
    number = 1
    while (taken_ms := min(elapsed_ms(number) for _ in range(2))) < sample_ms / 2:
        number *= 2
    return max(1, round(number * sample_ms / taken_ms))


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _interleave(
    prepare: Mapping[str, Callable[[], _Candidate]],
    settings: TimingSettings,
    clock: Callable[[], float],
    contamination: Contamination,
) -> dict[str, Timing]:
    """Rounds of bursts until each candidate is precise enough or out of time."""
    finished: dict[str, Timing] = {}
    with _without_garbage_collection():
        candidates = {name: build() for name, build in prepare.items()}
        bursts: dict[str, list[Burst]] = {name: [] for name in candidates}
        spent_s = dict.fromkeys(candidates, 0.0)
        while len(finished) < len(candidates):
            for name, candidate in candidates.items():
                if name in finished:
                    continue
                start = clock()
                bursts[name].append(_take_burst(candidate, contamination))
                spent_s[name] += clock() - start
                if timing := _finish(bursts[name], spent_s[name], settings):
                    finished[name] = timing
    return {name: finished[name] for name in candidates}


def _take_burst(candidate: _Candidate, contamination: Contamination) -> Burst:
    candidate.warm_up()
    latencies_ms, waited_ms = [], []
    stolen_s = contamination.stolen_s()
    for _ in range(candidate.samples_per_burst):
        waited_s = contamination.waited_s()
        latencies_ms.append(candidate.sample())
        waited_ms.append((contamination.waited_s() - waited_s) * 1e3)
    return Burst(
        number=candidate.number,
        latencies_ms=tuple(latencies_ms),
        waited_ms=tuple(waited_ms),
        stolen_ms=(contamination.stolen_s() - stolen_s) * 1e3,
    )


def _finish(bursts: Sequence[Burst], spent_s: float, settings: TimingSettings) -> Timing | None:
    """The stopping rule: the Timing if enough was sampled, else None.

    Beyond ``max_time_s`` up to twice ``rounds_min`` bursts are taken, as long as too few are clean:
    one disturbed burst must not cost a slow kernel its figure.
    """
    if len(bursts) < settings.rounds_min:
        return None
    timing = summarise(bursts, settings, "precision")
    if timing.latency_ms and timing.latency_low_ms and timing.latency_high_ms:
        width_ms = timing.latency_high_ms - timing.latency_low_ms
        if width_ms / 2 <= settings.precision * timing.latency_ms:
            return timing
    clean_bursts = sum(median is not None for median in timing.bursts_ms)
    enough = clean_bursts >= settings.rounds_min or len(bursts) >= 2 * settings.rounds_min
    if spent_s < settings.max_time_s or not enough:
        return None
    return summarise(bursts, settings, "max_time")


def measure_cuda(
    launches: Mapping[str, Launch],
    settings: TimingSettings = PRESETS["standard"],
    cold_bytes: int | None = None,
) -> dict[str, Timing]:
    """The same on a GPU: a CUDA graph of launches, replayed between two events.

    Not yet run on a GPU. Launches must go to torch's current stream and must not synchronise.
    Preemption of the host does not lengthen what events measure, so only the outlier rule drops
    samples; falling clocks are not looked at here.

    Args:
        launches: Candidates by name.
        settings: How long and how precisely.
        cold_bytes: For a cold cache: size of the L2 cache. Twice as much is overwritten before each
            sample, which is then a single launch.

    Source: CUDA C++ Programming Guide, section CUDA Graphs; cudaEventElapsedTime resolves 0.5 µs.
    """
    import torch

    flush = None
    if cold_bytes is not None:
        buffer = torch.empty(2 * cold_bytes, dtype=torch.uint8, device="cuda")
        flush = buffer.zero_
    return _interleave(
        {
            name: partial(_cuda_candidate, launch, settings, flush)
            for name, launch in launches.items()
        },
        settings,
        time.perf_counter,
        NO_CONTAMINATION,
    )


def _cuda_candidate(
    launch: Launch, settings: TimingSettings, flush: Callable[[], Any] | None
) -> _Candidate:
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def elapsed_ms(run: Callable[[], Any]) -> float:
        if flush:
            flush()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def launch_repeatedly(number: int) -> None:
        for _ in repeat(None, number):
            launch()

    launch_repeatedly(3)
    torch.cuda.synchronize()
    number = 1
    if not flush:
        number = _launches_per_sample(
            lambda count: elapsed_ms(lambda: launch_repeatedly(count)), settings.sample_ms
        )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch_repeatedly(number)

    def warm_up() -> None:
        until = time.perf_counter() + settings.warmup_ms / 1e3
        while time.perf_counter() < until:
            graph.replay()
            torch.cuda.synchronize()

    warm_up()
    return _Candidate(
        warm_up=warm_up,
        sample=lambda: elapsed_ms(graph.replay) / number,
        number=number,
        samples_per_burst=max(1, round(settings.burst_ms / elapsed_ms(graph.replay))),
    )

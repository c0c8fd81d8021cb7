"""The clock of a GPU: CUDA graphs of launches between two events on torch's current stream.

Not yet run on a GPU; the tests run it against a simulated stream and probe.

An event resolves 0.5 µs, so a sample is a graph of as many launches as fill it, and a kernel too
short for that resolution is never timed singly. Each sample waits in the stream behind a lead (the
same graph, or the cache flush), so that the GPU has no gap between the first event and the first
kernel while the host is still enqueueing. Preemption of the host lengthens nothing that events
measure; what disturbs a GPU is its clock.

Source: CUDA C++ Programming Guide, section CUDA Graphs; cudaEventElapsedTime resolves 0.5 µs. The
rules on the clock (75 %, 50 ms to recover) are nvbench's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import repeat
from typing import Protocol

from profiler.contamination import NO_CONTAMINATION
from profiler.measurement import reason_of
from profiler.nvml import CHOSEN_CLOCKS, Probe, Unavailable, open_probe
from profiler.samples import PRESETS, StopReason, Timing, TimingSettings
from profiler.timing import (
    Candidate,
    Facts,
    Launch,
    Sample,
    first_warm_up,
    interleave,
    without_garbage_collection,
)

EVENT_RESOLUTION_MS = 0.5e-3
# Below these lengths the resolution is more than 5 % of a single launch, 0.1 % of a sample.
SHORTEST_SINGLE_MS = 20 * EVENT_RESOLUTION_MS
SHORTEST_SAMPLE_MS = 1000 * EVENT_RESOLUTION_MS

LEAST_CLOCK_SHARE = 0.75
RECOVERY_S = 0.05

# Launches to average over: few enough for the driver's queue not to be full, and to last no
# longer than this where that leaves some.
_MOST_ENQUEUED, _FEWEST_ENQUEUED, _ENQUEUED_MS = 100, 4, 20.0
_LARGEST_GRAPH = 2**14


class Stream(Protocol):
    """What the clock needs of a GPU; ``TorchStream``, or a simulated one in the tests."""

    def capture(self, launch: Launch, number: int) -> Launch:
        """A CUDA graph of that many launches, to be replayed."""

    def elapsed_ms(self, lead: Launch, run: Launch, meanwhile: Callable[[], None]) -> float:
        """Enqueues ``lead``, an event, ``run`` and an event; calls ``meanwhile``; then waits.

        Returns:
            Time between the two events.
        """

    def synchronise(self) -> None:
        """Waits until all that was enqueued has run."""

    def eraser(self, size_bytes: int) -> Launch:
        """A launch that overwrites that much device memory of its own."""


class TorchStream:
    """Torch's current stream on its current device."""

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda
        self._empty = partial(torch.empty, dtype=torch.uint8, device="cuda")
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def capture(self, launch: Launch, number: int) -> Launch:
        """A CUDA graph of that many launches."""
        graph = self._cuda.CUDAGraph()
        with self._cuda.graph(graph):
            for _ in repeat(None, number):
                launch()
        return graph.replay

    def elapsed_ms(self, lead: Launch, run: Launch, meanwhile: Callable[[], None]) -> float:
        """Time between the events before and after ``run``."""
        lead()
        self._start.record()
        run()
        self._end.record()
        meanwhile()
        self._end.synchronize()
        return self._start.elapsed_time(self._end)

    def synchronise(self) -> None:
        """Waits for the current stream."""
        self._cuda.current_stream().synchronize()

    def eraser(self, size_bytes: int) -> Launch:
        """Zeroes a buffer."""
        return self._empty(size_bytes).zero_


def measure_cuda(
    launches: Mapping[str, Launch],
    settings: TimingSettings = PRESETS["standard"],
    cold_bytes: int | None = None,
    probe: Probe | None = None,
    stream: Stream | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Timing]:
    """Times candidates against each other on a GPU, as ``measure_interleaved`` does on a CPU.

    Launches must go to torch's current stream and must not synchronise. ``Timing.details`` adds
    ``launch_overhead_ms`` (host time to enqueue one launch without a graph; not part of the
    latency), ``sm_clock_mhz`` (median over the samples), ``throttle_reasons`` and
    ``samples_throttled``.

    Args:
        launches: Candidates by name.
        settings: How long and how precisely.
        cold_bytes: For a cold cache: size of the L2 cache. Twice as much is overwritten before each
            sample, which is then a single launch; a kernel too short for that has no figure.
        probe: Reads the clock; that of torch's current device by default.
        stream: Where to measure; torch's current stream by default.
        clock: Host time in s.
        sleep: Waits that many s.
    """
    stream = stream or TorchStream()
    probe = probe or _probe_of_current_device()
    flush = None if cold_bytes is None else stream.eraser(2 * cold_bytes)
    with without_garbage_collection():
        prepared = {
            name: _or_reason(
                partial(_candidate, launch, settings, flush, Governor(probe, sleep), stream, clock)
            )
            for name, launch in launches.items()
        }
        candidates = {name: it for name, it in prepared.items() if isinstance(it, Candidate)}
        timed = interleave(candidates, settings, clock, NO_CONTAMINATION)
    return {name: timed[name] if isinstance(it, Candidate) else it for name, it in prepared.items()}


def _probe_of_current_device() -> Probe | None:
    import torch

    try:
        return open_probe(str(torch.cuda.get_device_properties().uuid))
    except Unavailable:
        return None


class Governor:
    """Watches a GPU's clock while samples run, and waits where it fell."""

    def __init__(self, probe: Probe | None, sleep: Callable[[float], None]) -> None:
        self._probe = probe
        self._sleep = sleep
        self._clocks_mhz: list[float] = []
        self._reasons: set[str] = set()
        self._is_held_down = False
        try:
            self._full_mhz = probe.full_sm_clock_mhz() if probe else 0.0
        except Unavailable:
            self._probe = None

    def clock_mhz(self) -> float | None:
        """Present clock; None from the first time on that it cannot be read."""
        try:
            return self._probe.sm_clock_mhz() if self._probe else None
        except Unavailable:
            self._probe = None
            return None

    def look(self) -> None:
        """Notes clock and throttle reasons, while the GPU is at work."""
        mhz = self.clock_mhz()
        if mhz is None or self._probe is None:
            return
        self._clocks_mhz.append(mhz)
        is_low = mhz < LEAST_CLOCK_SHARE * self._full_mhz
        try:
            reasons = set(self._probe.throttle_reasons())
        except Unavailable:
            self._is_held_down = is_low
        else:
            self._reasons |= reasons
            self._is_held_down = is_low and bool(reasons - CHOSEN_CLOCKS)

    def throttled(self) -> bool | None:
        """Whether something held the clock too low at the last look; if so, lets the GPU recover.

        A clock that was locked is at its best however low: nothing but a choice holds it there.
        Where the reasons cannot be read, the clock alone decides.
        """
        if self._probe is None:
            return None
        if self._is_held_down:
            self._sleep(RECOVERY_S)
        return self._is_held_down

    def facts(self) -> Facts:
        """Median clock and all throttle reasons that were seen; None where nothing was."""
        if not self._clocks_mhz:
            return {"sm_clock_mhz": None, "throttle_reasons": None}
        return {
            "sm_clock_mhz": statistics.median(self._clocks_mhz),
            "throttle_reasons": ", ".join(sorted(self._reasons)),
        }


def _or_reason(prepare: Callable[[], Candidate | Timing]) -> Candidate | Timing:
    """A graph may not be captured, or find no memory: that is one candidate's affair alone."""
    try:
        return prepare()
    except Exception as error:
        return _without_figure("failed", f"clock: {reason_of(error)}")


def _without_figure(stop_reason: StopReason, reason: str, facts: Facts | None = None) -> Timing:
    return Timing(
        latency_ms=None,
        samples_kept=0,
        samples_discarded=0,
        stop_reason=stop_reason,
        reason=reason,
        details=facts or {},
    )


def _candidate(
    launch: Launch,
    settings: TimingSettings,
    flush: Launch | None,
    governor: Governor,
    stream: Stream,
    clock: Callable[[], float],
) -> Candidate | Timing:
    """A candidate, or the Timing that says why it cannot be one."""
    overhead_ms = _enqueue_ms(launch, stream, clock)
    hot, hot_number = filling_graph(launch, max(settings.sample_ms, SHORTEST_SAMPLE_MS), stream)

    def warm() -> float:
        return stream.elapsed_ms(_nothing, hot, _nothing) / hot_number

    def sample() -> Sample:
        elapsed_ms = stream.elapsed_ms(flush or hot, run, governor.look)
        return Sample(elapsed_ms / number, governor.throttled())

    plateaued = first_warm_up(warm, settings, clock, governor.clock_mhz)
    hot_ms = stream.elapsed_ms(hot, hot, _nothing) / hot_number
    facts: Facts = {"launch_overhead_ms": overhead_ms, "plateaued": plateaued}
    if flush and hot_ms < SHORTEST_SINGLE_MS:
        return _without_figure(
            "too short",
            f"too short to be timed singly: {hot_ms * 1e3:.1f} µs hot, "
            f"and an event resolves {EVENT_RESOLUTION_MS * 1e3} µs",
            facts,
        )
    number = 1 if flush else hot_number
    run = stream.capture(launch, 1) if flush else hot
    start = clock()
    stream.elapsed_ms(flush or hot, run, _nothing)
    step_ms = (clock() - start) * 1e3
    return Candidate(
        warm=warm,
        sample=sample,
        number=number,
        samples_per_burst=max(1, round(settings.burst_ms / step_ms)),
        facts=lambda: {**facts, **governor.facts()},
        clock_mhz=governor.clock_mhz,
    )


def _nothing() -> None:
    pass


def _enqueue_ms(launch: Launch, stream: Stream, clock: Callable[[], float]) -> float:
    """Host time to enqueue one launch: the least of five trials, since the host is preempted."""

    def enqueue_ms(number: int) -> float:
        stream.synchronise()
        start = clock()
        for _ in repeat(None, number):
            launch()
        return (clock() - start) * 1e3 / number

    launch()  # what is done once is no overhead
    stream.synchronise()
    start = clock()
    launch()
    stream.synchronise()
    whole_ms = (clock() - start) * 1e3
    number = round(min(max(_ENQUEUED_MS / whole_ms, _FEWEST_ENQUEUED), _MOST_ENQUEUED))
    least_ms = min(enqueue_ms(number) for _ in range(5))
    stream.synchronise()
    return least_ms


def filling_graph(launch: Launch, sample_ms: float, stream: Stream) -> tuple[Launch, int]:
    """A graph that takes about ``sample_ms``, and how many launches it holds."""
    number = 1
    while True:
        graph = stream.capture(launch, number)
        taken_ms = min(stream.elapsed_ms(graph, graph, _nothing) for _ in range(2))
        if taken_ms >= sample_ms / 2 or number >= _LARGEST_GRAPH:
            break
        number *= 2
    fitting = min(max(1, round(number * sample_ms / taken_ms)), _LARGEST_GRAPH)
    return (graph, number) if fitting == number else (stream.capture(launch, fitting), fitting)

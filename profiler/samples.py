"""What samples of a latency say: plateau, contamination, median, intervals.

Pure functions, no clock.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr

# Name in ``Timing.details`` of the CPU's clock; see ``profiler.clock``.
CLOCK_RATE = "clock_gmacs_per_s"

StopReason = Literal["precision", "max_time", "contended", "too short", "failed"]

_STATUS_WITHOUT_FIGURE = {"too short": "skipped", "failed": "failed"}

# The fewest independent values whose median has a 95 % order-statistic interval: 1 - 2^(1-6).
FEWEST_BURSTS = 6
OUTLIER_FACTOR = 3.0
OUTLIER_FLOOR_MS = 0.02
# Beyond these even the samples that lost no time shared cores, caches and memory with others.
LARGEST_WAITING_SHARE = 0.2
LARGEST_OTHERS_SHARE = 0.6
# Of a core, below which a neighbour works on it too: that takes a third to a half of its speed. Its
# clock, which changes by a sixth at most, takes less.
LEAST_CORE_SHARE = 0.8

_PLATEAU_WINDOW = 5
_PLATEAU_TOLERANCE = 0.01


@dataclass(frozen=True, kw_only=True)
class TimingSettings:
    """How long and how precisely to measure.

    Attributes:
        sample_ms: Target length of one sample: as many launches back to back as fill it.
        rest_ms: Idle time before each warm-up. Workers of the candidate before it go on spinning
            for some milliseconds, and on a busy CPU, where each turn of theirs waits for one of
            the next candidate's, for far longer: they go to sleep only while nothing runs.
        warmup_ms: Least length of the warm-up before each burst. It goes on until the samples
            have plateaued.
        warmup_max_ms: Most that the first warm-up of a candidate takes to reach a plateau, and a
            tenth of it the least; that tenth is the most of those before the bursts.
        burst_ms: Target length of one burst of samples; at least one sample.
        rounds_min: Bursts of each candidate before it may stop, at least 6.
        precision: Half-width of the 95 % interval, relative to the median, that suffices.
        min_time_s: Time for one candidate at least, warm-ups included.
        max_time_s: Time for one candidate at most. The least number of bursts is taken in any
            case: fewer give no interval.
        patience: Times ``max_time_s`` to wait for bursts on a core that no neighbour works on; 0
            where candidates are only ranked, which a shared core slows all alike.
        disturbed_share: Part of a sample's length that may be lost to other processes.

    Raises:
        ValueError: On a setting that cannot be.
    """

    sample_ms: float = 1.0
    rest_ms: float = 8.0
    warmup_ms: float = 5.0
    warmup_max_ms: float = 500.0
    burst_ms: float = 30.0
    rounds_min: int = 10
    precision: float = 0.02
    min_time_s: float = 0.0
    max_time_s: float = 3.0
    patience: float = 2.0
    disturbed_share: float = 0.02

    def __post_init__(self) -> None:
        if self.rounds_min < FEWEST_BURSTS:
            raise ValueError(
                f"rounds_min: a 95 % interval needs at least {FEWEST_BURSTS}, got {self.rounds_min}"
            )
        for name in ("sample_ms", "burst_ms", "precision", "max_time_s", "disturbed_share"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: must be above 0, got {getattr(self, name)}")
        for name in ("rest_ms", "warmup_ms", "min_time_s", "patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: must not be negative, got {getattr(self, name)}")
        for least, most in (("warmup_ms", "warmup_max_ms"), ("min_time_s", "max_time_s")):
            if getattr(self, least) > getattr(self, most):
                raise ValueError(f"{least}: must not exceed {most}")


PRESETS: dict[str, TimingSettings] = {
    "quick": TimingSettings(
        sample_ms=0.5,
        rest_ms=6.0,
        warmup_ms=3.0,
        warmup_max_ms=200.0,
        burst_ms=15.0,
        max_time_s=0.6,
    ),
    "standard": TimingSettings(min_time_s=0.3),
    "precise": TimingSettings(rounds_min=20, precision=0.005, min_time_s=2.0, max_time_s=20.0),
}


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What was measured of one candidate. Its figures are named as in ``Measurement``.

    Attributes:
        latency_ms: Median of the kept samples, per launch; None when contended, too short, or if it
            cannot be timed.
        latency_low_ms, latency_high_ms: 95 % confidence interval of that median.
        latency_p10_ms, latency_p90_ms: Percentiles of the kept samples.
        samples_kept, samples_discarded: Clean and contaminated samples.
        stop_reason: Why sampling stopped, or that the figure was given up.
        reason: Why there is no latency.
        bursts_ms: Median of each burst in order, None where no sample was clean.
        rounds_ms: The same with samples on a shared core: for ratios of candidates that took turns.
            Not a column.
        samples_ms: The kept samples in the order in which they were taken, per launch; empty when
            contended.
        details: Further facts: ``launches_per_sample``; ``plateaued``, whether the first warm-up
            ended so; ``waiting_share`` of the sampling time; ``others_share``, CPU time of other
            processes over that of all CPUs; where somebody looked, ``own_core``, whether the
            figures are of samples that no neighbour shared the core with, and ``own_core_share`` of
            them among all; the CPU's mean clock; what a GPU's clock adds; and of how many passes
            the figures are (``profiler.passes``). Not a column.
        on_shared_core: Whether there were too few samples without such a neighbour.
    """

    latency_ms: float | None
    latency_low_ms: float | None = None
    latency_high_ms: float | None = None
    latency_p10_ms: float | None = None
    latency_p90_ms: float | None = None
    samples_kept: int
    samples_discarded: int
    stop_reason: StopReason
    reason: str | None = None
    bursts_ms: tuple[float | None, ...] = ()
    rounds_ms: tuple[float | None, ...] = ()
    samples_ms: tuple[float, ...] = ()
    details: Mapping[str, str | float | int | bool | None] = field(default_factory=dict)

    @property
    def on_shared_core(self) -> bool:
        """False where nobody looked; see ``profiler.shared_core``."""
        return self.details.get("own_core") is False

    @property
    def columns(self) -> dict[str, Any]:
        """The fields that ``Measurement`` shares, raw samples and ``status`` included."""
        own = ("details", "rounds_ms")
        shared = {name: value for name, value in vars(self).items() if name not in own}
        missing = _STATUS_WITHOUT_FIGURE.get(self.stop_reason, "contended")
        return shared | {"status": missing if self.latency_ms is None else "ok"}


@dataclass(frozen=True)
class Burst:
    """Samples taken back to back.

    Attributes:
        number: Launches in one sample.
        latencies_ms: Per launch, ``(samples,)``.
        waited_ms: Lost waiting for a CPU during each sample, ``(samples,)``.
        stolen_ms: Stolen by the hypervisor during the burst.
        length_ms: Of the whole burst, with what lies between the samples.
        others_ms: CPU time of other processes during the burst, divided by the number of CPUs.
        throttled: Whether the device's clock was too low during each sample, ``(samples,)``;
            empty for a device that does not tell.
        core_shares: The lower of the core's shares before and after each sample, ``(samples,)``;
            empty where nobody looked.
        clock_rates: Of the CPU before the rest and after the samples; empty where nobody looked.
    """

    number: int
    latencies_ms: tuple[float, ...]
    waited_ms: tuple[float, ...]
    stolen_ms: float
    length_ms: float = math.inf
    others_ms: float = 0.0
    throttled: tuple[bool, ...] = ()
    core_shares: tuple[float, ...] = ()
    clock_rates: tuple[float, ...] = ()

    @property
    def durations_ms(self) -> np.ndarray:
        """Length of each sample, ``(samples,)``."""
        return np.array(self.latencies_ms) * self.number


def has_plateaued(values: Sequence[float]) -> bool:
    """Whether samples taken one after the other, or a clock's readings, no longer drift.

    The medians of the last third and of the third before differ by less than 1 %, or by less than
    those values scatter around them. The windows grow with what was taken, since a slow ramp looks
    flat through a short one. A launch's samples hold its device's clock: where this one still
    rises, those still fall.
    """
    window = len(values) // 3
    if window < _PLATEAU_WINDOW:
        return False
    before, recent = np.reshape(values[-2 * window :], (2, window))
    centres = np.median(before), np.median(recent)
    scatter = np.median(np.abs(np.concatenate([before - centres[0], recent - centres[1]])))
    allowed = max(_PLATEAU_TOLERANCE * centres[1], scatter)
    return bool(abs(centres[1] - centres[0]) <= allowed)


def median_interval(values: npt.ArrayLike) -> tuple[float, float]:
    """95 % confidence interval of the median by order statistics, free of any distribution.

    With fewer than 6 values it is their range, which covers the median with probability
    1 - 2^(1-n): 93.75 % for 5.

    Raises:
        ValueError: If there are no values.

    Source: David and Nagaraja, Order Statistics, 3rd edition, section 7.1.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    if not ordered.size:
        raise ValueError("the median of no values has no interval")
    below = bdtr(np.arange(len(ordered) // 2 + 1), len(ordered), 0.5)
    rank = max(int(np.searchsorted(below, 0.025)), 1)
    return float(ordered[rank - 1]), float(ordered[-rank])


def _calm(burst: Burst, disturbed_share: float) -> npt.NDArray[np.bool_]:
    """Which samples of a burst lost no time to others, ``(samples,)``."""
    durations = burst.durations_ms
    calm: npt.NDArray[np.bool_] = np.array(burst.waited_ms) <= disturbed_share * durations
    if burst.throttled:
        calm &= ~np.array(burst.throttled)
    if burst.stolen_ms > disturbed_share * durations.sum():
        calm[:] = False
    return calm


def _on_own_core(burst: Burst) -> npt.NDArray[np.bool_]:
    """During which samples of a burst no neighbour worked on the same core, ``(samples,)``."""
    shares = np.array(burst.core_shares or [1.0] * len(burst.latencies_ms))
    own: npt.NDArray[np.bool_] = shares >= LEAST_CORE_SHARE
    return own


def _kept_samples(
    bursts: Sequence[Burst], masks: Sequence[npt.NDArray[np.bool_]]
) -> list[np.ndarray]:
    """The latencies of each burst, ``(samples kept,)``: those of the masks without outliers."""
    chosen = [np.array(burst.latencies_ms)[mask] for burst, mask in zip(bursts, masks)]
    every = np.concatenate(chosen)
    centre = np.median(every) if every.size else math.nan
    return [
        latencies[
            (latencies <= OUTLIER_FACTOR * centre)
            | ((latencies - centre) * burst.number <= OUTLIER_FLOOR_MS)
        ]
        for latencies, burst in zip(chosen, bursts)
    ]


def _medians(kept: Sequence[np.ndarray]) -> tuple[float | None, ...]:
    return tuple(float(np.median(burst)) if burst.size else None for burst in kept)


def summarise(
    bursts: Sequence[Burst], settings: TimingSettings, stop_reason: StopReason = "max_time"
) -> Timing:
    """Median, interval and counts of one candidate's bursts.

    A sample is dropped when more than ``disturbed_share`` of it was lost to other processes, or
    when it ran at too low a clock; a burst when so much was stolen; and so is a sample above 3 ×
    the median (and 20 µs): a spin barrier whose partner was held up. There is no figure
    ("contended") when fewer than half of the samples or fewer than ``rounds_min`` bursts are
    clean, when more than a fifth of the sampling time went in waiting, or when other processes
    had more than 60 % of all CPUs: then even the clean samples shared cores, caches and memory.

    Samples during which a neighbour of a virtual machine worked on the same core are left out where
    ``rounds_min`` bursts have others; else there are figures all the same, and ``own_core`` says
    that they may be of a slower core.

    Raises:
        ValueError: If there are no bursts.
    """
    if not bursts:
        raise ValueError("no bursts to summarise")
    calm = [_calm(burst, settings.disturbed_share) for burst in bursts]
    own = [mask & _on_own_core(burst) for burst, mask in zip(bursts, calm)]
    kept = np.concatenate(everything := _kept_samples(bursts, calm))
    rounds_ms = medians = _medians(everything)
    known = [median for median in medians if median is not None]
    taken = sum(len(burst.latencies_ms) for burst in bursts)
    sampling_ms = sum(burst.durations_ms.sum() for burst in bursts)
    throttled = sum(sum(burst.throttled) for burst in bursts)
    waiting = float(sum(sum(burst.waited_ms) for burst in bursts) / sampling_ms)
    others = sum(burst.others_ms for burst in bursts) / sum(burst.length_ms for burst in bursts)
    details: dict[str, str | float | int | bool | None] = {
        "launches_per_sample": bursts[0].number,
        "waiting_share": round(waiting, 4),
        "others_share": round(max(others, 0.0), 3),
    }
    has_own_core = bool(sum(mask.any() for mask in own) >= settings.rounds_min)
    if any(burst.core_shares for burst in bursts):
        own_samples = sum(int(_on_own_core(burst).sum()) for burst in bursts)
        details |= {"own_core": has_own_core, "own_core_share": round(own_samples / taken, 3)}
    if any(len(burst.throttled) for burst in bursts):
        details["samples_throttled"] = throttled
    if rates := [rate for burst in bursts for rate in burst.clock_rates]:
        # It changes within milliseconds: a single reading says little of a whole measurement.
        details[CLOCK_RATE] = round(fmean(rates), 3)
    reason = None
    if 2 * kept.size < taken or len(known) < settings.rounds_min:
        reason = f"contended: {kept.size} of {taken} samples clean, in {len(known)} bursts"
        reason += f"; {throttled} at too low a clock" if throttled else ""
    elif waiting > LARGEST_WAITING_SHARE:
        reason = f"contended: {waiting:.0%} of the sampling time spent waiting for a CPU"
    elif others > LARGEST_OTHERS_SHARE:
        reason = f"contended: other processes took {others:.0%} of all CPUs"
    if reason:
        return Timing(
            latency_ms=None,
            samples_kept=kept.size,
            samples_discarded=taken - kept.size,
            stop_reason="contended",
            reason=reason,
            bursts_ms=medians,
            rounds_ms=rounds_ms,
            details=details,
        )
    if has_own_core:
        kept = np.concatenate(undisturbed := _kept_samples(bursts, own))
        medians = _medians(undisturbed)
    return timing_of(
        kept,
        medians,
        samples_discarded=taken - kept.size,
        stop_reason=stop_reason,
        rounds_ms=rounds_ms,
        details=details,
    )


def timing_of(kept: np.ndarray, bursts_ms: tuple[float | None, ...], **facts: Any) -> Timing:
    """Median, percentiles and interval of the samples that were kept.

    The interval is the wider of two order-statistic intervals: over the samples, and over the
    bursts' medians. Samples of one burst share clocks, cache contents and placement, so the first
    alone is far too narrow; bursts lie a round apart and count as independent. Stopping as soon
    as the interval is narrow makes its coverage somewhat less than 95 %; ``rounds_min`` bounds
    that.

    Args:
        kept: Per launch, ``(samples,)``.
        bursts_ms: Their medians by burst, None where none was kept.
        facts: The other fields of the Timing.
    """
    known = [median for median in bursts_ms if median is not None]
    low, high = zip(median_interval(kept), median_interval(known))
    p10, median, p90 = (float(value) for value in np.percentile(kept, (10, 50, 90)))
    return Timing(
        latency_ms=median,
        latency_low_ms=min(low),
        latency_high_ms=max(high),
        latency_p10_ms=p10,
        latency_p90_ms=p90,
        samples_kept=kept.size,
        samples_ms=tuple(kept.tolist()),
        bursts_ms=bursts_ms,
        **facts,
    )

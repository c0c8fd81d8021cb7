"""What samples of a latency say: contamination, median, intervals. Pure functions, no clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr

StopReason = Literal["precision", "max_time", "contended"]

# The fewest independent values whose median has a 95 % order-statistic interval: 1 - 2^(1-6).
FEWEST_BURSTS = 6
OUTLIER_FACTOR = 3.0
OUTLIER_FLOOR_MS = 0.02
LARGEST_WAITING_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class TimingSettings:
    """How long and how precisely to measure.

    Attributes:
        sample_ms: Target length of one sample: as many launches back to back as fill it.
        warmup_ms: Launches before each burst, until the spinning threads of the candidate before
            have gone to sleep and caches and clocks have settled.
        burst_ms: Target length of one burst of samples; at least one sample.
        rounds_min: Bursts of each candidate before it may stop, at least 6.
        precision: Half-width of the 95 % interval, relative to the median, that suffices.
        max_time_s: Time for one candidate, warm-ups included. The least number of bursts is
            taken in any case: fewer give no interval.
        disturbed_share: Part of a sample's length that may be lost to other processes.

    Raises:
        ValueError: On a setting that cannot be.
    """

    sample_ms: float = 1.0
    warmup_ms: float = 10.0
    burst_ms: float = 10.0
    rounds_min: int = 8
    precision: float = 0.02
    max_time_s: float = 3.0
    disturbed_share: float = 0.02

    def __post_init__(self) -> None:
        if self.rounds_min < FEWEST_BURSTS:
            raise ValueError(
                f"rounds_min: a 95 % interval needs at least {FEWEST_BURSTS}, got {self.rounds_min}"
            )
        for name in ("sample_ms", "burst_ms", "precision", "max_time_s", "disturbed_share"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: must be above 0, got {getattr(self, name)}")
        if self.warmup_ms < 0:
            raise ValueError(f"warmup_ms: must not be negative, got {self.warmup_ms}")


PRESETS: dict[str, TimingSettings] = {
    "quick": TimingSettings(sample_ms=0.5, rounds_min=6, precision=0.03, max_time_s=0.6),
    "standard": TimingSettings(),
    "precise": TimingSettings(rounds_min=20, precision=0.005, max_time_s=20.0),
}


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What was measured of one candidate. Its figures are named as in ``Measurement``.

    Attributes:
        latency_ms: Median of the kept samples, per launch; None when contended.
        latency_low_ms, latency_high_ms: 95 % confidence interval of that median.
        latency_p10_ms, latency_p90_ms: Percentiles of the kept samples.
        samples_kept, samples_discarded: Clean and contaminated samples.
        stop_reason: Why sampling stopped, or that the figure was given up.
        reason: Why there is no latency.
        bursts_ms: Median of each burst in order, None where no sample was clean.
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

    @property
    def columns(self) -> dict[str, Any]:
        """The fields that ``Measurement`` shares, ``status`` included."""
        shared = {name: value for name, value in vars(self).items() if name != "bursts_ms"}
        return shared | {"status": "ok" if self.latency_ms is not None else "contended"}


@dataclass(frozen=True)
class Ratio:
    """A ratio of two latencies measured in one run, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Burst:
    """Samples taken back to back.

    Attributes:
        number: Launches in one sample.
        latencies_ms: Per launch, ``(samples,)``.
        waited_ms: Lost waiting for a CPU during each sample, ``(samples,)``.
        stolen_ms: Stolen by the hypervisor during the burst.
    """

    number: int
    latencies_ms: tuple[float, ...]
    waited_ms: tuple[float, ...]
    stolen_ms: float


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
        for above, below in zip(numerator.bursts_ms, denominator.bursts_ms, strict=False)
        if above is not None and below is not None
    ]
    if len(ratios) < FEWEST_BURSTS:
        return None
    return Ratio(float(np.median(ratios)), *median_interval(ratios))


def _clean_samples(bursts: Sequence[Burst], disturbed_share: float) -> list[np.ndarray]:
    """The latencies of each burst that nothing disturbed, ``(clean samples,)`` each."""
    undisturbed = []
    for burst in bursts:
        latencies = np.array(burst.latencies_ms)
        durations = latencies * burst.number
        calm = np.array(burst.waited_ms) <= disturbed_share * durations
        if burst.stolen_ms > disturbed_share * durations.sum():
            calm[:] = False
        undisturbed.append((latencies[calm], burst.number))
    every = np.concatenate([latencies for latencies, _ in undisturbed])
    centre = np.median(every) if every.size else math.nan
    return [
        latencies[
            (latencies <= OUTLIER_FACTOR * centre)
            | ((latencies - centre) * number <= OUTLIER_FLOOR_MS)
        ]
        for latencies, number in undisturbed
    ]


def summarise(
    bursts: Sequence[Burst], settings: TimingSettings, stop_reason: StopReason = "max_time"
) -> Timing:
    """Median, interval and counts of one candidate's bursts.

    A sample is dropped when more than ``disturbed_share`` of it was lost to other processes; a
    burst likewise by steal; and so is a sample above 3 × the median (and 20 µs): a spin barrier
    whose partner was held up. There is no figure ("contended") when fewer than half of the
    samples or fewer than ``rounds_min`` bursts are clean, or when more of the
    sampling time went in waiting than in running: then even the clean samples shared cores and
    caches with others.

    The interval is the wider of two order-statistic intervals: over the samples, and over the
    bursts' medians. Samples of one burst share clocks, cache contents and placement, so the first
    alone is far too narrow; bursts lie a round apart and count as independent. Stopping as soon
    as the interval is narrow makes its coverage somewhat less than 95 %; ``rounds_min`` bounds
    that.

    Raises:
        ValueError: If there are no bursts.
    """
    if not bursts:
        raise ValueError("no bursts to summarise")
    clean = _clean_samples(bursts, settings.disturbed_share)
    kept = np.concatenate(clean)
    taken = sum(len(burst.latencies_ms) for burst in bursts)
    medians = [float(np.median(burst)) if burst.size else None for burst in clean]
    known = [median for median in medians if median is not None]
    sampling_ms = sum(sum(burst.latencies_ms) * burst.number for burst in bursts)
    waiting = sum(sum(burst.waited_ms) for burst in bursts) / sampling_ms
    reason = None
    if 2 * kept.size < taken or len(known) < settings.rounds_min:
        reason = f"contended: {kept.size} of {taken} samples clean, in {len(known)} bursts"
    elif waiting > LARGEST_WAITING_SHARE:
        reason = f"contended: {waiting:.0%} of the sampling time spent waiting for a CPU"
    if reason:
        return Timing(
            latency_ms=None,
            samples_kept=kept.size,
            samples_discarded=taken - kept.size,
            stop_reason="contended",
            reason=reason,
            bursts_ms=tuple(medians),
        )
    low, high = zip(median_interval(kept), median_interval(known))
    p10, median, p90 = (float(value) for value in np.percentile(kept, (10, 50, 90)))
    return Timing(
        latency_ms=median,
        latency_low_ms=min(low),
        latency_high_ms=max(high),
        latency_p10_ms=p10,
        latency_p90_ms=p90,
        samples_kept=kept.size,
        samples_discarded=taken - kept.size,
        stop_reason=stop_reason,
        bursts_ms=tuple(medians),
    )

"""Which implementation of each product is faster, and how sure that is: pure functions on rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Literal

import pandas as pd

from profiler.device import DeviceInfo
from profiler.interleaved import schedule_of, speed_over, speed_over_baseline
from profiler.store import Measurement
from reports.formats import WithInterval

Outcome = Literal["pays", "does not pay", "undecided"]
# A byte a weight, as shift_int8: what CPUs without VNNI multiply slower in 8 bits than in 7.
WHOLE_MULT_FORMS = ("mult_int8", "mult_int7")


@dataclass(frozen=True)
class Ratio:
    """How many times faster.

    Attributes:
        low, high: An interval; None where an end is unknown.
        floor: Noise floor: a relative difference below it is none.
    """

    value: float
    low: float | None
    high: float | None
    floor: float = 0.0

    @property
    def outcome(self) -> Outcome:
        """Whether the whole interval lies above or below 1, and the value beyond the noise."""
        if self.is_noise:
            return "undecided"
        if self.low is not None and self.low > 1:
            return "pays"
        if self.high is not None and self.high < 1:
            return "does not pay"
        return "undecided"

    @property
    def is_noise(self) -> bool:
        """Whether a kernel against itself may look as different."""
        return max(self.value, 1 / self.value) - 1 < self.floor


@dataclass(frozen=True)
class Latency:
    """A latency in ms with its interval."""

    value: float
    low: float | None
    high: float | None


def latency(row: Measurement) -> Latency:
    """The latency of a row that has one.

    Raises:
        ValueError: If the row has no figure.
    """
    if row.latency_ms is None:
        raise ValueError(f"{row.subject}: {row.lowering} has no latency ({row.reason})")
    return Latency(row.latency_ms, row.latency_low_ms, row.latency_high_ms)


def speed_ratio(baseline: WithInterval, ours: WithInterval) -> Ratio:
    """Baseline ÷ ours: above 1 ours is faster.

    The interval is conservative: the low end sets the baseline's low end against our high end.
    """
    low = baseline.low / ours.high if baseline.low is not None and ours.high else None
    high = baseline.high / ours.low if baseline.high is not None and ours.low else None
    return Ratio(baseline.value / ours.value, low, high)


def speed_over_rival(ours: Measurement, rival: Measurement) -> Ratio:
    """How many times as fast as a rival a row of ours is.

    By rounds that both were in, where the sweep noted those: what slowed both cancels. Else by
    their latencies, which may be of different minutes.
    """
    paired = None
    if ours.run == rival.run and ours.cache == rival.cache:
        if rival.is_baseline:
            paired = speed_over_baseline(ours, rival.lowering)
        elif schedule_of(ours.lowering) == schedule_of(rival.lowering):
            paired = speed_over(ours, form_of(rival).removeprefix("mult_"))
    found = paired or speed_ratio(latency(rival), latency(ours))
    return Ratio(found.value, found.low, found.high, ours.noise_floor or 0.0)


def _fastest(rows: Iterable[Measurement]) -> Measurement | None:
    return min(rows, key=lambda row: latency(row).value, default=None)


def form_of(row: Measurement) -> str:
    """Name of the form of a row's workload; empty for layers and models."""
    return row.workload.form if row.workload else ""


@dataclass(frozen=True)
class OwnMult:
    """Our shift kernel against our own multiplication; ``ratio`` above 1: shift is faster."""

    shift: Measurement
    mult: Measurement
    ratio: Ratio

    @property
    def same_schedule(self) -> bool:
        """Whether both were built with the same schedule: then only the shift differs."""
        return schedule_of(self.shift.lowering) == schedule_of(self.mult.lowering)


@dataclass(frozen=True)
class Comparison:
    """All implementations of one product on one device in one cache state.

    Attributes:
        product: ``Workload.product``: what the implementations have in common.
        rows: Every row of it, with or without a figure.
    """

    device: DeviceInfo
    cache: str
    product: str
    rows: tuple[Measurement, ...]

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates of the dense product."""
        return self.rows[0].workload.macs if self.rows[0].workload else 0

    @property
    def is_attention(self) -> bool:
        """Whether add kernels stand against multiplications here, or shift kernels."""
        return self.rows[0].workload is not None and self.rows[0].workload.kind != "linear"

    @cached_property
    def ours(self) -> tuple[Measurement, ...]:
        """Our rows with a figure."""
        return tuple(row for row in self.rows if row.status == "ok" and not row.is_baseline)

    @cached_property
    def baselines(self) -> tuple[Measurement, ...]:
        """Baseline rows with a figure."""
        return tuple(row for row in self.rows if row.status == "ok" and row.is_baseline)

    @cached_property
    def absent_baselines(self) -> tuple[Measurement, ...]:
        """Baselines that failed, were contended or were skipped."""
        return tuple(row for row in self.rows if row.status != "ok" and row.is_baseline)

    @property
    def no_fastest(self) -> str | None:
        """Why no baseline may be called the fastest, or None if one may."""
        if self.absent_baselines:
            return "; ".join(f"{row.lowering} {row.status}" for row in self.absent_baselines)
        return None if self.baselines else "no baseline measured"

    @property
    def fastest_baseline(self) -> Measurement | None:
        """The fastest baseline, only where every baseline has a figure."""
        return None if self.no_fastest else _fastest(self.baselines)

    @property
    def best_baseline_that_ran(self) -> Measurement | None:
        """The lowest latency among the baselines with a figure, whatever the others did."""
        return _fastest(self.baselines)

    @property
    def winner(self) -> Measurement | None:
        """The lowest latency of all, only where every baseline has a figure."""
        return None if self.no_fastest else _fastest(self.ours + self.baselines)

    @property
    def replacement(self) -> Measurement | None:
        """Our fastest kernel that stands in: a shift for a linear, an add for attention."""
        primitive = "add" if self.is_attention else "shift"
        return _fastest(
            row for row in self.ours if row.workload and row.workload.primitive == primitive
        )

    def best_of_form(self, form: str) -> Measurement | None:
        """Our fastest lowering of a form."""
        return _fastest(row for row in self.ours if form_of(row) == form)

    @property
    def verdict(self) -> tuple[Outcome, Ratio | None, str]:
        """Whether shift or add beats every multiplication measured, the baselines' and our own.

        Returns:
            The outcome, the ratio to the strongest rival that ran, and why it is undecided.
        """
        rivals = self.baselines + tuple(
            row for row in self.ours if row.workload and row.workload.primitive == "mult"
        )
        ours = self.replacement
        if ours is None or not rivals:
            return "undecided", None, "no shift or add kernel" if ours is None else "no rival"
        ratios = [(speed_over_rival(ours, rival), rival) for rival in rivals]
        ratio, rival = min(ratios, key=lambda found: found[0].value)
        if ours.run != rival.run:
            return "undecided", ratio, "from different runs"
        # A loss stays a loss whatever the missing baseline would have done; a win does not.
        if ratio.outcome == "pays" and self.no_fastest:
            return "undecided", ratio, self.no_fastest
        if ratio.outcome == "undecided":
            return "undecided", ratio, _why_undecided(ratio)
        return ratio.outcome, ratio, ""

    def own_mult(self) -> OwnMult | None:
        """Our fastest int8 shift against our fastest mult of a byte, of one schedule if any."""
        shifts = [row for row in self.ours if form_of(row) == "shift_int8"]
        mults = [row for row in self.ours if form_of(row) in WHOLE_MULT_FORMS]
        pairs = [(shift, mult) for shift in shifts for mult in mults]
        found = [OwnMult(shift, mult, speed_over_rival(shift, mult)) for shift, mult in pairs]
        same = [own for own in found if own.same_schedule]
        shift = _fastest(own.shift for own in same or found)
        return min(
            (own for own in same or found if own.shift is shift),
            key=lambda own: own.ratio.value,
            default=None,
        )


def _why_undecided(ratio: Ratio) -> str:
    if ratio.is_noise:
        return f"within the noise floor of {ratio.floor:.1%}"
    return "intervals overlap"


def compare(rows: Iterable[Measurement]) -> list[Comparison]:
    """Groups the primitive rows by device, cache state and product; largest products first."""
    groups: dict[tuple[str, str, str], list[Measurement]] = {}
    for row in rows:
        if row.kind == "primitive" and row.workload:
            key = (row.device.fingerprint, row.cache, row.workload.product)
            groups.setdefault(key, []).append(row)
    found = [
        Comparison(group[0].device, cache, product, tuple(group))
        for (_, cache, product), group in groups.items()
    ]
    return sorted(found, key=lambda comparison: (-comparison.macs, comparison.product))


def settings(comparisons: Sequence[Comparison], main: str | None) -> list[list[Comparison]]:
    """The comparisons by device and cache state: the device ``main`` first, hot before cold."""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for comparison in comparisons:
        groups.setdefault((comparison.device.fingerprint, comparison.cache), []).append(comparison)
    order = sorted(groups, key=lambda key: (key[0] != main, key[1] != "hot", -len(groups[key])))
    return [groups[key] for key in order]


def main_setting(rows: Iterable[Measurement], device: DeviceInfo | None) -> list[Comparison]:
    """The comparisons that a verdict on a device rests on, hot before cold; none without rows."""
    main = device.fingerprint if device else None
    found = settings(compare(rows), main)
    return found[0] if found and found[0][0].device.fingerprint == main else []


def count_outcomes(comparisons: Iterable[Comparison]) -> Counter[Outcome]:
    """How many products pay, do not pay, or are undecided; those without a rival are left out."""
    verdicts = [comparison.verdict for comparison in comparisons]
    return Counter(outcome for outcome, ratio, _ in verdicts if ratio is not None)


def outcomes_in_words(comparisons: Sequence[Comparison]) -> str:
    """How often shift and add beat every multiplication, told apart; empty if nothing can."""
    parts = []
    for primitive, products, is_attention in (
        ("shift", "linear", False),
        ("add", "attention", True),
    ):
        some = [one for one in comparisons if one.is_attention == is_attention]
        counts = count_outcomes(some)
        ratios = [one.verdict[1] for one in some]
        alike = sum(ratio is not None and ratio.is_noise for ratio in ratios)
        beyond = f"no difference beyond the noise in {alike}, " if alike else ""
        if counts:
            parts.append(
                f"{primitive} in {counts['pays']} of {sum(counts.values())} {products} products "
                f"(loses in {counts['does not pay']}, {beyond}"
                f"undecided in {counts['undecided'] - alike})"
            )
    return ", ".join(parts)


def median_own_mult(comparisons: Iterable[Comparison]) -> Ratio | None:
    """Median over the products of shift_int8 against our own mult, with its full range."""
    ratios = [own.ratio.value for c in comparisons if (own := c.own_mult())]
    return Ratio(median(ratios), min(ratios), max(ratios)) if ratios else None


def own_mults_in_words(comparisons: Iterable[Comparison]) -> str:
    """What is meant by our own mult, where it is more than one kernel."""
    both = any(form_of(row) == "mult_int7" for one in comparisons for row in one.ours)
    return ", the faster of 8 and 7 bits" if both else " in 8 bits"


def speedups(comparisons: Iterable[Comparison]) -> pd.DataFrame:
    """Best lowering of each of our forms against the best baseline that ran, one row each.

    Returns:
        Columns product, macs, form, lowering, baseline, ratio, low, high (None where unknown)
        and outcome; a product with a missing baseline is ``undecided`` unless ours is slower.
    """
    found = []
    for comparison in comparisons:
        baseline = comparison.best_baseline_that_ran
        forms = sorted({form_of(row) for row in comparison.ours})
        for form in forms if baseline else []:
            ours = comparison.best_of_form(form)
            assert ours is not None and baseline is not None
            ratio = speed_over_rival(ours, baseline)
            open_win = ratio.outcome == "pays" and comparison.no_fastest
            found.append(
                {
                    "product": comparison.product,
                    "macs": comparison.macs,
                    "form": form,
                    "lowering": ours.lowering,
                    "baseline": baseline.lowering,
                    "ratio": ratio.value,
                    "low": ratio.low,
                    "high": ratio.high,
                    "outcome": "undecided" if open_win else ratio.outcome,
                }
            )
    return pd.DataFrame(found)

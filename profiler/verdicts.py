"""SAME, FASTER, SLOWER or AMBIGUOUS: when two latencies are said to differ. Pure functions.

A difference has to be sure and to matter. Sure: a rank test on medians of bursts (samples within
a burst are not independent), corrected for the number of rows that are judged. Matter: at least
the threshold and the noise floor. Equality is a claim as well: the whole interval has to lie
within the larger of the two. What is neither is AMBIGUOUS.

The correction is Holm's. A gate asks whether *anything* became slower, so the chance of one false
alarm among all rows has to be held, however the rows depend on each other, and they do: they share
the machine. Benjamini and Hochberg's holds the share of false ones among the alarms, which is
weaker, and only under some dependences.

Source: Holm, A simple sequentially rejective multiple test procedure, 1979; Hollander, Wolfe and
Chicken, Nonparametric Statistical Methods, sections 3.1 and 4.1 to 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats

from profiler.samples import FEWEST_BURSTS, median_interval

Verdict = Literal["SAME", "FASTER", "SLOWER", "AMBIGUOUS"]

CONFIDENCE = 0.95
# Beyond, the normal approximation of a rank test is as good as its exact distribution.
_EXACT_UP_TO = 50


@dataclass(frozen=True)
class Effect:
    """What two series of bursts say about the ratio of their latencies.

    Attributes:
        ratio: B / A.
        low, high: 95 % interval of it.
        p_value: Of the rank test that there is no difference, two-sided.
    """

    ratio: float
    low: float
    high: float
    p_value: float

    def widened(self, log_half_width: float) -> Effect:
        """With an interval that is wider by a factor of exp(log_half_width) either way."""
        factor = math.exp(log_half_width)
        return replace(self, low=self.low / factor, high=self.high * factor)


def separate_effect(a_ms: Sequence[float], b_ms: Sequence[float]) -> Effect | None:
    """Of bursts of two runs: Hodges and Lehmann's estimate, and the test of Mann and Whitney.

    Args:
        a_ms, b_ms: Medians of bursts.

    Returns:
        None with fewer than 6 bursts on either side.
    """
    if min(len(a_ms), len(b_ms)) < FEWEST_BURSTS:
        return None
    a, b = np.log(a_ms), np.log(b_ms)
    differences = np.sort(np.subtract.outer(b, a).ravel())
    spread = math.sqrt(len(differences) * (len(a) + len(b) + 1) / 12)
    rank = max(1, math.floor(len(differences) / 2 - stats.norm.ppf(0.975) * spread))
    method = "exact" if max(len(a), len(b)) <= _EXACT_UP_TO else "asymptotic"
    return Effect(
        *_ratios(np.median(differences), differences[rank - 1], differences[-rank]),
        p_value=float(stats.mannwhitneyu(b, a, method=method).pvalue),
    )


def paired_effect(a_ms: Sequence[float], b_ms: Sequence[float]) -> Effect | None:
    """Of bursts taken in turns: median of the turns' ratios, and Wilcoxon's signed-rank test.

    Args:
        a_ms, b_ms: Medians of bursts; those of equal index were taken one after the other.

    Returns:
        None with fewer than 6 turns.

    Raises:
        ValueError: If the turns of a and b differ in number.
    """
    if len(a_ms) != len(b_ms):
        raise ValueError(f"{len(a_ms)} bursts of a and {len(b_ms)} of b make no turns")
    if len(a_ms) < FEWEST_BURSTS:
        return None
    differences = np.log(b_ms) - np.log(a_ms)
    changed = differences[differences != 0]
    p_value = 1.0
    if changed.size:
        method = "exact" if changed.size <= _EXACT_UP_TO else "approx"
        p_value = float(stats.wilcoxon(changed, method=method).pvalue)
    return Effect(*_ratios(np.median(differences), *median_interval(differences)), p_value=p_value)


def _ratios(*logarithms: float) -> tuple[float, float, float]:
    centre, low, high = (math.exp(value) for value in logarithms)
    return centre, low, high


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values that hold, taken together, the chance of any false difference."""
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def judge(effect: Effect, adjusted_p: float, threshold: float, floor: float = 0.0) -> Verdict:
    """The verdict on B against A.

    - SLOWER or FASTER: the rank test is sure, and the ratio is at least the threshold and the
      noise floor away from 1.
    - SAME: the whole interval of the ratio is nearer to 1 than that, be the difference sure or
      not: it is too small to matter, or to be told from noise.
    - AMBIGUOUS: neither was shown.

    Threshold and floor are factors in both directions (1.05 and 1/1.05 for 0.05), so that
    swapping the sides swaps the verdicts.

    Args:
        effect: Of B against A.
        adjusted_p: Its p-value, corrected by ``holm`` for all that is judged together.
        threshold: Least relative difference that matters.
        floor: Relative difference that equal things show here.

    Raises:
        ValueError: If the threshold is not above 0.
    """
    if not threshold > 0:
        raise ValueError(f"threshold: must be above 0, got {threshold}")
    matters = 1 + max(threshold, floor)
    if adjusted_p <= 1 - CONFIDENCE and max(effect.ratio, 1 / effect.ratio) >= matters:
        return "SLOWER" if effect.ratio > 1 else "FASTER"
    if 1 / matters < effect.low and effect.high < matters:
        return "SAME"
    return "AMBIGUOUS"

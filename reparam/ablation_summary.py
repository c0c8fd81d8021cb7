"""Rows of an ablation over their seeds: means, intervals, paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from scipy.stats import t

from reparam.ablation_results import AblationRow, AblationSummary
from reparam.ablation_variants import ORIGINAL
from reparam.results import Interval

CONFIDENCE = 0.95


def summarise(rows: Sequence[AblationRow]) -> list[AblationSummary]:
    """One summary for each variant, in the order of the rows."""
    originals = {(row.seed, row.fold): row for row in rows if row.variant == ORIGINAL}
    names = dict.fromkeys(row.variant for row in rows)
    return [_summary([row for row in rows if row.variant == name], originals) for name in names]


def _summary(
    rows: list[AblationRow], originals: dict[tuple[int, int | None], AblationRow]
) -> AblationSummary:
    first = rows[0]
    differences = [
        row.final_top1 - originals[row.seed, row.fold].final_top1
        for row in rows
        if row.variant != ORIGINAL and (row.seed, row.fold) in originals
    ]
    top1 = [row.final_top1 for row in rows]
    ratios = [row.latency_ratio.value for row in rows if row.latency_ratio]
    latencies = [row.latency_ms.value for row in rows if row.latency_ms]
    energies = [row.energy_mj for row in rows if row.energy_mj is not None]
    shares = [row.shift_share for row in rows if row.shift_share is not None]
    budgets = [
        row.expected_latency_ms > row.latency_budget_ms
        for row in rows
        if row.latency_budget_ms is not None and row.expected_latency_ms is not None
    ]
    return AblationSummary(
        variant=first.variant,
        title=first.title,
        seeds=len(rows),
        top1_mean=fmean(top1),
        top1=mean_interval(top1),
        difference_mean=fmean(differences) if differences else None,
        difference=mean_interval(differences),
        latency_ms=fmean(latencies) if latencies else None,
        latency_ratio=fmean(ratios) if ratios else None,
        latency_ratio_interval=mean_interval(ratios),
        weight_bytes=first.weight_bytes,
        energy_mj=fmean(energies) if energies else None,
        energy_source=first.energy_source,
        energy_reason=first.energy_reason,
        shift_share=fmean(shares) if shares else None,
        over_budget=sum(budgets) if budgets else None,
    )


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Student's t interval of a mean; None with fewer than two values.

    Args:
        values: One for each seed, or other independent repetition.
        confidence: Of both sides together.
    """
    if len(values) < 2:
        return None
    mean = fmean(values)
    reach = t.ppf((1 + confidence) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(value=mean, low=mean - reach, high=mean + reach)

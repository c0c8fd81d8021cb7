"""Section on the ablation: what each replacement does to accuracy and cost, over several seeds."""

from __future__ import annotations

import pandas as pd

from reparam.ablation_results import AblationResults, AblationRow, AblationSummary
from reparam.results import Interval
from reports import model_plots
from reports.accuracy_section import on_front
from reports.formats import (
    Cell,
    bytes_cell,
    count_cell,
    ends,
    milliseconds_cell,
    missing,
    number_cell,
    percent,
    percent_cell,
    signed,
    significant,
)
from reports.html import Picture, Section, Table
from reports.run_folder import RunFolder


def ablation(run: RunFolder) -> Section:
    """What each step of the conversion brings and costs, with intervals over the seeds."""
    title = "Ablation: step by step"
    found = run.ablation
    if found is None:
        return Section("ablation", title, missing=run.absence("ablation.json"))
    lead = [
        f"{found.model} on {found.data}, preset {found.preset}, measured at batch "
        f"{found.deploy_batch} on {found.device.label}. Intervals are Student's over the seeds."
    ]
    if found.missing:
        lead.append(f"Not finished yet: {', '.join(found.missing)}.")
    picture = _picture(found)
    return Section(
        "ablation",
        title,
        tuple(lead),
        (picture,) if picture else (),
        (_summaries(found), _rows(found)),
        (found.command,),
    )


def _picture(found: AblationResults) -> Picture | None:
    frame = pd.DataFrame(
        [
            {
                "name": one.variant,
                "variant": one.title,
                "seeds": one.seeds,
                "top1": one.top1_mean,
                "top1_low": one.top1.low if one.top1 else None,
                "top1_high": one.top1.high if one.top1 else None,
                "latency_ms": one.latency_ms,
                "latency_low_ms": None,
                "latency_high_ms": None,
                "weight_bytes": one.weight_bytes,
                "hollow": False,
            }
            for one in found.summaries
            if one.latency_ms is not None
        ]
    )
    if frame.empty:
        return None
    frame["on_front"] = on_front(list(frame.latency_ms), list(frame.top1))
    return Picture(
        "ablation",
        "Mean top-1 over mean latency, by variant",
        model_plots.accuracy_cost,
        frame,
        "; ".join(
            f"{name} {top1:.2f} % at {significant(cost)} ms"
            for name, top1, cost in zip(frame.variant, frame.top1, frame.latency_ms)
        ),
        "Up and to the left is better; the dashed line is the Pareto front. Bars are 95 % "
        "intervals over the seeds.",
        {"cost": "latency_ms", "axis": "measured latency, ms a batch, mean of the seeds"},
    )


def _mean_cell(mean: float | None, interval: Interval | None, text: str, reason: str) -> Cell:
    if mean is None:
        return missing(reason)
    return Cell(text, mean, None, ends(interval) if interval else "one seed, no interval")


def _summary(one: AblationSummary) -> tuple[str | Cell, ...]:
    difference = one.difference_mean
    ratio = one.latency_ratio
    return (
        one.title,
        count_cell(one.seeds),
        _mean_cell(one.top1_mean, one.top1, f"{one.top1_mean:.2f} %", ""),
        _mean_cell(difference, one.difference, signed(difference or 0.0), "the original itself"),
        number_cell(one.latency_ms, "not measured"),
        _mean_cell(
            ratio, one.latency_ratio_interval, f"{significant(ratio or 0.0)}×", "not measured"
        ),
        bytes_cell(one.weight_bytes),
        Cell(f"{significant(one.energy_mj)} mJ", one.energy_mj, one.energy_source)
        if one.energy_mj is not None
        else missing(one.energy_reason),
        percent_cell(None if one.shift_share is None else 100 * one.shift_share, "no MoE layer"),
        count_cell(one.over_budget, "no budget"),
    )


def _summaries(found: AblationResults) -> Table:
    return Table(
        "Variants, means over the seeds",
        (
            "variant",
            "seeds",
            "top-1",
            "difference to the original, points",
            "latency, ms",
            "latency ÷ original's",
            "weight bytes",
            "energy",
            "tokens on shift",
            "seeds over the budget",
        ),
        tuple(_summary(one) for one in found.summaries),
        is_open=True,
        note="The latency ratio is measured in turns with the original of the same seed; below 1 "
        "the variant is faster.",
    )


def _row(row: AblationRow) -> tuple[str | Cell, ...]:
    return (
        row.title,
        str(row.seed),
        missing("by seed") if row.fold is None else str(row.fold),
        percent_cell(row.top1),
        percent_cell(row.deployed_top1, "not deployed"),
        milliseconds_cell(row.latency_ms) if row.latency_ms else missing(row.latency_reason),
        number_cell(row.expected_latency_ms, "no latency curve"),
        number_cell(row.latency_budget_ms, "no budget"),
        percent(None if row.shift_share is None else 100 * row.shift_share),
    )


def _rows(found: AblationResults) -> Table:
    return Table(
        "Every variant and seed",
        (
            "variant",
            "seed",
            "fold",
            "top-1 trained",
            "top-1 deployed",
            "latency, measured",
            "latency expected by the table, ms",
            "budget, ms",
            "tokens on shift",
        ),
        tuple(_row(row) for row in found.rows),
    )

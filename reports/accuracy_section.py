"""Section on accuracy: what each variant costs in time and energy, and what it keeps in top-1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from reparam.results import FinetuneResults, VariantResult
from reports import model_plots
from reports.formats import (
    Cell,
    bytes_cell,
    milliseconds_cell,
    missing,
    points_cell,
    significant,
    times_cell,
    top1_cell,
)
from reports.html import Picture, Section, Table
from reports.run_folder import RunFolder
from reports.whole_models import original_of, unmeasured_originals, variant_speed


def on_front(costs: Sequence[float], gains: Sequence[float]) -> list[bool]:
    """Which points no other beats: none costs at most as much and gains more, or vice versa."""
    points = list(zip(costs, gains))
    return [
        not any(
            other_cost <= cost and other_gain >= gain and (other_cost, other_gain) != (cost, gain)
            for other_cost, other_gain in points
        )
        for cost, gain in points
    ]


def accuracy(run: RunFolder) -> Section:
    """At what accuracy: each variant against the original, over latency and over energy."""
    title = "Accuracy against latency and energy"
    results = run.results
    if results is None:
        return Section("accuracy", title, missing=run.absence("results.json"))
    split = ", ".join(f"{count} {name}" for name, count in results.split.items())
    lead = (
        f"{results.model} on {results.data} ({results.classes} classes; images: {split}), seed "
        f"{results.seed}. Latency is one batch of {results.deploy_batch}, measured end to end on "
        f"{results.device.label}.",
    )
    pictures = tuple(filter(None, (_over_latency(results), _over_energy(results))))
    return Section(
        "accuracy", title, lead, pictures, (_variant_table(results),), (results.command,)
    )


def _accuracy(variant: VariantResult) -> dict[str, object]:
    top1 = variant.deployed_top1 or variant.top1
    return {
        "name": variant.name,
        "variant": variant.title,
        "top1": top1.value,
        "top1_low": top1.low,
        "top1_high": top1.high,
    }


def _over_latency(results: FinetuneResults) -> Picture | None:
    frame = pd.DataFrame(
        [
            _accuracy(one)
            | {
                "latency_ms": one.latency_ms.value,
                "latency_low_ms": one.latency_ms.low,
                "latency_high_ms": one.latency_ms.high,
                "hollow": one.deployed_top1 is None,
            }
            for one in results.variants
            if one.latency_ms
        ]
    )
    if frame.empty:
        return None
    frame["on_front"] = on_front(list(frame.latency_ms), list(frame.top1))
    unplotted = [one.title for one in results.variants if not one.latency_ms]
    note = f" Not drawn, no measured latency: {', '.join(unplotted)}." if unplotted else ""
    return Picture(
        "accuracy",
        "Top-1 over measured latency",
        model_plots.accuracy_cost,
        frame,
        "Top-1 against measured latency: "
        + "; ".join(
            f"{name} {top1:.2f} % at {significant(cost)} ms"
            for name, top1, cost in zip(frame.variant, frame.top1, frame.latency_ms)
        ),
        "Up and to the left is better; the dashed line is the Pareto front. Bars are 95 % "
        "intervals: of the median latency, and Wilson's for the accuracy. Hollow: accuracy of "
        f"the trained form.{note}",
        {"cost": "latency_ms", "axis": "measured latency, ms a batch (left is faster)"},
    )


def _over_energy(results: FinetuneResults) -> Picture | None:
    frame = pd.DataFrame(
        [
            _accuracy(one)
            | {
                "energy_mj": one.energy_mj,
                "energy_low_mj": None,
                "energy_high_mj": None,
                "source": one.energy_source,
                "hollow": one.energy_source == "modelled",
            }
            for one in results.variants
            if one.energy_mj is not None
        ]
    )
    if frame.empty:
        return None
    # A modelled energy is not this device's: it is on a front with modelled ones only.
    frame["on_front"] = False
    kind = "measured" if (frame.source == "measured").sum() > 1 else "modelled"
    some = frame[frame.source == kind]
    frame.loc[some.index, "on_front"] = on_front(list(some.energy_mj), list(some.top1))
    return Picture(
        "accuracy-energy",
        "Top-1 over energy",
        model_plots.accuracy_cost,
        frame,
        "Top-1 against energy: "
        + "; ".join(
            f"{name} {top1:.2f} % at {significant(cost)} mJ, {source}"
            for name, top1, cost, source in zip(
                frame.variant, frame.top1, frame.energy_mj, frame.source
            )
        ),
        "Filled: energy measured on the device. Hollow: modelled from operation counts and memory "
        f"traffic, not this device's energy. The dashed line is the Pareto front of the {kind} "
        "ones.",
        {"cost": "energy_mj", "axis": f"energy, mJ a batch of {results.deploy_batch}"},
    )


def _energy_cell(variant: VariantResult) -> Cell:
    if variant.energy_mj is None:
        return missing(variant.energy_reason)
    text = f"{significant(variant.energy_mj)} mJ"
    return Cell(text, variant.energy_mj, variant.energy_source)


def _variant_table(results: FinetuneResults) -> Table:
    rows: list[tuple[str | Cell, ...]] = []
    absent = "; ".join(f"without {title}" for title in unmeasured_originals(results)) or None
    for one in results.variants:
        speed = variant_speed(results, one)
        is_original = one is original_of(results)
        against = "the original itself" if is_original else "not measured"
        rows.append(
            (
                one.title,
                top1_cell(one.deployed_top1) if one.deployed_top1 else missing("not deployed"),
                points_cell(one.difference) if one.difference else missing(against),
                top1_cell(one.top1),
                milliseconds_cell(one.latency_ms)
                if one.latency_ms
                else missing(one.latency_reason),
                missing(against)
                if is_original or speed is None
                else replace(times_cell(speed), reason=absent),
                bytes_cell(one.weight_bytes),
                _energy_cell(one),
            )
        )
    return Table(
        "Variants against the original",
        (
            "variant",
            "top-1 deployed",
            "difference, points",
            "top-1 trained",
            "latency, measured",
            "fastest original ÷ it",
            "weight bytes",
            "energy",
        ),
        tuple(rows),
        is_open=True,
        note="The difference is deployed top-1 minus the original's on the same images, with its "
        "paired 95 % interval: below 0 throughout means surely less accurate.",
    )

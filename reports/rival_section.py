"""Section on whole models: a deployed one against PyTorch's ways to run the original."""

from __future__ import annotations

import pandas as pd

from reparam.versus_torch_result import Comparison, Contestant
from reports import model_plots
from reports.formats import Cell, ends, milliseconds_cell, missing, significant, times_cell
from reports.html import Picture, Section, Table
from reports.run_folder import RunFolder


def rivals(run: RunFolder) -> Section:
    """By how much, for whole models: against the best that PyTorch offers."""
    title = "Whole models against PyTorch's best"
    found = run.versus_torch
    if found is None:
        return Section("rivals", title, missing=run.absence("versus_torch.json"))
    lead = tuple(rival_sentence(one) for one in found.comparisons)
    note = (
        f"On {found.device.label}, {found.device.threads} threads, all ways in turns in one run. A "
        "deployed model's weights do not matter for its latency; the share of tokens on the shift "
        "expert does, and was set."
    )
    return Section(
        "rivals",
        title,
        (*lead, note),
        tuple(_picture(one, index) for index, one in enumerate(found.comparisons)),
        tuple(_table(one) for one in found.comparisons),
        (found.command,),
    )


def _name(one: Comparison) -> str:
    return f"{one.model}, batch {one.batch}, {one.image_size} pixels"


def least_speedup(one: Comparison) -> str | None:
    """Which of ours gains least; None where one side has no figure."""
    return min(one.speedup, key=lambda name: one.speedup[name].value, default=None)


def absent_of_torch(one: Comparison) -> dict[str, str]:
    """PyTorch's ways without a figure, and why: any of them might have been its fastest."""
    return {
        way.name: way.reason or "no reason given"
        for way in one.contestants
        if way.latency_ms is None and not way.ours and not way.other_runtime
    }


def rival_sentence(one: Comparison) -> str:
    """What the slowest of ours is against PyTorch's best."""
    least = least_speedup(one)
    if least is None:
        return f"{_name(one)}: no ratio, since one side has no figure."
    ratio = one.speedup[least]
    absent = absent_of_torch(one)
    which = "PyTorch's fastest here"
    if absent:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in absent.items())
        which = f"the fastest of PyTorch's ways that ran (not measured: {reasons})"
    return (
        f"{_name(one)}: {least} is {significant(ratio.value)}× as fast as {one.best_torch}, "
        f"{which}; 95 % interval {ends(ratio)}."
    )


def _picture(one: Comparison, index: int) -> Picture:
    frame = pd.DataFrame(
        [
            {
                # Names whose colours the bars know: ours, and all others.
                "name": "moe" if contestant.ours else "original",
                "variant": contestant.name,
                "latency_ms": contestant.latency_ms.value if contestant.latency_ms else None,
                "text": _text(contestant),
                "modelled": False,
            }
            for contestant in one.contestants
        ]
    ).astype({"latency_ms": float})
    return Picture(
        f"rivals-{index}",
        f"Latency of {_name(one)}",
        model_plots.bars,
        frame,
        "; ".join(f"{row.variant}: {row.text}" for row in frame.itertuples()),
        "Each bar is one way to run the same model; ours are the deployed ones.",
        {"value": "latency_ms", "axis": "latency, ms a batch"},
    )


def _text(contestant: Contestant) -> str:
    found = contestant.latency_ms
    return f"{significant(found.value)} ms" if found else "no figure"


def _table(one: Comparison) -> Table:
    cells: list[tuple[str | Cell, ...]] = []
    for contestant in one.contestants:
        ratios = (one.speedup.get(contestant.name), one.speedup_eager.get(contestant.name))
        absent = "is one of PyTorch's own" if not contestant.ours else "one side has no figure"
        cells.append(
            (
                contestant.name,
                milliseconds_cell(contestant.latency_ms)
                if contestant.latency_ms
                else missing(contestant.reason),
                *(times_cell(ratio) if ratio else missing(absent) for ratio in ratios),
            )
        )
    return Table(
        _name(one),
        ("way", "latency", "against PyTorch's best", "against fp32 eager"),
        tuple(cells),
        is_open=True,
    )

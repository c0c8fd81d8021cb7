"""Section on advice: what to convert in a model, said from a latency table alone."""

from __future__ import annotations

from cost_models.advice_result import Comparison, Decision
from reports.formats import Cell, bytes_cell, missing, number_cell, times_cell
from reports.html import Section, Table
from reports.run_folder import ADVISE, RunFolder


def advice(run: RunFolder) -> Section:
    """Which layers to convert before anything is trained, and why."""
    title = "Advice, layer by layer"
    found = run.advice
    if found is None:
        return Section("advice", title, missing=run.absence("advice.json"))
    where = found.device.label if found.device else "a device without a table"
    lead = [f"{found.model}, batch {found.batch}, on {where}: {found.verdict}. {found.reason}"]
    lead += [f"{found.caution}."] if found.caution else []
    lead += [f"This would tell more: {command}" for command in found.measure]
    table = Table(
        "Decisions by layer, from the latency table",
        (
            "layer",
            "rule",
            "form",
            "advice",
            "speed over the baseline",
            "speed over our own mult",
            "fp32 weight bytes",
            "energy saved, mJ",
        ),
        tuple(_decision(one) for one in found.decisions),
        is_open=0 < len(found.decisions) <= 20,
        note="Measured or predicted latencies of single layers, no training: what a conversion "
        "costs in accuracy is not in here.",
    )
    return Section("advice", title, tuple(lead), (), (table,), (ADVISE,))


def _decision(one: Decision) -> tuple[str | Cell, ...]:
    return (
        one.fqn,
        one.rule,
        one.form or missing("no form applies"),
        Cell(one.verdict, None, one.reason),
        _speed(one.against_baseline),
        _speed(one.against_own_mult) if one.against_own_mult else missing("there is none"),
        bytes_cell(one.fp32_weight_bytes),
        Cell(number_cell(one.energy_saved_mj).text, one.energy_saved_mj, one.energy_source)
        if one.energy_saved_mj is not None
        else missing("unknown"),
    )


def _speed(found: Comparison) -> Cell:
    return times_cell(found.speed) if found.speed else missing(found.reason)

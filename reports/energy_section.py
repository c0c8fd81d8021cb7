"""Section on energy: what was measured and what was modelled, never mixed up."""

from __future__ import annotations

from collections import Counter

import pandas as pd

from cost_models.energy_rules import RULES_IN_WORDS, savings
from kernels.workload import linear
from reparam.results import FinetuneResults, VariantResult
from reports import model_plots
from reports.formats import count_cell, missing, number_cell, percent_cell, significant
from reports.html import Picture, Section, Table
from reports.run_folder import FINETUNE, FIT, SWEEP, RunFolder


def energy(run: RunFolder) -> Section:
    """Energy, measured and modelled told apart."""
    title = "Energy"
    pictures: list[Picture] = []
    tables: list[Table] = []
    lead: list[str] = []
    commands: list[str] = []
    if run.results:
        commands.append(FINETUNE)
        known = [one for one in run.results.variants if one.energy_mj is not None]
        absent: dict[str, list[str]] = {}
        for one in run.results.variants:
            if one.energy_mj is None:
                absent.setdefault(one.energy_reason or "no reason given", []).append(one.title)
        lead += [f"No energy for {', '.join(names)}: {why}." for why, names in absent.items()]
        if known:
            pictures.append(_energy_picture(run.results, known))
        tables.append(
            Table(
                f"Energy of one inference at batch {run.results.deploy_batch}",
                ("variant", "energy, mJ", "measured or modelled", "remark"),
                tuple(
                    (
                        one.title,
                        number_cell(one.energy_mj, one.energy_reason),
                        one.energy_source or missing(None),
                        one.energy_reason or "",
                    )
                    for one in run.results.variants
                ),
            )
        )
    if run.rows is not None:
        commands.append(SWEEP)
        measured = [row for row in run.rows if row.energy_mj is not None]
        reasons = Counter(row.energy_reason or "" for row in run.rows if row.energy_mj is None)
        lead.append(
            f"Energy was measured for {len(measured)} of {len(run.rows)} rows of the sweep."
        )
        if reasons:
            tables.append(
                Table(
                    "Why energy was not measured in the sweep",
                    ("reason", "rows"),
                    tuple((reason, count_cell(count)) for reason, count in reasons.most_common()),
                )
            )
        if measured:
            tables.append(
                Table(
                    "Energy per launch, measured",
                    ("subject", "lowering", "gross, mJ", "above idle, mJ", "window, s", "source"),
                    tuple(
                        (
                            row.workload.label if row.workload else row.subject,
                            row.lowering,
                            number_cell(row.energy_mj),
                            number_cell(row.energy_net_mj, "idle not measured"),
                            number_cell(row.energy_window_s, "not recorded"),
                            row.energy_source or "",
                        )
                        for row in measured
                    ),
                )
            )
    if rules := _rules(run):
        tables.append(rules)
    if run.table:
        commands.append(FIT)
        tables.append(
            Table(
                "Energy per launch in the latency table, measured or modelled",
                ("workload", "lowering", "energy, mJ", "measured or modelled", "remark"),
                tuple(
                    (
                        entry.workload.label,
                        entry.lowering,
                        number_cell(entry.energy_mj, entry.energy_reason),
                        entry.energy_source or missing(None),
                        entry.energy_reason or "",
                    )
                    for entry in run.table.entries
                ),
            )
        )
    if not commands:
        return Section("energy", title, missing=run.absence("results.json"))
    return Section("energy", title, tuple(lead), tuple(pictures), tuple(tables), tuple(commands))


def _rules(run: RunFolder) -> Table | None:
    """How much of a modelled saving each rule makes up, on the largest linear of the run."""
    found = (row.workload for row in run.rows or () if row.kind == "primitive" and row.workload)
    linears = [workload for workload in found if workload.kind == "linear"]
    if not linears:
        return None
    largest = max(linears, key=lambda workload: workload.macs)
    sizes = (largest.m, largest.k, largest.n)
    under = savings(linear("mult_fp32", *sizes), linear("shift_int8", *sizes))
    return Table(
        f"Modelled: what shift_int8 saves against fp32 by each rule, {largest.product}",
        ("rule", "dense, mJ", "shift, mJ", "saving", "saving of arithmetic alone", "made up"),
        tuple(
            (
                RULES_IN_WORDS[one.rule],
                number_cell(one.dense.with_memory_mj),
                number_cell(one.other.with_memory_mj),
                percent_cell(one.saving),
                percent_cell(one.compute_saving),
                number_cell(one.made_up, "the last rule"),
            )
            for one in under
        ),
        note="45 nm, with memory. The first rule is that of the paper's release, the last ours; "
        "made up: points of saving that the next rule takes away. "
        "python -m cost_models.energy_rules prints it for any shape.",
    )


def _energy_picture(results: FinetuneResults, known: list[VariantResult]) -> Picture:
    frame = pd.DataFrame(
        [
            {
                "name": one.name,
                "variant": one.title,
                "energy_mj": one.energy_mj,
                "text": f"{significant(one.energy_mj or 0)} mJ, {one.energy_source}",
                "modelled": one.energy_source == "modelled",
            }
            for one in known
        ]
    )
    return Picture(
        "energy",
        "Energy of one inference",
        model_plots.bars,
        frame,
        "Energy: " + "; ".join(f"{row.variant} {row.text}" for row in frame.itertuples()),
        "Plain bars were measured on the device. Hatched bars are modelled from operation counts "
        "and memory traffic: they compare forms, they are not this device's energy.",
        {"value": "energy_mj", "axis": f"energy, mJ an inference at batch {results.deploy_batch}"},
    )

"""Sections on the fine-tuned and deployed model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from reparam.results import VariantResult
from reports import model_plots
from reports.formats import (
    Cell,
    bytes_text,
    count_cell,
    missing,
    number_cell,
    percent,
    percent_cell,
    significant,
)
from reports.html import Picture, Section, Table
from reports.run_folder import FINETUNE, RunFolder
from reports.whole_models import original_of, shift_share

MAX_EXAMPLE_LAYERS = 4


def routing(run: RunFolder) -> Section:
    """Where the router sends its tokens."""
    title = "Routing: which tokens go where"
    if run.results is None:
        return Section("routing", title, missing=run.absence("results.json"))
    routed = [one for one in run.results.variants if one.dispatch]
    if not routed:
        return Section("routing", title, ("No variant of this run has an MoE layer.",))
    frame = pd.DataFrame(
        [
            {
                "variant": one.title,
                "layer": layer.layer,
                "expert": expert,
                "share_percent": 100 * layer.share[expert],
                "optimal_share_percent": 100 * layer.optimal_share.get(expert, 0.0),
            }
            for one in routed
            for layer in one.dispatch
            for expert in sorted(layer.share)
        ]
    )
    sentences = " ".join(
        f"“{one.title}” sends {percent(shift_share(one))} of its tokens to shift experts, the mean "
        f"of its {len(one.dispatch)} MoE layers."
        for one in routed
    )
    picture = Picture(
        "routing",
        "Tokens by layer and expert",
        model_plots.routing,
        frame,
        f"Share of tokens per expert and MoE layer. {sentences}",
        "Share of the test set's tokens per expert. The diamond is the dispatch at which all "
        "experts take equally long, in inverse proportion to their latency: what the paper's "
        "balance aims at, counted with the router's noise. Other losses aim elsewhere.",
    )
    rows = tuple(
        (
            one.title,
            layer.layer,
            expert,
            percent_cell(100 * share),
            percent_cell(100 * layer.optimal_share[expert])
            if expert in layer.optimal_share
            else missing("not given"),
            number_cell(layer.expert_latency_ms.get(expert), "not in the table"),
            layer.expert_source.get(expert, "not given"),
        )
        for one in routed
        for layer in one.dispatch
        for expert, share in sorted(layer.share.items())
    )
    table = Table(
        "Tokens and latency of each expert",
        (
            "variant",
            "layer",
            "expert",
            "share of tokens",
            "share of equal time",
            "latency of all tokens, ms",
            "source of the latency",
        ),
        rows,
    )
    return Section(
        "routing", title, (sentences,), (picture, *_examples(routed)), (table,), (FINETUNE,)
    )


def _examples(routed: Sequence[VariantResult]) -> Iterator[Picture]:
    """Which patches went to which expert, in the last variant: a picture is hundreds of cells."""
    for one in routed[-1:]:
        layers = list(dict.fromkeys(fqn for example in one.examples for fqn in example.layers))
        shown = layers[:: max(1, -(-len(layers) // MAX_EXAMPLE_LAYERS))]
        rows, grids = [], []
        for number, example in enumerate(one.examples):
            other = [not name.startswith("mult") for name in example.experts]
            for fqn in (fqn for fqn in shown if fqn in example.layers):
                grid = [[other[expert] for expert in line] for line in example.layers[fqn]]
                flat = [to_shift for line in grid for to_shift in line]
                grids.append(grid)
                rows.append(
                    {
                        "image": number,
                        "label": example.label,
                        "guess": example.guess,
                        "layer": fqn,
                        "patches": len(flat),
                        "shift_percent": 100 * sum(flat) / len(flat),
                    }
                )
        if not rows:
            continue
        frame = pd.DataFrame(rows)
        yield Picture(
            "examples-0",
            f"Patches of test images by expert, {one.title}",
            model_plots.dispatch_examples,
            frame,
            f"{len(one.examples)} test images; {percent(float(frame.shift_percent.mean()))} of "
            "their patches in these layers went to shift experts.",
            "Left the image with its class and what it was taken for, then one grid a layer: "
            "hatched patches went to a shift expert, plain ones to a multiplication. Layers: "
            f"{', '.join(shown)}.",
            {"images": [example.image for example in one.examples], "grids": grids},
        )


def training(run: RunFolder) -> Section:
    """How training went."""
    title = "Training"
    if run.results is None:
        return Section("training", title, missing=run.absence("results.json"))
    epochs = [
        {"name": one.name, "variant": one.title, "step": step, **epoch.model_dump()}
        for one in run.results.variants
        for step, epoch in enumerate(one.history, start=1)
    ]
    if not epochs:
        return Section("training", title, ("results.json holds no training history.",))
    frame = pd.DataFrame(epochs)
    lead = "; ".join(
        f"{part.variant.iloc[0]}: {len(part)} epochs in {part.seconds.sum():.0f} s"
        for _, part in frame.groupby("name", sort=False)
    )
    picture = Picture(
        "training",
        "Training by epoch",
        model_plots.training,
        frame,
        "Validation top-1, training loss and latency loss by epoch; figures in the table.",
        "Epochs are counted from each variant's own start.",
    )
    table = Table(
        "Training by epoch",
        (
            "variant",
            "stage",
            "epoch",
            "training loss",
            "latency loss",
            "validation top-1",
            "seconds",
        ),
        tuple(
            (
                one.title,
                epoch.stage,
                count_cell(epoch.epoch),
                number_cell(epoch.train_loss, digits=4),
                number_cell(epoch.latency_loss, "not used", digits=4),
                percent_cell(epoch.validation_top1),
                number_cell(epoch.seconds),
            )
            for one in run.results.variants
            for epoch in one.history
        ),
    )
    return Section("training", title, (f"{lead}.",), (picture,), (table,), (FINETUNE,))


def weights(run: RunFolder) -> Section:
    """Storage: the shift's surest win."""
    title = "Weight bytes"
    if run.results is None:
        return Section("weights", title, missing=run.absence("results.json"))
    original = original_of(run.results)
    base = original.weight_bytes if original else None
    frame = pd.DataFrame(
        [
            {
                "name": one.name,
                "variant": one.title,
                "stored_kb": one.weight_bytes / 1e3,
                "text": bytes_text(one.weight_bytes)
                + (f", {significant(100 * one.weight_bytes / base)} %" if base else ""),
                "modelled": False,
            }
            for one in run.results.variants
        ]
    )
    if frame.empty:
        return Section("weights", title, ("results.json holds no variant.",))
    picture = Picture(
        "weights",
        "Stored parameters",
        model_plots.bars,
        frame,
        "Stored parameters: "
        + "; ".join(f"{row.variant} {row.text}" for row in frame.itertuples()),
        "Stored parameters of the deployed form, and their share of the original's.",
        {"value": "stored_kb", "axis": "stored parameters, kB (1000 bytes)"},
    )
    table = Table(
        "Weight bytes of each variant",
        ("variant", "weight bytes", "of the original"),
        tuple(
            (
                one.title,
                count_cell(one.weight_bytes),
                percent_cell(100 * one.weight_bytes / base if base else None, "no original"),
            )
            for one in run.results.variants
        ),
    )
    return Section("weights", title, (), (picture,), (table,), (FINETUNE,))


def agreement(run: RunFolder) -> Section:
    """Whether the deployed model is the trained one, and what was converted."""
    title = "Deployed against trained"
    if run.results is None:
        return Section("agreement", title, missing=run.absence("results.json"))
    deployed = [(one, one.agreement) for one in run.results.variants if one.agreement]
    images, differing, traced = (
        sum(getattr(found, name) for _, found in deployed)
        for name in ("images", "differing", "traced")
    )
    lead = (
        f"Over the {len(deployed)} variants deployed on our kernels, {differing} of {images} "
        f"predictions differ from the trained form's; {traced} of those were traced to a code or "
        "gate within rounding of its threshold."
        if deployed
        else "No variant was deployed on our kernels.",
    )
    tables = [
        Table(
            "Agreement of each deployed variant with its trained form",
            (
                "variant",
                "images",
                "differing",
                "of these traced",
                "largest relative error of a layer",
            ),
            tuple(
                (
                    one.title,
                    count_cell(found.images),
                    count_cell(found.differing),
                    count_cell(found.traced),
                    # An error below 0.001 needs its exponent to be read.
                    Cell(f"{found.max_layer_error:.2g}", found.max_layer_error),
                )
                for one, found in deployed
            ),
            is_open=bool(deployed),
        )
    ]
    tables += [
        Table(
            f"{one.title}: layers converted {len(one.converted)}, skipped {len(one.skipped)}",
            ("layer", "what happened", "to what, or why not"),
            (
                *((name, "converted", form) for name, form in one.converted.items()),
                *((name, "skipped", reason) for name, reason in one.skipped.items()),
            ),
        )
        for one in run.results.variants
        if one.converted or one.skipped
    ]
    return Section("agreement", title, lead, (), tuple(tables), (FINETUNE,))

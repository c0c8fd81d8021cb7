"""Does a model that was trained to a latency budget keep to it on this machine?

python tests/prove/budget.py --latency-table runs/models/latency_table.json

Trains the digits model with experts of unlike speed (fp32 multiplication and int8 shift) to budgets
between its fastest and its slowest dispatch, deploys it and measures it. The table must be of this
CPU, for the model to be timed before it is trained, and fitted on measured models too
(`reparam.evaluate --predicted-versus-measured`, then `cost_models.fit`). Resumable. Exit code 1 if
a model is more than 7 % off what it was trained for.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from cost_models.latency_table import LatencyTable, TableError
from kernels.torch_ops import set_threads
from profiler.command_line import EXIT_VERDICT_AGAINST, BadInput, output_folder, run
from profiler.device import cpu_info
from profiler.samples import PRESETS
from reparam.accuracy import dispatch_shares, predict, top1
from reparam.convert import reparameterize_
from reparam.deploy import deploy
from reparam.model_cost import measure_latencies
from reparam.plan import planned
from reparam.recipe import Variant, load_recipe
from reparam.recipe_models import with_fastest_mult
from reparam.results import Interval
from reparam.stages import (
    Run,
    check_budget,
    open_task,
    train_attention,
    train_original,
    train_variant,
)

TOLERANCE = 0.07
BUDGETS = (0.3, 0.6)

app = typer.Typer(add_completion=False)


def variant(share: float) -> Variant:
    """What is trained: ``share`` of the way from the fastest to the slowest dispatch."""
    return Variant(
        name=f"budget_{round(100 * share)}",
        title=f"MoE within {share:.0%} of the range",
        attention_linears="shift_int8",
        mlp="moe",
        experts={"mult": "mult_fp32", "shift": "shift_int8"},
        latency_loss="expected",
        latency_loss_weight=1.0,
        latency_budget_share=share,
    )


@app.command(help=__doc__)
def main(
    latency_table: Annotated[Path, typer.Option(help="Of this CPU, fitted on models too.")],
    out: Annotated[Path, typer.Option(help="Folder.")] = Path("runs/prove"),
) -> None:
    """Prints a line for each budget."""
    table = LatencyTable.load(latency_table)
    recipe = with_fastest_mult(load_recipe("digits-quick")[1], table, Console(stderr=True))
    here = cpu_info(recipe.threads)
    if table.device.fingerprint != here.fingerprint:
        raise BadInput(f"--latency-table: is of {table.device.label}, this is {here.label}")
    if table.overhead("model", "deployed") is None:
        raise BadInput(f"--latency-table: {latency_table} knows of no measured models")
    torch.set_num_threads(recipe.threads)
    set_threads(recipe.threads)
    model, data = open_task(recipe, None, 0)
    example = next(iter(data.batches("test", recipe.deploy_batch, False)))[0]
    folder = output_folder(out / "budget")
    own = Run(recipe, table, data, example, 0, folder, Console(stderr=True), folder)
    for share in BUDGETS:
        asked, untrained = variant(share), copy.deepcopy(model)
        for config in (recipe.attention_config, recipe.linears_config(asked)):
            reparameterize_(untrained, config, recipe.allows(untrained))
        check_budget(own, asked, untrained)
    original = train_original(own, model)
    stage1 = train_attention(own, original)
    kept = True
    for share in BUDGETS:
        asked = variant(share)
        candidate = train_variant(own, asked, stage1, original.model)
        trained, objective = candidate.model, candidate.objective
        assert objective is not None and objective.curves is not None
        assert objective.budget_ms is not None
        with dispatch_shares(trained) as shares:
            guesses, labels = predict(trained, data, "test", len(example))
        expected_ms = objective.curves.expected_ms(shares)
        timing = measure_latencies(
            {"deployed": planned(deploy(trained), example)}, example, PRESETS["standard"]
        )
        measured = Interval.of_latency(timing["deployed"])
        if measured is None:
            print(f"{asked.name}: {timing['deployed'].reason}")
            kept = False
            continue
        low_ms, high_ms = objective.curves.bounds_ms
        off = measured.value / objective.budget_ms - 1
        kept = kept and abs(off) <= TOLERANCE
        print(
            f"{asked.name}: budget {objective.budget_ms:.3f} ms of {low_ms:.3f} … {high_ms:.3f},"
            f" expected {expected_ms:.3f}, measured {measured.value:.3f}"
            f" ({measured.low:.3f} … {measured.high:.3f}) ms, {off:+.1%} of the budget;"
            f" top-1 {top1(guesses, labels).value:.2f} %",
            flush=True,
        )
    if not kept:
        raise typer.Exit(EXIT_VERDICT_AGAINST)


if __name__ == "__main__":
    run(app, (TableError,))

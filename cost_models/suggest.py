"""Which workloads to measure next, as a sweep for the profiler.

python -m cost_models.suggest --out design.toml                     no model yet: all over the range
python -m cost_models.suggest --store rows.sqlite --out more.toml   where the models are least sure

Measure it with `python -m profiler.sweep --config more.toml --store rows.sqlite`; `make refine`
does both in turns. Shapes are chosen by the doubt of the models, never by errors on held-out rows.
Exit code 1 and no sweep once the models are within --target on left-out training rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track

from cost_models.features import hull_around, hull_of, points_of, sizes_of
from cost_models.fitted_model import FittedModel, changed
from cost_models.held_out import is_locked
from cost_models.models import MIN_ROWS, LearnedLatency
from cost_models.shape_pool import (
    AttentionGroup,
    LinearGroup,
    attention_groups,
    linear_groups,
)
from cost_models.training_rows import (
    Groups,
    choose_device,
    group_rows,
    of_primitives,
    read_store,
    store_name,
)
from kernels.workload import Workload
from profiler.command_line import BadInput, run
from profiler.device import DeviceInfo
from profiler.sweep_config import LINEAR_FORMS
from profiler.whole_file import write_whole

app = typer.Typer(add_completion=False)

Group = LinearGroup | AttentionGroup

# What a suggested sweep measures an attention as.
_ATTENTION_FORM = "add_attention_pm1"
# The first design: token counts of so many widths, and of the pairs of code and value widths.
DESIGN_LINEARS = 64
DESIGN_ATTENTIONS = 25
# Groups to choose from in a round.
_POOL_LINEARS = 192
_POOL_ATTENTIONS = 25


def design(seed: int = 0) -> list[Group]:
    """The first design: what to measure before there is any model."""
    attentions = islice(attention_groups(seed), DESIGN_ATTENTIONS)
    return [*islice(linear_groups(seed), DESIGN_LINEARS), *attentions]


def pool(seed: int) -> list[Group]:
    """Groups to choose the next ones from; another seed, other groups."""
    attentions = islice(attention_groups(seed), _POOL_ATTENTIONS)
    return [*islice(linear_groups(seed), _POOL_LINEARS), *attentions]


def doubt(model: FittedModel, workloads: Sequence[Workload]) -> float:
    """How unsure a model is of some workloads: mean half width of their intervals, in log."""
    predicted = model.predict_many(workloads)
    return float(np.mean(np.log(predicted.high_ms / predicted.latency_ms)))


def least_sure(models: Sequence[FittedModel], groups: Sequence[Group], number: int) -> list[Group]:
    """The groups to measure next, one after the other, each as if the ones before were known.

    Workloads of the locked test part count for nothing: no model will learn from them.

    Args:
        models: One a form and lowering.
        groups: To choose from.
        number: How many at most.
    """
    models, left = list(models), list(groups)
    chosen: list[Group] = []
    while left and len(chosen) < number:
        best = max(left, key=lambda group: _total_doubt(models, group))
        if _total_doubt(models, best) == 0:
            break
        left.remove(best)
        chosen.append(best)
        models = [_as_if_known(model, _unlocked(best, model.form)) for model in models]
    return chosen


def _unlocked(group: Group, form: str) -> list[Workload]:
    if isinstance(group, AttentionGroup) != (form == _ATTENTION_FORM):
        return []
    workloads = group.workloads() if isinstance(group, AttentionGroup) else group.workloads(form)
    return [] if is_locked(workloads[0]) else workloads


def _total_doubt(models: Sequence[FittedModel], group: Group) -> float:
    each = ((model, _unlocked(group, model.form)) for model in models)
    return sum(doubt(model, workloads) for model, workloads in each if workloads)


def _as_if_known(model: FittedModel, workloads: Sequence[Workload]) -> FittedModel:
    """A model after measuring some workloads, as far as its doubt goes: that asks for no latency.

    Source: Rasmussen, Williams: Gaussian Processes for Machine Learning, eq. 2.26.
    """
    if not workloads:
        return model
    octaves = points_of(sizes_of(workloads))[:, model.columns]
    return changed(
        model,
        hull=hull_around(model.hull, hull_of(workloads)),
        points=(*model.points, *map(tuple, octaves.tolist())),
        residuals=(*model.residuals, *[0.0] * len(workloads)),
    )


def sweep_toml(
    groups: Sequence[Group], forms: Sequence[str], description: str, threads: int = 1
) -> str:
    """A sweep of ours alone, hot, with the quick clock.

    Args:
        groups: Shapes.
        forms: Of the linears; none where there are only attentions.
        description: For people, on one line.
        threads: CPU threads.
    """
    names = ", ".join(f'"{form}"' for form in forms)
    lines = [
        f'description = "{description}"',
        *([f"forms = [{names}]"] if forms else []),
        f"threads = [{threads}]",
        'timing = "quick"',
        "baselines = false",
        "superseded = false",
    ]
    for group in groups:
        if isinstance(group, LinearGroup):
            lines += ["", "[[shapes]]", f"m = {list(group.tokens)}"]
            lines += [f"k = {group.k}", f"n = {group.n}"]
            continue
        for b, tokens in group.sizes:
            lines += ["", "[[shapes]]", 'kind = "attention"', f"b = {b}", f"tokens = {tokens}"]
            lines += [f"bits = {group.bits}", f"n = {group.n}", 'products = ["both"]']
    return "\n".join(lines) + "\n"


def fit_training_part(groups: Groups, device: DeviceInfo) -> list[LearnedLatency]:
    """A model for each of our lowerings of a form that a sweep can measure, of unlocked rows.

    Single products of attention get none: no suggested shape would make one surer.
    """
    fitted = []
    for (form, lowering), rows in track(
        groups.items(), "fitting", console=Console(stderr=True), transient=True
    ):
        if form not in (*LINEAR_FORMS, _ATTENTION_FORM):
            continue
        known = [r for r in rows if r.workload.is_canonical and not is_locked(r.workload)]
        if len(known) < MIN_ROWS or known[0].measurement.is_baseline:
            continue
        model = LearnedLatency(form, lowering, False, device)
        fitted.append(model.fit([r.workload for r in known], [r.latency_ms for r in known]))
    return fitted


def left_out_mape(model: LearnedLatency) -> float:
    """Error in percent on training rows, each by a model that was fitted without its group."""
    return float(100 * np.mean(np.abs(np.expm1(-model.errors_))))


@app.command(help=__doc__)
def main(
    out: Annotated[Path, typer.Option(help="The sweep to write, a TOML.")],
    store: Annotated[
        str | None, typer.Option(help="Measurements so far; without, the first design is written.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Fingerprint, where the store holds several devices.")
    ] = None,
    number: Annotated[int, typer.Option(min=1, help="Groups of shapes to suggest.")] = 8,
    target: Annotated[
        float, typer.Option(min=0, help="Left-out error in percent that is good enough.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the shapes to choose from.")] = 1,
) -> None:
    """Reads rows, writes a sweep."""
    console = Console()
    if store is None:
        groups, forms, threads = design(), LINEAR_FORMS, 1
        description = "Ours alone, over all widths and token counts: for the latency models."
    else:
        hot = of_primitives(read_store(store))
        info = choose_device(hot, store_name(store), device)
        rows = group_rows(hot, info).groups
        fitted = fit_training_part(rows, info)
        if not fitted:
            raise BadInput(f"{store_name(store)}: too few rows of ours for a model; start without")
        for model in fitted:
            line = f"{model.form} {model.lowering}: left-out error {left_out_mape(model):.1f} %"
            console.print(line, markup=False, highlight=False)
        unsure = [model.fitted_ for model in fitted if left_out_mape(model) > target]
        if not unsure:
            console.print(f"all within {target:g} %: nothing more to measure")
            raise typer.Exit(1)
        groups, threads = least_sure(unsure, pool(seed), number), max(1, info.threads)
        forms = tuple(f for f in LINEAR_FORMS if f in {model.form for model in unsure})
        description = "Where the latency models are least sure."
    try:
        write_whole(out, sweep_toml(groups, forms, description, threads))
    except OSError as error:
        raise BadInput(f"--out {out}: cannot be written ({error.strerror})") from error
    console.print(f"{len(groups)} groups of shapes -> {out}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    run(app)

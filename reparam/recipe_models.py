"""The models of a recipe before any training: what they compute, and its fastest multiplication."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import suppress

import torch
from rich.console import Console
from timm.data import resolve_data_config
from torch import nn

from cost_models.latency_table import LatencyTable, TableError
from kernels.packing import WHOLE_WEIGHTS
from kernels.workload import Workload
from reparam.convert import reparameterize_
from reparam.expert_latency import layer_workloads, undecided
from reparam.recipe import MULT_FASTEST, ExpertForm, Recipe, create_model

# Times as fast as the closer form of weights that the other must be.
_LEAST_GAIN = 1.05


def converted_copies(recipe: Recipe, original: nn.Module) -> Iterator[nn.Module]:
    """The original, converted by stage 1 and for each variant, not trained."""
    attention = copy.deepcopy(original)
    reparameterize_(attention, recipe.attention_config, recipe.allows(attention))
    yield attention
    for variant in recipe.variants:
        model = copy.deepcopy(attention)
        reparameterize_(model, recipe.linears_config(variant), recipe.allows(model))
        yield model


def recipe_workloads(recipe: Recipe) -> list[Workload]:
    """The workloads of a recipe's variants at its ``deploy_batch``, for a sweep to measure.

    Each expert of an MoE is there at all tokens of its layer: what the router's loss asks for. What
    ``mult_fastest`` may come to is there in each form.

    Raises:
        ConversionError: If a rule of the recipe matches nothing.
    """
    settings = recipe.model.model_copy(update={"pretrained": False})
    original = create_model(settings)
    sizes = {name: settings.kwargs.get(name) for name in ("img_size", "in_chans")}
    shape = resolve_data_config(sizes, model=original)["input_size"]
    example = torch.zeros(recipe.deploy_batch, *shape)
    found: dict[Workload, None] = {}
    for form in WHOLE_WEIGHTS if recipe.asks_for_fastest else [""]:
        for model in converted_copies(written_out(recipe, form), original):
            for workloads in layer_workloads(model, example, undecided(model, example)).values():
                found |= dict.fromkeys(workloads)
    return list(found)


def written_out(recipe: Recipe, form: str) -> Recipe:
    """The recipe with a form for each ``mult_fastest``."""

    def chosen(experts: dict[str, ExpertForm]) -> dict[str, str]:
        return {name: form if own == MULT_FASTEST else own for name, own in experts.items()}

    given = recipe.model_dump(mode="json")
    given["experts"] = chosen(recipe.experts)
    for variant, own in zip(given["variants"], recipe.variants):
        variant["experts"] = own.experts and chosen(own.experts)
    return Recipe.model_validate(given)


def with_fastest_mult(recipe: Recipe, table: LatencyTable, console: Console) -> Recipe:
    """The recipe with the form for ``mult_fastest`` that a device computes fastest.

    Weights of 8 bits are the closest to the original's, and taken unless fewer bits are faster by
    5 %; those are within 2 % RMS as well. Asked is what both were in interleaved rounds; of a table
    without such, the sum over all experts' linears of the recipe, each once.

    Args:
        recipe: As its TOML has it.
        table: A form that it knows nothing of is not chosen.
        console: Is told the choice.
    """
    if not recipe.asks_for_fastest:
        return recipe
    closest, *_ = WHOLE_WEIGHTS
    latencies = _paired_latencies(table) or _summed_latencies(recipe, table)

    def charged(form: str) -> float:
        return latencies[form] * (1.0 if form == closest else _LEAST_GAIN)

    form = min(latencies, key=charged, default=closest)
    least = min(latencies.values(), default=1.0)
    known = ", ".join(f"{name} {own / least:.3g}" for name, own in latencies.items())
    console.print(
        f"{MULT_FASTEST}: {form} ({known or 'the table knows none'})", markup=False, soft_wrap=True
    )
    return written_out(recipe, form)


def _paired_latencies(table: LatencyTable) -> dict[str, float]:
    closest, *others = WHOLE_WEIGHTS
    known = {form: 1 / table.own_speeds[form].mean for form in others if form in table.own_speeds}
    return {closest: 1.0} | known if known else {}


def _summed_latencies(recipe: Recipe, table: LatencyTable) -> dict[str, float]:
    workloads = recipe_workloads(recipe)
    latencies = {}
    for form in WHOLE_WEIGHTS:
        with suppress(TableError):
            latencies[form] = sum(table.lookup(w).latency_ms for w in workloads if w.form == form)
    return latencies

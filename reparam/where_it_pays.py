"""Which layers of a model pay on a device: the advice that a conversion keeps to if asked."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from cost_models.advice import advise
from cost_models.advice_result import Advice
from cost_models.conversion_plan import Layer, plan
from cost_models.latency_table import LatencyTable
from profiler.model_workloads import layers_of
from reparam.conversion_rules import ReparamConfig
from reparam.mult import MULT_FORMS
from reparam.shift import SHIFT_FORMS

LINEAR_FORMS = (*MULT_FORMS, *SHIFT_FORMS)


def advice_for(model: nn.Module, config: ReparamConfig, example: Tensor) -> Advice:
    """Decides layer by layer, from a latency table, at the batch that will be deployed.

    Args:
        model: Not yet converted, or in stage 1.
        config: With ``where="pays"``; each linear is considered in the forms alone that
            are asked for at its place.
        example: Input of the model; its first image alone counts.

    Raises:
        TableError: If there is no such table.
    """
    table = LatencyTable.load(str(config.latency_table))
    images = example[:1].expand(config.deploy_batch, *example.shape[1:])
    layers = plan(layers_of(model, images), LINEAR_FORMS, config.alphabet)
    return advise(
        [_as_asked(layer, config) for layer in layers],
        table,
        model=type(model).__name__,
        batch=config.deploy_batch,
        table_name=config.latency_table,
        with_break_even=False,
    )


def _as_asked(layer: Layer, config: ReparamConfig) -> Layer:
    """A linear in the forms alone that the configuration asks for at its place."""
    if layer.rule not in ("attention_linears", "mlp"):
        return layer
    rule = config.first_rule(layer.fqn, layer.fqn.rpartition(".")[0])
    options = rule.config if rule else config
    asked = {str(options.attention_linears if layer.rule == "attention_linears" else options.mlp)}
    if "moe" in asked:
        asked = {str(form) for form in options.experts.values()}
    return replace(layer, forms={form: w for form, w in layer.forms.items() if form in asked})


def why_not(advice: Advice, fqn: str) -> str:
    """Why a layer stays, in the words of its decisions."""
    own = [one for one in advice.decisions if one.fqn == fqn]
    found = own or [one for one in advice.decisions if one.fqn.startswith(f"{fqn}.")]
    if not found:
        return "where = pays: no decision covers it"
    return "; ".join(dict.fromkeys(f"{one.verdict}: {one.reason}" for one in found))

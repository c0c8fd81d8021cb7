"""Which layers of a model pay on a device: the advice that a conversion keeps to if asked."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor, nn

from cost_models.advice import advise
from cost_models.advice_result import Advice
from cost_models.conversion_plan import Layer, plan
from cost_models.latency_table import LatencyTable
from profiler.model_workloads import ModelLayer, Rule, layers_of
from reparam.attention_structure import opened
from reparam.conversion_rules import ReparamConfig
from reparam.linear_forms import LINEAR_FORMS
from reparam.model_structure import is_attention, linear_parts

_QUADRATIC = "no table says what quadratic attention on codes takes"


class Part(NamedTuple):
    """What a linear belongs to.

    Attributes:
        rule: ``attention_linears`` or ``mlp``.
        within: Qualified name of the attention or MLP.
    """

    rule: Rule
    within: str


def advice_for(
    model: nn.Module, config: ReparamConfig, example: Tensor, parts: Mapping[str, Part]
) -> Advice:
    """Decides layer by layer, from a latency table, at the batch that will be deployed.

    Args:
        model: Not yet converted, or in stage 1.
        config: With ``where="pays"``; each linear is considered in the forms alone that
            are asked for at its place.
        example: Input of the model; its first image alone counts.
        parts: Of ``parts_of``; any other linear stays.

    Raises:
        TableError: If there is no such table.
    """
    table = LatencyTable.load(str(config.latency_table))
    images = example[:1].expand(config.deploy_batch, *example.shape[1:])
    with opened(model):
        seen = layers_of(model, images)
    layers = plan([_by_what_it_is(layer, parts) for layer in seen], LINEAR_FORMS, config.alphabet)
    return advise(
        [_as_asked(layer, config, parts) for layer in layers],
        table,
        model=type(model).__name__,
        batch=config.deploy_batch,
        table_name=config.latency_table,
        with_break_even=False,
    )


def parts_of(
    found: Iterable[tuple[str, nn.Module]],
    attentions: Collection[str],
    protected: Collection[int],
) -> dict[str, Part]:
    """What the linears of a model that can be converted belong to, by qualified name.

    Args:
        found: Of ``model_structure.candidates``.
        attentions: Qualified names of the attentions among them.
        protected: Of ``model_structure.protected_parts``.
    """
    parts: dict[str, Part] = {}
    for fqn, module in found:
        rule: Rule = "attention_linears" if is_attention(fqn, module, attentions) else "mlp"
        for name, part in linear_parts(module).items():
            if id(part) not in protected:
                parts[f"{fqn}.{name}"] = Part(rule, fqn)
    return parts


def _by_what_it_is(layer: ModelLayer, parts: Mapping[str, Part]) -> ModelLayer:
    """A layer under the rule by which it is converted, whatever its name."""
    if layer.rule == "attention":
        return layer
    return replace(layer, rule=parts[layer.name].rule if layer.name in parts else "other")


def _as_asked(layer: Layer, config: ReparamConfig, parts: Mapping[str, Part]) -> Layer:
    """A layer in the forms alone that the configuration asks for at its place."""
    if layer.rule == "attention":
        rule = config.first_rule(layer.fqn)
        quadratic = (rule.config if rule else config).attention == "quadratic"
        return replace(layer, forms={}, no_form=_QUADRATIC) if quadratic else layer
    if layer.rule not in ("attention_linears", "mlp"):
        return layer
    # The qkv that an add attention will make of a q and a kv is no part of the model yet.
    within = parts[layer.fqn].within if layer.fqn in parts else layer.fqn.rpartition(".")[0]
    rule = config.first_rule(layer.fqn, within)
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

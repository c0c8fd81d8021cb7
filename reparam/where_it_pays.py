"""Which layers of a model pay on a device: the advice that a conversion keeps to if asked."""

from __future__ import annotations

from torch import Tensor, nn

from cost_models.advice import advise
from cost_models.advice_result import Advice
from cost_models.conversion_plan import SHIFT_FORMS, plan
from cost_models.latency_table import LatencyTable
from profiler.model_workloads import layers_of
from reparam.conversion_rules import ReparamConfig


def advice_for(model: nn.Module, config: ReparamConfig, example: Tensor) -> Advice:
    """Decides layer by layer, from a latency table, at the batch that will be deployed.

    Args:
        model: Not yet converted, or in stage 1.
        config: With ``where="pays"``; only the forms that it asks for are considered.
        example: Input of the model; its first image alone counts.

    Raises:
        TableError: If there is no such table.
    """
    table = LatencyTable.load(str(config.latency_table))
    images = example[:1].expand(config.deploy_batch, *example.shape[1:])
    layers = plan(layers_of(model, images), _asked_forms(config), config.alphabet)
    return advise(
        layers,
        table,
        model=type(model).__name__,
        batch=config.deploy_batch,
        table_name=config.latency_table,
        with_break_even=False,
    )


def _asked_forms(config: ReparamConfig) -> tuple[str, ...]:
    asked: set[str] = set()
    for layer in (config, *(rule.config for rule in config.rules)):
        asked |= {layer.attention_linears, layer.mlp}
        if layer.mlp == "moe":
            asked |= set(layer.experts.values())
    return tuple(form for form in SHIFT_FORMS if form in asked) or SHIFT_FORMS


def why_not(advice: Advice, fqn: str) -> str:
    """Why a layer stays, in the words of its decisions."""
    own = [one for one in advice.decisions if one.fqn == fqn]
    found = own or [one for one in advice.decisions if one.fqn.startswith(f"{fqn}.")]
    if not found:
        return "where = pays: no decision covers it"
    return "; ".join(dict.fromkeys(f"{one.verdict}: {one.reason}" for one in found))

"""Any timm model -> the workloads of its layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from profiler.sweep_config import AttentionShape, LinearShape


class ModelError(ValueError):
    """A model that timm does not know or that cannot be read."""


Rule = Literal["attention", "attention_linears", "mlp", "other"]

_ATTENTION_LINEARS = ("qkv", "q", "kv", "proj")
_MLP_LINEARS = ("fc1", "fc2")


@dataclass(frozen=True)
class ModelLayer:
    """One layer of a model and the shape of the product that it computes.

    Attributes:
        name: Qualified name of the module.
        shape: Of a linear its product, of an attention the linear one that can replace it.
        rule: Which rule of a conversion it falls under; ``other`` is never converted.
        keys: Of an attention: tokens that each query attends to, fewer than there are where the
            keys are spatially reduced. None for a linear.
    """

    name: str
    shape: LinearShape | AttentionShape
    rule: Rule = "other"
    keys: int | None = None


def _is_attention(module: nn.Module) -> bool:
    fused = hasattr(module, "qkv") or (hasattr(module, "q") and hasattr(module, "kv"))
    heads = isinstance(getattr(module, "num_heads", None), int)
    # What is linear attention already has its two products in a module of their own.
    return fused and hasattr(module, "proj") and heads and not hasattr(module, "add_products")


def _rule_of(model: nn.Module, layer: str) -> Rule:
    parent, _, leaf = layer.rpartition(".")
    owner = model.get_submodule(parent)
    if leaf in _ATTENTION_LINEARS and hasattr(owner, "num_heads"):
        return "attention_linears"
    if leaf in _MLP_LINEARS and all(hasattr(owner, name) for name in _MLP_LINEARS):
        return "mlp"
    return "other"


def create_model(name: str, pretrained: bool = False, **kwargs: Any) -> Any:
    """A timm model by name.

    Raises:
        ModelError: If timm knows none of that name or refuses the arguments.
    """
    import timm  # over a second that most commands need not spend

    if not timm.is_model(name):
        close = (
            ", ".join(timm.list_models(f"{name.split('_')[0]}*")[:5]) or "see timm.list_models()"
        )
        raise ModelError(f"{name}: timm knows no such model; close: {close}")
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except TypeError as error:
        raise ModelError(f"{name}: {error}") from error


def model_layers(name: str, batch: int) -> list[ModelLayer]:
    """The linears and attentions of a timm model at its own image size, without its weights.

    The classifier is left out: it is never converted.

    Args:
        name: A timm model.
        batch: Images at once.

    Raises:
        ModelError: If timm does not know it or it has no linear at all.
    """
    with torch.device("meta"):
        model = create_model(name).eval()
        example = torch.empty(batch, *model.pretrained_cfg["input_size"])
    layers = layers_of(model, example)
    if not layers:
        raise ModelError(f"{name}: has no linear layer to measure")
    return layers


@torch.no_grad()
def layers_of(model: Any, example: Tensor) -> list[ModelLayer]:
    """The linears and attentions that an input passes through, in order, but for the classifier.

    Args:
        model: Built as timm's are; left in the mode that it was in.
        example: Its input, at the batch in question.
    """
    get_classifier = getattr(model, "get_classifier", None)
    head = get_classifier() if get_classifier else None
    heads = head if isinstance(head, tuple | list) else (head,)
    layers: list[ModelLayer] = []

    def see_linear(layer: str, module: nn.Linear, x: Tensor) -> None:
        m = x.numel() // x.shape[-1]
        shape = LinearShape(m=m, k=module.in_features, n=module.out_features)
        layers.append(ModelLayer(layer, shape, _rule_of(model, layer)))

    def see_attention(layer: str, module: Any, x: Tensor) -> None:
        heads, width = module.num_heads, x.shape[-1]
        b, tokens = x.shape[0] * heads, x.numel() // (x.shape[0] * width)
        bits = width // heads
        shape = AttentionShape(kind="attention", b=b, tokens=tokens, bits=bits, n=bits)
        layers.append(ModelLayer(layer, shape, "attention", tokens))

    def watch(layer: str, module: nn.Module, see: Callable) -> Any:
        return module.register_forward_pre_hook(
            lambda module, inputs: see(layer, module, inputs[0])
        )

    handles = []
    for layer, module in model.named_modules():
        if isinstance(module, nn.Linear) and not any(module is head for head in heads):
            handles.append(watch(layer, module, see_linear))
        elif _is_attention(module):
            handles.append(watch(layer, module, see_attention))
    training = model.training
    try:
        model.eval()(example)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return [_with_reduced_keys(layer, layers, model) for layer in layers]


def _with_reduced_keys(layer: ModelLayer, layers: list[ModelLayer], model: nn.Module) -> ModelLayer:
    """An attention with the number of keys that its own linear for them has seen."""
    seen = next((other for other in layers if other.name == f"{layer.name}.kv"), None)
    if not isinstance(layer.shape, AttentionShape) or seen is None:
        return layer
    heads: Any = model.get_submodule(layer.name).num_heads
    assert isinstance(layer.shape.b, int) and isinstance(seen.shape, LinearShape)
    assert isinstance(seen.shape.m, int)
    return replace(layer, keys=seen.shape.m // (layer.shape.b // heads))

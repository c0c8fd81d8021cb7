"""Any timm model -> the workloads of its layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from profiler.sweep_config import AttentionShape, LinearShape


class ModelError(ValueError):
    """A model that timm does not know or that cannot be read."""


@dataclass(frozen=True)
class ModelLayer:
    """One layer of a model and the shape of the product that it computes."""

    name: str
    shape: LinearShape | AttentionShape


def _is_attention(module: nn.Module) -> bool:
    fused = hasattr(module, "qkv") or (hasattr(module, "q") and hasattr(module, "kv"))
    return fused and hasattr(module, "proj") and isinstance(getattr(module, "num_heads", None), int)


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
    head = model.get_classifier()
    layers: list[ModelLayer] = []

    def see_linear(layer: str, module: nn.Linear, x: Tensor) -> None:
        m = x.numel() // x.shape[-1]
        shape = LinearShape(m=m, k=module.in_features, n=module.out_features)
        layers.append(ModelLayer(layer, shape))

    def see_attention(layer: str, module: Any, x: Tensor) -> None:
        heads, width = module.num_heads, x.shape[-1]
        b, tokens = x.shape[0] * heads, x.numel() // (x.shape[0] * width)
        bits = width // heads
        shape = AttentionShape(kind="attention", b=b, tokens=tokens, bits=bits, n=bits)
        layers.append(ModelLayer(layer, shape))

    def watch(layer: str, module: nn.Module, see: Callable) -> None:
        module.register_forward_pre_hook(lambda module, inputs: see(layer, module, inputs[0]))

    for layer, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            watch(layer, module, see_linear)
        elif _is_attention(module):
            watch(layer, module, see_attention)
    with torch.no_grad():
        model(torch.empty(batch, *model.pretrained_cfg["input_size"], device="meta"))
    if not layers:
        raise ModelError(f"{name}: has no linear layer to measure")
    return layers

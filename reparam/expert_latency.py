"""What a latency table says about a model: of each expert for the router, of each layer in sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cost_models.work import Answer, expert_kernels
from kernels.workload import Workload, attention, linear
from reparam.add_attention import AddAttention, AddProducts
from reparam.form_linear import FormLinear
from reparam.moe import MoEMlp, moe_layers
from reparam.one_pass import watch_pass

# From the surest to the least sure; a sum is as sure as its least sure term.
_SOURCES = ("measured", "predicted", "extrapolated")


class Estimate(Answer, Protocol):
    """What a lookup returns, see ``cost_models.latency_table.Estimate``."""

    @property
    def latency_ms(self) -> float:
        """Latency of the workload."""

    @property
    def source(self) -> str:
        """``measured``, ``predicted`` or ``extrapolated``."""


def set_expert_latencies_(
    model: nn.Module, lookup: Callable[[Workload], Estimate], example: Tensor
) -> dict[str, dict[str, tuple[float, str]]]:
    """Sets ``expert_latency_ms`` of each MoE layer: the sum over an expert's linears.

    Each expert is charged with all tokens of its layer, so that the figures can be compared.

    Args:
        model: With MoE layers.
        lookup: ``LatencyTable.lookup``; raises on a workload that it cannot answer, and then
            nothing is set.
        example: Input of the model at the deployed batch.

    Returns:
        By layer and expert: the latency, and the source of its least sure term.
    """
    shapes = _input_shapes(model, example)
    found: dict[str, dict[str, tuple[float, str]]] = {}
    for fqn, layer in moe_layers(model):
        found[fqn] = {}
        for name, expert in layer.experts.items():
            linears = _linears(expert, _tokens(shapes[fqn][0]))
            kernels = [one for workload in linears for one in expert_kernels(workload, lookup)]
            source = max((estimate.source for _, estimate in kernels), key=_SOURCES.index)
            latency_ms = sum(number * estimate.latency_ms for number, estimate in kernels)
            found[fqn][name] = (latency_ms, source)
    for fqn, layer in moe_layers(model):
        latencies = [latency_ms for latency_ms, _ in found[fqn].values()]
        layer.expert_latency_ms.copy_(torch.tensor(latencies))
    return found


def layer_workloads(
    model: nn.Module,
    example: Tensor,
    expert_tokens: Mapping[str, Mapping[str, int]] | None = None,
) -> dict[str, list[Workload]]:
    """The workloads of each converted layer, to be looked up and summed.

    Args:
        model: Converted model.
        example: Input of the model at the deployed batch.
        expert_tokens: Tokens by MoE layer and expert; None for what the routers make of
            ``example``. An expert without tokens has no workload.

    Returns:
        By qualified name: one workload for a linear, one for both products of an
        attention, the router and the linears of all experts for an MoE layer. A layer that the
        example did not pass through is absent.
    """
    shapes = _input_shapes(model, example)
    workloads: dict[str, list[Workload]] = {}
    for fqn, inputs in shapes.items():
        module = model.get_submodule(fqn)
        if isinstance(module, AddProducts):
            (b, tokens, bits), (_, _, n) = inputs[0], inputs[2]
            workloads[fqn] = [attention(b, tokens, bits, n, module.alphabet).both]
        elif isinstance(module, MoEMlp):
            counts = expert_tokens[fqn] if expert_tokens is not None else _counts(module)
            workloads[fqn] = _linears(module.router, _tokens(inputs[0])) + [
                workload
                for name, tokens in counts.items()
                if tokens
                for workload in _linears(module.experts[name], tokens)
            ]
        else:
            workloads[fqn] = _linears(module, _tokens(inputs[0]))
    return workloads


def undecided(model: nn.Module, example: Tensor) -> dict[str, dict[str, int]]:
    """Expert tokens as the router's loss counts them: every expert with all tokens of its layer."""
    shapes = _input_shapes(model, example)
    return {
        fqn: dict.fromkeys(layer.experts, _tokens(shapes[fqn][0]))
        for fqn, layer in moe_layers(model)
    }


def _linears(module: nn.Module, tokens: int) -> list[Workload]:
    # Plain linears inside a converted layer are deployed on the fp32 mult kernel.
    return [
        linear(getattr(part, "form", "mult_fp32"), tokens, part.in_features, part.out_features)
        for part in module.modules()
        if isinstance(part, FormLinear | nn.Linear)
    ]


def _tokens(shape: torch.Size) -> int:
    return shape[:-1].numel()


def _counts(layer: MoEMlp) -> dict[str, int]:
    if layer.routing is None:
        raise ValueError("the MoE layer has not been run yet")
    return dict(zip(layer.experts, layer.routing.counts.tolist()))


def _input_shapes(model: nn.Module, example: Tensor) -> dict[str, list[torch.Size]]:
    """Shapes of the inputs of each converted layer."""
    inside_moe = tuple(f"{fqn}." for fqn, _ in moe_layers(model))
    inside_attention = tuple(
        f"{fqn}." for fqn, module in model.named_modules() if isinstance(module, AddAttention)
    )

    def is_converted(fqn: str, module: nn.Module) -> bool:
        if fqn.startswith(inside_moe):
            return False
        plain = isinstance(module, nn.Linear) and fqn.startswith(inside_attention)
        return plain or isinstance(module, AddProducts | MoEMlp | FormLinear)

    return input_shapes(model, example, is_converted)


def input_shapes(
    model: nn.Module, example: Tensor, chosen: Callable[[str, nn.Module], bool]
) -> dict[str, list[torch.Size]]:
    """Shapes of the tensors that modules receive in one forward pass in evaluation mode.

    Args:
        model: Left in the mode that it was in.
        example: Its input.
        chosen: ``chosen(fqn, module)``: which modules to look at.

    Returns:
        By qualified name; a module that the example did not pass through is absent.
    """
    shapes: dict[nn.Module, list[torch.Size]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        shapes[module] = [tensor.shape for tensor in args if isinstance(tensor, Tensor)]

    asked = {fqn: part for fqn, part in model.named_modules() if chosen(fqn, part)}
    watch_pass(model, example, dict.fromkeys(asked.values(), note))
    return {fqn: shapes[part] for fqn, part in asked.items() if part in shapes}

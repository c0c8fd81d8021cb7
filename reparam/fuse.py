"""Fuses the blocks of a deployed model: norms, residual sums and layer scales go into kernels.

A block's own ``forward`` is traced with its children as they are, whatever its class: what is
fused is what the trace shows, and a block that cannot be traced stays as it is.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import DropPath, LayerNorm, LayerScale
from torch import fx, nn

from reparam.deployed import (
    DeployedAddAttention,
    DeployedLayerNorm,
    DeployedLinear,
)
from reparam.deployed_mlps import (
    DeployedDepthwiseMlp,
    DeployedMlp,
    DeployedMoE,
)
from reparam.model_structure import replace_

_FUSING = (
    DeployedAddAttention,
    DeployedDepthwiseMlp,
    DeployedLinear,
    DeployedMlp,
    DeployedMoE,
)
_ADDS = (operator.add, operator.iadd, torch.add)
# Not those of images, whose channels come first.
_LAYER_NORMS = (nn.LayerNorm, LayerNorm)
_NOTHING = (nn.Identity, nn.Dropout, DropPath)


class _Children(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return True


def fuse_(model: nn.Module) -> dict[str, str]:
    """Fuses every block of a model that has something to fuse, in place.

    Args:
        model: Deployed, in evaluation mode. Layer norms that went into a kernel are gone then.

    Returns:
        By the qualified name of a block, what was fused; of a layer norm that no kernel took over,
        that it has one of its own.
    """
    done: dict[str, str] = {}
    shared = _shared(model)
    for fqn, block in list(model.named_modules()):
        parts = list(block.children())
        if isinstance(block, _FUSING) or not any(isinstance(part, _FUSING) for part in parts):
            continue
        if not fqn or any(fqn.startswith(f"{outer}.") for outer in done):
            continue
        try:
            graph = _Children().trace(block)
        except Exception:  # whatever its forward does that a trace cannot follow
            continue
        if _looks_at_what_may_be_absent(graph):
            continue
        if fused := _rewritten(block, graph, shared):
            traced = fx.GraphModule(block, graph, type(block).__name__)
            traced.graph.eliminate_dead_code()
            traced.recompile()
            replace_(model, fqn, traced.eval())
            done[fqn] = ", ".join(fused)
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    for fqn, module in list(model.named_modules()) if on_cpu else ():
        if type(module) in _LAYER_NORMS and len(module.normalized_shape) == 1:
            norm = DeployedLayerNorm()
            norm.absorb_norm_(module)
            replace_(model, fqn, norm.eval())
            done[fqn] = "a kernel of its own"
    return done


def _shared(model: nn.Module) -> set[nn.Module]:
    """Modules that lie in more than one other: what one has in front is not what another has."""
    within: dict[nn.Module, nn.Module] = {}
    shared = set()
    for module in model.modules():
        for child in module.children():
            if within.setdefault(child, module) is not module:
                shared.add(child)
    return shared


def _looks_at_what_may_be_absent(graph: fx.Graph) -> bool:
    """Whether an argument that is None by default is used here: a trace has it given, always."""
    return any(
        user.op != "call_module"
        for node in graph.nodes
        if node.op == "placeholder" and node.args == (None,)
        for user in node.users
    )


def _rewritten(block: nn.Module, graph: fx.Graph, shared: set[nn.Module]) -> list[str]:
    """Rewrites a block's graph; returns what was fused."""
    fused: list[str] = []
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")

    def module(node: Any) -> nn.Module | None:
        if isinstance(node, fx.Node) and node.op == "call_module":
            return block.get_submodule(str(node.target))
        return None

    def is_only_here(node: Any) -> bool:
        part = module(node)
        return isinstance(part, _FUSING) and calls[node.target] == 1 and part not in shared

    def fuses(node: Any) -> bool:
        return is_only_here(node) and len(node.users) == 1

    for node in list(graph.nodes):
        part = module(node)
        if isinstance(part, _NOTHING):
            _replace(graph, node, node.args[0])
        elif isinstance(part, LayerScale) and fuses(node.args[0]):
            scaled: Any = module(node.args[0])
            scaled.scale_output_(part.gamma)
            _replace(graph, node, node.args[0])
            fused.append(str(node.target))
    for node in list(graph.nodes):
        part = module(node)
        if isinstance(part, nn.LayerNorm) and len(node.users) == 1:
            (user,) = node.users
            follower: Any = module(user)
            if is_only_here(user) and user.args[0] is node:
                follower.absorb_norm_(part)
                _replace(graph, node, node.args[0])
                fused.append(str(node.target))
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _ADDS and len(node.args) == 2:
            fused += _with_residual(graph, node, fuses)
    return fused


def _with_residual(graph: fx.Graph, node: fx.Node, fuses: Callable[[Any], bool]) -> list[str]:
    order = list(graph.nodes)
    for product, other in (node.args, node.args[::-1]):
        if not (isinstance(product, fx.Node) and isinstance(other, fx.Node) and fuses(product)):
            continue
        if "residual" not in product.kwargs and order.index(other) < order.index(product):
            product.kwargs = {**product.kwargs, "residual": other}
            _replace(graph, node, product)
            return [f"residual of {product.target}"]
    return []


def _replace(graph: fx.Graph, node: fx.Node, by: Any) -> None:
    node.replace_all_uses_with(by)
    graph.erase_node(node)

"""Deployment: a trained model's converted layers on packed weights and TVM kernels."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from kernels.packing import quantise_weight
from reparam.add_attention import AddAttention, AddProducts
from reparam.deployed import (
    DeployedAddAttention,
    DeployedAddProducts,
    DeployedAngular,
    DeployedConv,
    DeployedLinear,
    DeployedQuadraticCore,
)
from reparam.deployed_mlps import (
    DeployedDepthwiseMlp,
    DeployedMlp,
    DeployedMoE,
)
from reparam.form_linear import FormLinear
from reparam.fuse import fuse_
from reparam.hashing import SignHash
from reparam.kept_memory import keep_freed_memory
from reparam.model_structure import does_nothing, is_gelu
from reparam.moe import MoEMlp
from reparam.one_thread import torch_on_one_thread_
from reparam.pointwise import Pointwise
from reparam.quadratic_attention import QuadraticCore

_VECTOR = 16


def deploy(model: nn.Module, fuse: bool = True) -> nn.Module:
    """A copy of a trained model for inference, its converted layers on TVM kernels.

    A plain linear inside a converted layer (around an add attention that stage 2 has not reached)
    runs on our fp32 mult kernel, so that a converted layer holds no product of torch's. With
    ``fuse`` a convolution that makes tokens of patches does so too, and layer norms of tokens are
    ours; other layers stay torch's.

    Args:
        model: As ``reparameterize_`` and training left it; not changed.
        fuse: Whether the layer norms, residual sums and layer scales of its blocks go into the
            kernels too. Without, each layer stands where it stood and can be compared alone.
    """
    if fuse:
        # Before its weights are made, which then lie there too.
        keep_freed_memory()
    deployed = _deployed(copy.deepcopy(model).eval(), fuse, {})
    if fuse:
        fuse_and_prepare_(deployed)
    return deployed


def fuse_and_prepare_(deployed: nn.Module) -> None:
    """Fuses a model whose layers are deployed; torch has one thread while it runs."""
    fuse_(deployed)
    torch_on_one_thread_(deployed)


def _deployed(
    module: nn.Module,
    fuse: bool,
    made: dict[nn.Module, nn.Module],
    inside_converted: bool = False,
) -> nn.Module:
    """What a module becomes; ``made`` keeps it, so that one of several names stays one."""
    if module not in made:
        made[module] = _newly_deployed(module, fuse, made, inside_converted)
    return made[module]


def _newly_deployed(
    module: nn.Module, fuse: bool, made: dict[nn.Module, nn.Module], inside_converted: bool
) -> nn.Module:
    if isinstance(module, FormLinear):
        return DeployedLinear.of(module.export())
    if isinstance(module, AddProducts):
        return DeployedAddProducts(module.alphabet)
    if isinstance(module, QuadraticCore) and module.is_plain:
        return DeployedQuadraticCore(module.alphabet)
    if inside_converted and isinstance(module, nn.Linear):
        return DeployedLinear.of(quantise_weight("mult_fp32", module.weight, module.bias))
    # Not its subclasses, which pad or standardise in ways of their own.
    if fuse and type(module) is nn.Conv2d and _makes_patches(module):
        return _as_linear(module)
    is_moe = isinstance(module, MoEMlp)
    inside_converted = inside_converted or is_moe or isinstance(module, AddAttention)
    # Not named_children, which leaves out second names.
    for name, child in module._modules.items():
        if child is not None and not (is_moe and name == "router"):
            # An expert is seen as part of its MoE alone.
            setattr(module, name, _deployed(child, fuse or is_moe, made, inside_converted))
    module = _in_one(module)
    return _in_one_mlp(module) if fuse else module


def _in_one(module: nn.Module) -> nn.Module:
    """A module whose parts are deployed, in fewer kernels where we know how."""
    if type(module) is AddAttention and module.alphabet == "pm1":
        qkv, proj = module.qkv, module.proj
        plain = (
            isinstance(module.q_norm, nn.Identity)
            and isinstance(module.k_norm, nn.Identity)
            and isinstance(module.hashing, SignHash)
        )
        if plain and isinstance(qkv, DeployedLinear) and isinstance(proj, DeployedLinear):
            conv = module.token_conv.weight.detach().flatten(1).contiguous()
            return DeployedAddAttention(qkv, DeployedAngular(conv, module.alphabet), proj)
    if isinstance(module, MoEMlp):
        gate = module.router.gate
        experts: dict[str, Any] = dict(module.experts.items())
        if _alike(experts.values()):
            return DeployedMoE(gate.weight.detach(), gate.bias.detach(), experts)
    return module


def _alike(experts: Iterable[nn.Module]) -> bool:
    """Whether one operator can dispatch to all: linears, or MLPs of two, of the same sizes."""
    sizes = set()
    for expert in experts:
        parts = [expert] if isinstance(expert, DeployedLinear) else list(expert.children())
        if not isinstance(expert, DeployedLinear | DeployedMlp):
            return False
        sizes.add(tuple((part.in_features, part.out_features) for part in parts))
    return len(sizes) == 1


def _in_one_mlp(module: nn.Module) -> nn.Module:
    parts = dict(module.named_children())
    fc1, fc2, act = parts.pop("fc1", None), parts.pop("fc2", None), parts.pop("act", None)
    of_pixels = isinstance(fc1, Pointwise) and isinstance(fc2, Pointwise)
    if of_pixels:
        fc1, fc2 = (module.get_submodule(f"{name}.linear") for name in ("fc1", "fc2"))
    linears = isinstance(fc1, DeployedLinear | DeployedMoE) and isinstance(
        fc2, DeployedLinear | DeployedMoE
    )
    if not (linears and act is not None and is_gelu(act)):
        return module
    conv = parts.pop("dwconv", None)
    if not does_nothing(parts.values()):
        return module
    if conv is None and isinstance(fc1, DeployedLinear) and isinstance(fc2, DeployedLinear):
        if fc1.out_features != fc2.in_features:
            return module  # a gate takes a part of what the first linear makes
        fc1.activated = True
        return Pointwise(DeployedMlp(fc1, fc2)) if of_pixels else DeployedMlp(fc1, fc2)
    if type(conv) is nn.Conv2d and _is_plain_depthwise(conv) and not of_pixels:
        weight = conv.weight.detach().flatten(1).T.contiguous()
        return DeployedDepthwiseMlp(fc1, fc2, weight, conv.bias.detach())  # type: ignore[arg-type, union-attr]
    return module


def _makes_patches(conv: nn.Conv2d) -> bool:
    """Whether it turns an image into fewer tokens, each of a square window, on the CPU."""
    (side, other), (stride, across) = conv.kernel_size, conv.stride
    return (
        side == other
        and 1 < stride == across
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and isinstance(conv.padding, tuple)
        and conv.padding[0] == conv.padding[1]
        and conv.padding_mode == "zeros"
        and conv.weight.device.type == "cpu"
    )


def _as_linear(conv: nn.Conv2d) -> DeployedConv:
    parameters = quantise_weight("mult_fp32", conv.weight.flatten(1), conv.bias)
    linear = DeployedLinear.of(parameters)
    return DeployedConv(linear, conv.kernel_size[0], conv.stride[0], int(conv.padding[0]))


def _is_plain_depthwise(conv: nn.Conv2d) -> bool:
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and conv.in_channels % _VECTOR == 0
        and conv.kernel_size == (3, 3)
        and conv.stride == conv.dilation == (1, 1)
        and conv.padding == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.bias is not None
    )


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers as they are stored, padding included."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(model))


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()

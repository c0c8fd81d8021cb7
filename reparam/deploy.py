"""Deployment: a trained model's converted layers on packed weights and TVM kernels."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import kernels.torch_ops  # noqa: F401  registers torch.ops.shiftadd
from kernels.packing import LinearParameters, pack_linear, quantise_weight
from reparam.add_attention import AddAttention, AddProducts
from reparam.moe import MoEMlp
from reparam.mult import MultLinear
from reparam.shift import ShiftLinear


class DeployedLinear(nn.Module):
    """A linear on packed weights: fp32 ``(..., k)`` to ``(..., n)`` for any number of tokens."""

    def __init__(self, parameters: LinearParameters) -> None:
        super().__init__()
        self.form = parameters.form
        self.out_features, self.in_features = parameters.values.shape
        packed = pack_linear(parameters)
        self._names = [f"packed_{i}" for i in range(len(packed))]
        for name, tensor in zip(self._names, packed):
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        """One kernel: quantisation, product, scale and bias."""
        packed = [getattr(self, name) for name in self._names]
        return torch.ops.shiftadd.linear(x, packed, self.form, self.out_features)

    def extra_repr(self) -> str:
        """Sizes and form."""
        return f"{self.in_features}, {self.out_features}, form={self.form}"


class DeployedAddProducts(nn.Module):
    """Q(KᵀV) by additions alone in one kernel, which packs the codes itself."""

    def __init__(self, alphabet: str) -> None:
        super().__init__()
        self.alphabet = alphabet

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As ``AddProducts``: q, k ``(b, tokens, bits)``, v ``(b, tokens, n)``."""
        return torch.ops.shiftadd.add_attention(q, k, v, self.alphabet)


class DeployedMoE(nn.Module):
    """Top-1 dispatch: each token passes through one expert, weighted by its probability."""

    def __init__(self, gate: DeployedLinear, experts: dict[str, nn.Module]) -> None:
        super().__init__()
        self.gate = gate
        self.experts = nn.ModuleDict(experts)

    def forward(self, x: Tensor) -> Tensor:
        """fp32 ``(..., dim)`` to ``(..., n)``."""
        tokens = x.reshape(-1, x.shape[-1])
        probability, choice = self.gate(tokens).softmax(dim=-1).max(dim=-1, keepdim=True)
        parts, places = [], []
        for i, expert in enumerate(self.experts.values()):
            index = torch.nonzero(choice[:, 0] == i).squeeze(1)
            if len(index):
                places.append(index)
                parts.append(expert(tokens.index_select(0, index)))
        gathered = torch.cat(parts)
        y = torch.empty_like(gathered).index_copy_(0, torch.cat(places), gathered)
        return (y * probability).reshape(*x.shape[:-1], -1)


def deploy(model: nn.Module) -> nn.Module:
    """A copy of a trained model for inference, its converted layers on TVM kernels.

    A plain linear inside a converted layer (around an add attention that stage 2 has not reached,
    or a router's) runs on our fp32 mult kernel, so that a converted layer holds no product of
    torch's. Other layers stay torch's.

    Args:
        model: As ``reparameterize_`` and training left it; not changed.
    """
    return _deployed(copy.deepcopy(model)).eval()


def _deployed(module: nn.Module, inside_converted: bool = False) -> nn.Module:
    if isinstance(module, ShiftLinear | MultLinear):
        return DeployedLinear(module.export())
    if isinstance(module, AddProducts):
        return DeployedAddProducts(module.alphabet)
    if inside_converted and isinstance(module, nn.Linear):
        return DeployedLinear(quantise_weight("mult_fp32", module.weight, module.bias))
    if isinstance(module, MoEMlp):
        gate = DeployedLinear(
            quantise_weight("mult_fp32", module.router.gate.weight, module.router.gate.bias)
        )
        experts = {name: _deployed(expert, True) for name, expert in module.experts.items()}
        return DeployedMoE(gate, experts)
    inside_converted = inside_converted or isinstance(module, AddAttention)
    for name, child in module.named_children():
        setattr(module, name, _deployed(child, inside_converted))
    return module


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers as they are stored, padding included."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(model))


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()

"""The modules of a deployed model: packed weights as buffers, one kernel a step.

Each can do the layer norm in front of it, add what its block adds to it (``residual``) and take
over a scale of its output; ``reparam.fuse`` sees to that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

import kernels.layer_ops
import kernels.torch_ops  # noqa: F401  both register torch.ops.shiftadd
from kernels.packing import PANEL, LinearParameters, pack_linear
from reparam.by_images import by_images


class Fused(nn.Module):
    """A module behind a layer norm that it may do itself.

    Attributes:
        norm: ``(2k + 1,)``: weight, bias and epsilon of that layer norm; None where it is not done.
    """

    norm: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("norm", None)

    def absorb_norm_(self, norm: nn.LayerNorm) -> None:
        """Does a layer norm of the last dimension from now on."""
        (k,) = norm.normalized_shape
        weight = torch.ones(k) if norm.weight is None else norm.weight.detach()
        bias = torch.zeros(k) if norm.bias is None else norm.bias.detach()
        self.norm = torch.cat((weight, bias, torch.tensor([norm.eps]))).float()

    def normalised(self, x: Tensor) -> Tensor:
        """What the layer norm makes of an input: for comparisons, the kernel does it itself."""
        if self.norm is None:
            return x
        k = x.shape[-1]
        weight, bias, eps = self.norm.split((k, k, 1))
        return nn.functional.layer_norm(x, (k,), weight, bias, float(eps))


class DeployedLinear(Fused):
    """A linear on packed weights: fp32 ``(..., k)`` to ``(..., n)`` for any number of tokens.

    Args:
        form: Name in ``kernels.workload.FORMS``.
        in_features, out_features: k and n.
        packed: Of ``kernels.packing.pack_linear``.
        activated: Whether a GELU follows.
    """

    packed_0: Tensor
    packed_1: Tensor
    packed_2: Tensor

    def __init__(
        self,
        form: str,
        in_features: int,
        out_features: int,
        packed: tuple[Tensor, ...],
        activated: bool = False,
    ) -> None:
        super().__init__()
        self.form, self.in_features, self.out_features = form, in_features, out_features
        self.activated = activated
        self._names = [f"packed_{i}" for i in range(len(packed))]
        for name, tensor in zip(self._names, packed):
            self.register_buffer(name, tensor)

    @classmethod
    def of(cls, parameters: LinearParameters, activated: bool = False) -> DeployedLinear:
        """Packs the parameters of a linear."""
        n, k = parameters.values.shape
        return cls(parameters.form, k, n, pack_linear(parameters), activated)

    @property
    def packed(self) -> list[Tensor]:
        """The weights as the kernel takes them."""
        return [getattr(self, name) for name in self._names]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """One kernel: layer norm, quantisation, product, scale, bias, GELU, residual."""
        return torch.ops.shiftadd.linear(
            x, self.packed, self.form, self.out_features, self.norm, self.activated, residual
        )

    def extra_repr(self) -> str:
        """Sizes, form and what is fused."""
        beside = [
            name
            for name, there in (("layer norm", self.norm is not None), ("gelu", self.activated))
            if there
        ]
        return ", ".join([f"{self.in_features}, {self.out_features}, form={self.form}", *beside])

    def scale_output_(self, gamma: Tensor) -> None:
        """Multiplies the output by ``gamma`` ``(n,)`` from now on: in the scale, or the weights."""
        if self.activated:
            raise ValueError("a GELU lies in between")
        n = self.out_features
        padded = nn.functional.pad(gamma.detach().float(), (0, -n % PANEL), value=1.0)
        if len(self._names) == 2:
            panels = self.packed_0
            group = panels.shape[-1] // PANEL
            rows = padded.view(-1, 1, PANEL).repeat_interleave(group, dim=-1)
            if panels.dtype == torch.int16:
                scaled = (panels.view(torch.bfloat16).float() * rows).bfloat16().view(torch.int16)
                self.packed_0 = scaled
            else:
                self.packed_0 = panels * rows
            self.packed_1 = self.packed_1 * padded
        else:
            self.packed_1, self.packed_2 = self.packed_1 * padded, self.packed_2 * padded


class DeployedLayerNorm(Fused):
    """A layer norm that no kernel behind it does: of a stage, or in front of a sum."""

    def forward(self, x: Tensor) -> Tensor:
        """``(..., k)`` to the same."""
        return torch.ops.shiftadd.layer_norm(x, self.norm)


class DeployedConv(nn.Module):
    """A convolution of images: its windows as rows, and a linear.

    Args:
        linear: On windows of ``channels * side²`` values.
        side, stride, padding: In both directions.
    """

    def __init__(self, linear: DeployedLinear, side: int, stride: int, padding: int) -> None:
        super().__init__()
        self.linear, self.side, self.stride, self.padding = linear, side, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """``(b, channels, h, w)`` to ``(b, n, rows, columns)``, the channels last in memory."""

        def some(x: Tensor, _: Tensor | None) -> Tensor:
            rows = torch.ops.shiftadd.patches(x, self.side, self.stride, self.padding)
            out: Tensor = self.linear(rows)
            return out

        windows = math.prod(x.shape[1:]) * self.side**2 // self.stride**2
        return by_images(some, windows, x).permute(0, 3, 1, 2)

    def extra_repr(self) -> str:
        """The window."""
        return f"side={self.side}, stride={self.stride}, padding={self.padding}"


class DeployedAddProducts(nn.Module):
    """Q(KᵀV) by additions alone in one kernel, which packs the codes itself."""

    def __init__(self, alphabet: str) -> None:
        super().__init__()
        self.alphabet = alphabet

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As ``AddProducts``: q, k ``(b, tokens, bits)``, v ``(b, tokens, n)``."""
        return torch.ops.shiftadd.add_attention(q, k, v, self.alphabet)


class DeployedAngular(nn.Module):
    """All of an add attention between its projections, in one kernel.

    Args:
        conv: Of the values along the tokens, ``(heads, window)``.
        alphabet: ``pm1``; the codes are the signs of the queries and keys themselves.
    """

    conv: Tensor

    def __init__(self, conv: Tensor, alphabet: str) -> None:
        super().__init__()
        self.alphabet = alphabet
        self.register_buffer("conv", conv)

    def forward(self, qkv: Tensor) -> Tensor:
        """``(b, tokens, 3 * dim)`` to ``(b, tokens, dim)``."""
        return torch.ops.shiftadd.angular_attention(qkv, self.conv, self.alphabet)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values ``(b * heads, tokens, head_dim)``, for comparisons."""
        b, tokens, width = qkv.shape
        heads = self.conv.shape[0]
        parts = qkv.view(b, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
        q, k, v = (part.flatten(0, 1) for part in parts)
        return q, k, v


class DeployedAddAttention(nn.Module):
    """An add attention in three kernels: its inputs, what lies between, the projection."""

    def __init__(
        self, qkv: DeployedLinear, add_products: DeployedAngular, proj: DeployedLinear
    ) -> None:
        super().__init__()
        self.qkv, self.add_products, self.proj = qkv, add_products, proj

    def forward(
        self,
        x: Tensor,
        feat_size: object = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        residual: Tensor | None = None,
    ) -> Tensor:
        """``(b, tokens, dim)`` to the same; there can be no mask."""
        if attn_mask is not None or is_causal:
            raise ValueError("attn_mask: linear attention with codes cannot be masked")

        def some(x: Tensor, residual: Tensor | None) -> Tensor:
            out: Tensor = self.proj(self.add_products(self.qkv(x)), residual)
            return out

        return by_images(some, x.shape[1] * self.qkv.out_features, x, residual)

    def absorb_norm_(self, norm: nn.LayerNorm) -> None:
        """Does a layer norm in front from now on."""
        self.qkv.absorb_norm_(norm)

    def scale_output_(self, gamma: Tensor) -> None:
        """Multiplies the output by ``gamma`` from now on."""
        self.proj.scale_output_(gamma)


class DeployedMlp(nn.Module):
    """Two linears with a GELU between them, in two kernels."""

    def __init__(self, fc1: DeployedLinear, fc2: DeployedLinear) -> None:
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``(..., k)`` to ``(..., n)``."""
        return self.fc2(self.fc1(x), residual)

    def absorb_norm_(self, norm: nn.LayerNorm) -> None:
        """Does a layer norm in front from now on."""
        self.fc1.absorb_norm_(norm)

    def scale_output_(self, gamma: Tensor) -> None:
        """Multiplies the output by ``gamma`` from now on."""
        self.fc2.scale_output_(gamma)


class DeployedMoE(Fused):
    """Top-1 dispatch: each token passes through one expert, weighted by its probability.

    Args:
        gate, gate_bias: Of the router, ``(experts, k)`` and ``(experts,)``.
        experts: All of the same sizes.

    Attributes:
        by_steps: Whether each expert is called as the module that it is, to be looked at.
    """

    gate: Tensor
    gate_bias: Tensor

    def __init__(
        self, gate: Tensor, gate_bias: Tensor, experts: Mapping[str, DeployedMlp | DeployedLinear]
    ) -> None:
        super().__init__()
        self.register_buffer("gate", gate)
        self.register_buffer("gate_bias", gate_bias)
        self.experts = nn.ModuleDict(experts)
        self.by_steps = False

    @property
    def _experts(self) -> list[DeployedMlp | DeployedLinear]:
        found = self.experts.values()
        return [part for part in found if isinstance(part, DeployedMlp | DeployedLinear)]

    @property
    def linears(self) -> list[DeployedLinear]:
        """Of all experts, those of the first one first."""
        return [part for part in self.experts.modules() if isinstance(part, DeployedLinear)]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``(..., k)`` to ``(..., n)``."""
        if self.by_steps:
            return self._by_steps(x, residual)
        linears = self.linears
        own = linears[: len(linears) // len(self.experts)]
        return torch.ops.shiftadd.moe(
            x,
            self.norm,
            self.gate,
            self.gate_bias,
            [tensor for linear in linears for tensor in linear.packed],
            [len(linear.packed) for linear in linears],
            [linear.form for linear in linears],
            [own[0].in_features, *(linear.out_features for linear in own)],
            own[0].activated,
            residual,
        )

    def _by_steps(self, x: Tensor, residual: Tensor | None) -> Tensor:
        tokens = x.flatten(0, -2)
        route = torch.ops.shiftadd.route(tokens, self.norm, self.gate, self.gate_bias)
        rows, probability, counts = route
        parts = [
            expert(tokens[index.long()])
            for expert, index in zip(self.experts.values(), rows.split(counts.tolist()))
            if len(index)
        ]
        y = torch.cat(parts) * probability[:, None]
        out = torch.empty_like(y).index_copy_(0, rows.long(), y).view(*x.shape[:-1], -1)
        return out if residual is None else out + residual

    def absorb_norm_(self, norm: nn.LayerNorm) -> None:
        """Does a layer norm in front from now on; so do the experts, when they stand alone."""
        super().absorb_norm_(norm)
        for expert in self._experts:
            expert.absorb_norm_(norm)

    def scale_output_(self, gamma: Tensor) -> None:
        """Multiplies the output by ``gamma`` from now on."""
        for expert in self._experts:
            expert.scale_output_(gamma)


class DeployedDepthwiseMlp(nn.Module):
    """PVT v2's MLP: a linear, a depthwise 3 × 3 convolution with GELU, a linear; three kernels.

    Args:
        fc1, fc2: Linears or MoEs of linears.
        weight: Of the convolution, ``(9, hidden)``.
        bias: ``(hidden,)``.
    """

    weight: Tensor
    bias: Tensor

    def __init__(
        self,
        fc1: DeployedLinear | DeployedMoE,
        fc2: DeployedLinear | DeployedMoE,
        weight: Tensor,
        bias: Tensor,
    ) -> None:
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(
        self, x: Tensor, feat_size: tuple[int, int], residual: Tensor | None = None
    ) -> Tensor:
        """``(b, height * width, k)`` to ``(b, height * width, n)``."""

        def some(x: Tensor, residual: Tensor | None) -> Tensor:
            hidden = torch.ops.shiftadd.depthwise_gelu(
                self.fc1(x), self.weight, self.bias, feat_size[0], True
            )
            out: Tensor = self.fc2(hidden, residual)
            return out

        return by_images(some, x.shape[1] * len(self.bias), x, residual)

    def absorb_norm_(self, norm: nn.LayerNorm) -> None:
        """Does a layer norm in front from now on."""
        self.fc1.absorb_norm_(norm)

    def scale_output_(self, gamma: Tensor) -> None:
        """Multiplies the output by ``gamma`` from now on."""
        self.fc2.scale_output_(gamma)

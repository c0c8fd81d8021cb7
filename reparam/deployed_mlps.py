"""The MLPs of a deployed model: two linears, mixtures of experts, PVT v2's with a convolution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from kernels.forms import quantises
from reparam.by_images import by_images
from reparam.deployed import DeployedLinear, Fused, has_shape


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
        linears: Of all experts, those of the first one first.
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
        # Walking through the modules at each call takes longer than a small layer's kernels.
        self.linears = [part for part in self.experts.modules() if isinstance(part, DeployedLinear)]

    @property
    def _experts(self) -> list[DeployedMlp | DeployedLinear]:
        found = self.experts.values()
        return [part for part in found if isinstance(part, DeployedMlp | DeployedLinear)]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``(..., k)`` to ``(..., n)``."""
        if residual is not None and not has_shape(residual, x, self.linears[-1].out_features):
            return self.forward(x) + residual
        if self.by_steps:
            return self._by_steps(x, residual)
        linears, buffers = self.linears, self._buffers
        own = linears[: len(linears) // len(self.experts)]
        return torch.ops.shiftadd.moe(
            x,
            buffers["norm"],
            buffers["gate"],
            buffers["gate_bias"],
            *_weights(linears),
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


def _weights(linears: Sequence[DeployedLinear]) -> tuple[list[Tensor], list[int], list[str]]:
    """As an operator takes those of several linears: all tensors, how many of each, the forms."""
    packed = [linear.packed for linear in linears]
    tensors = [tensor for own in packed for tensor in own]
    return tensors, [len(own) for own in packed], [linear.form for linear in linears]


def _linears_of(layer: DeployedLinear | DeployedMoE) -> list[DeployedLinear]:
    return layer.linears if isinstance(layer, DeployedMoE) else [layer]


class DeployedDepthwiseMlp(nn.Module):
    """PVT v2's MLP: a linear, a depthwise 3 × 3 convolution with GELU, a linear; three kernels.

    Where the second linear, or all of its experts, quantise what they read, the convolution writes
    the codes itself; not while someone looks at what goes into it.

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

    @property
    def _between_are_codes(self) -> bool:
        fc2 = self.fc2
        if fc2.norm is not None or fc2._forward_pre_hooks or fc2._forward_hooks:
            return False
        if isinstance(fc2, DeployedMoE) and (fc2.by_steps or len(fc2.linears) > len(fc2.experts)):
            return False
        linears = _linears_of(fc2)
        quantise = all(quantises(linear.form) for linear in linears)
        return quantise and not linears[0].activated

    def forward(
        self, x: Tensor, feat_size: tuple[int, int], residual: Tensor | None = None
    ) -> Tensor:
        """``(b, height * width, k)`` to ``(b, height * width, n)``."""

        def some(x: Tensor, residual: Tensor | None) -> Tensor:
            conv = (self.fc1(x), self.weight, self.bias, feat_size[0])
            if not self._between_are_codes:
                out: Tensor = self.fc2(torch.ops.shiftadd.depthwise_gelu(*conv, True), residual)
                return out
            linears = _linears_of(self.fc2)
            if residual is not None and not has_shape(residual, x, linears[0].out_features):
                return some(x, None) + residual
            moe = self.fc2 if isinstance(self.fc2, DeployedMoE) else None
            router = (moe.gate, moe.gate_bias) if moe else (None, None)
            return torch.ops.shiftadd.depthwise_linear(
                *conv,
                *router,
                *_weights(linears),
                linears[0].out_features,
                residual,
            )

        return by_images(some, x.shape[1] * len(self.bias), x, residual)

    def absorb_norm_(self, norm: nn.LayerNorm) -> None:
        """Does a layer norm in front from now on."""
        self.fc1.absorb_norm_(norm)

    def scale_output_(self, gamma: Tensor) -> None:
        """Multiplies the output by ``gamma`` from now on."""
        self.fc2.scale_output_(gamma)

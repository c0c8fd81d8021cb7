"""The MLPs of a deployed model: two linears, mixtures of experts, PVT v2's with a convolution."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from kernels import expert_ops, layer_ops
from kernels.forms import quantises
from reparam.by_images import by_images
from reparam.deployed import DeployedLinear, Fused, has_shape


class _InOneKernel:
    """What one kernel takes of several linears.

    Found where nn.Module keeps it: its own way there, for each of them, takes longer than a router.

    Args:
        linears: Of all experts, those of the first one first.
        experts: How many.
        within: All modules that are not called.

    Attributes:
        forms: Of the linears.
        sizes: k and n of each of an expert's linears, in turn.
        gelu: Whether there is one behind the first.
    """

    def __init__(
        self, linears: Sequence[DeployedLinear], experts: int, within: Iterable[nn.Module]
    ) -> None:
        own = linears[: len(linears) // experts]
        self.forms = tuple(linear.form for linear in linears)
        self.sizes = (own[0].in_features, *(linear.out_features for linear in own))
        self.gelu = own[0].activated
        self._linears = linears
        self._kept = [(linear._buffers, name) for linear in linears for name in linear._names]
        self._hooks = [
            hooks for part in within for hooks in (part._forward_pre_hooks, part._forward_hooks)
        ]

    @property
    def packed(self) -> list[Tensor]:
        """The weights of all linears."""
        if torch.compiler.is_compiling():
            return [tensor for linear in self._linears for tensor in linear.packed]
        return [buffers[name] for buffers, name in self._kept]  # type: ignore[misc]

    @property
    def is_looked_at(self) -> bool:
        """Whether someone wants to see what goes into a module, or comes out."""
        return any(self._hooks)


class DeployedMlp(nn.Module):
    """Two linears with a GELU between them, in one kernel on the CPU."""

    def __init__(self, fc1: DeployedLinear, fc2: DeployedLinear) -> None:
        super().__init__()
        self.fc1, self.fc2 = fc1, fc2
        self._kernel = _InOneKernel([fc1, fc2], 1, [fc1, fc2])

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``(..., k)`` to ``(..., n)``."""
        kernel = self._kernel
        if residual is not None and not has_shape(residual, x, kernel.sizes[-1]):
            return self.forward(x) + residual
        if x.device.type != "cpu" or kernel.is_looked_at:
            out: Tensor = self.fc2(self.fc1(x), residual)
            return out
        norm = self.fc1._buffers["norm"]
        weights = (kernel.packed, kernel.forms, kernel.sizes)
        return expert_ops.moe(x, norm, None, None, *weights, kernel.gelu, residual)

    def absorb_norm_(self, norm: nn.LayerNorm) -> None:
        """Does a layer norm in front from now on."""
        self.fc1.absorb_norm_(norm)

    def scale_output_(self, gamma: Tensor) -> None:
        """Multiplies the output by ``gamma`` from now on."""
        self.fc2.scale_output_(gamma)


class DeployedMoE(Fused):
    """Top-1 dispatch: each token passes through one expert, weighted by its probability.

    All in one kernel; while someone looks at an expert, each is called as the module that it is.

    Args:
        gate, gate_bias: Of the router, ``(experts, k)`` and ``(experts,)``.
        experts: All of the same sizes.

    Attributes:
        linears: Of all experts, those of the first one first.
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
        within = list(self.experts.modules())
        self.linears = [part for part in within if isinstance(part, DeployedLinear)]
        self._kernel = _InOneKernel(self.linears, len(experts), within)

    @property
    def is_looked_at(self) -> bool:
        """Whether someone looks at an expert, so that they are called one by one."""
        return self._kernel.is_looked_at

    @property
    def _experts(self) -> list[DeployedMlp | DeployedLinear]:
        found = self.experts.values()
        return [part for part in found if isinstance(part, DeployedMlp | DeployedLinear)]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """``(..., k)`` to ``(..., n)``."""
        kernel, buffers = self._kernel, self._buffers
        if residual is not None and not has_shape(residual, x, kernel.sizes[-1]):
            return self.forward(x) + residual
        if kernel.is_looked_at:
            return self._by_steps(x, residual)
        router = (buffers["norm"], buffers["gate"], buffers["gate_bias"])
        weights = (kernel.packed, kernel.forms, kernel.sizes)
        return expert_ops.moe(x, *router, *weights, kernel.gelu, residual)

    def _by_steps(self, x: Tensor, residual: Tensor | None) -> Tensor:
        tokens = x.flatten(0, -2)
        route = expert_ops.route(tokens, self.norm, self.gate, self.gate_bias)
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
    """PVT v2's MLP: a linear, a depthwise 3 × 3 convolution with GELU, a linear.

    Where the second linear, or all of its experts, quantise what they read, it is one kernel with
    the convolution; not while someone looks at what goes into it.

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

        linears = fc2.linears if isinstance(fc2, DeployedMoE) else [fc2]
        self._behind = _InOneKernel(linears, len(linears), fc2.modules())
        self._can_be_one = (
            all(quantises(linear.form) for linear in linears)
            and not self._behind.gelu
            and len(linears) == (len(fc2.experts) if isinstance(fc2, DeployedMoE) else 1)
        )

    def forward(
        self, x: Tensor, feat_size: tuple[int, int], residual: Tensor | None = None
    ) -> Tensor:
        """``(b, height * width, k)`` to ``(b, height * width, n)``."""
        fc2, behind = self.fc2, self._behind
        in_one = self._can_be_one and fc2.norm is None and not behind.is_looked_at
        router = (fc2.gate, fc2.gate_bias) if isinstance(fc2, DeployedMoE) else (None, None)

        def some(x: Tensor, residual: Tensor | None) -> Tensor:
            conv = (self.fc1(x), self.weight, self.bias, feat_size[0])
            if not in_one:
                out: Tensor = fc2(layer_ops.depthwise_gelu(*conv, True), residual)
                return out
            n = behind.sizes[-1]
            if residual is not None and not has_shape(residual, x, n):
                return some(x, None) + residual
            weights = (behind.packed, behind.forms, n)
            return expert_ops.depthwise_moe(*conv, *router, *weights, residual)

        return by_images(some, x.shape[1] * len(self.bias), x, residual)

    def absorb_norm_(self, norm: nn.LayerNorm) -> None:
        """Does a layer norm in front from now on."""
        self.fc1.absorb_norm_(norm)

    def scale_output_(self, gamma: Tensor) -> None:
        """Multiplies the output by ``gamma`` from now on."""
        self.fc2.scale_output_(gamma)

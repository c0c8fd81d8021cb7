"""The modules of a deployed model: packed weights as buffers, one kernel a step.

Each can do the layer norm in front of it, add what its block adds to it (``residual``) and take
over a scale of its output; ``reparam.fuse`` sees to that.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kernels import layer_ops, torch_ops
from kernels.packing import PANEL, LinearParameters, pack_linear
from reparam.by_images import by_images
from reparam.quadratic_attention import QuadraticCore


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


def has_shape(residual: Tensor, x: Tensor, n: int) -> bool:
    """Whether there is a value for each output, so that a kernel can add it; else torch does."""
    return residual.shape == (*x.shape[:-1], n)


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
        # Where nn.Module keeps them: its own way there takes as long as a small kernel's launch.
        buffers = self._buffers
        return [buffers[name] for name in self._names]  # type: ignore[misc]

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """One kernel: layer norm, quantisation, product, scale, bias, GELU, residual."""
        if residual is not None and not has_shape(residual, x, self.out_features):
            return self.forward(x) + residual
        norm = self._buffers["norm"]
        return torch_ops.linear(
            x, self.packed, self.form, self.out_features, norm, self.activated, residual
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

    @property
    def weight(self) -> Tensor:
        """As a layer norm has it, for models that look at it."""
        assert self.norm is not None
        return self.norm[: len(self.norm) // 2]

    def forward(self, x: Tensor) -> Tensor:
        """``(..., k)`` to the same."""
        return layer_ops.layer_norm(x, self.norm)


class DeployedConv(nn.Module):
    """A convolution of images: its windows as rows, and a linear.

    Args:
        linear: On windows of ``channels * side²`` values.
        side, stride, padding: In both directions.
    """

    def __init__(self, linear: DeployedLinear, side: int, stride: int, padding: int) -> None:
        super().__init__()
        self.linear, self.side, self.stride, self.padding = linear, side, stride, padding
        # As a convolution has it, for models that look at it.
        self.kernel_size = (side, side)

    def forward(self, x: Tensor) -> Tensor:
        """``(b, channels, h, w)`` to ``(b, n, rows, columns)``, the channels last in memory."""

        def some(x: Tensor, _: Tensor | None) -> Tensor:
            rows = layer_ops.patches(x, self.side, self.stride, self.padding)
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
        return torch_ops.add_attention(q, k, v, self.alphabet)


class DeployedQuadraticCore(QuadraticCore):
    """Quadratic attention on the signs of queries and keys in one kernel, which packs the codes."""

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        scores = layer_ops.code_scores(_of_heads(q), _of_heads(k), self.alphabet)
        return scores.view(*q.shape[:-1], k.shape[-2])

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout_p: float
    ) -> Tensor:
        """Without dropout, which a deployed model has none of."""
        if bias is not None:
            bias = _of_heads(bias.expand(*q.shape[:-1], k.shape[-2]))
        heads = map(_of_heads, (q, k, v))
        out = layer_ops.code_attention(*heads, bias, self.alphabet, scale)
        return out if q.dim() == 4 else out.reshape(*q.shape[:-1], v.shape[-1])


def _of_heads(x: Tensor) -> Tensor:
    """``(..., rows, columns)`` as ``(images, heads, rows, columns)``."""
    return x if x.dim() == 4 else x.reshape(-1, 1, *x.shape[-2:])


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
        return layer_ops.angular_attention(qkv, self.conv, self.alphabet)

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

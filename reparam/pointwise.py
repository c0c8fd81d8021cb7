"""1×1 convolutions as what they are: a linear of the channels of each pixel."""

from __future__ import annotations

import copy
from typing import TypeGuard

from torch import Tensor, nn


class Pointwise(nn.Module):
    """Does to the channels of each pixel what a linear does to the features of a token.

    Args:
        linear: Any module that takes ``(..., k)`` to ``(..., n)``.
    """

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        """``(b, k, h, w)`` to ``(b, n, h, w)``, whose channels are last in memory."""
        out: Tensor = self.linear(x.permute(0, 2, 3, 1))
        return out.permute(0, 3, 1, 2)


def is_pointwise(module: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Whether a module is a convolution that looks at each pixel alone, and at all channels.

    Not its subclasses, which pad or standardise in ways of their own.
    """
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == module.stride == (1, 1)
        and module.groups == 1
        and module.padding in ((0, 0), "same", "valid")
    )


def as_linear(conv: nn.Conv2d) -> nn.Linear:
    """The linear of a pointwise convolution: a copy of its weights."""
    with_bias, weight = conv.bias is not None, conv.weight
    made = nn.Linear(conv.in_channels, conv.out_channels, with_bias, weight.device, weight.dtype)
    made.weight.data.copy_(weight.data.flatten(1))
    if conv.bias is not None:
        made.bias.data.copy_(conv.bias.data)
    return made.train(conv.training)


def mlp_of_tokens(mlp: nn.Module) -> nn.Module:
    """An MLP with linears in place of pointwise ``fc1`` and ``fc2``; any other as it is."""
    parts = {name: getattr(mlp, name, None) for name in ("fc1", "fc2")}
    linears = {n: as_linear(part) for n, part in parts.items() if is_pointwise(part)}
    if len(linears) < len(parts):
        return mlp
    # The convolutions themselves are not copied: they stay the model's.
    made = copy.copy(mlp)
    made._modules = {**mlp._modules, **linears}
    return made

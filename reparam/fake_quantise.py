"""Fake quantisation: training computes what the deployed kernels compute, and still learns.

Codes and scales are those of ``kernels.packing``. Rounding has no useful gradient, so the backward
pass acts as if it were not there (straight-through estimator).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.forms import FORMS
from kernels.packing import LinearParameters, quantise_rows


class _StraightThrough(torch.autograd.Function):
    # surrogate + (value - surrogate).detach() would round: forward has to be exactly the codes.
    @staticmethod
    def forward(ctx: Any, surrogate: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def straight_through(surrogate: Tensor, value: Tensor) -> Tensor:
    """Returns ``value``; in the backward pass it is ``surrogate`` that receives the gradient.

    Args:
        surrogate: What ``value`` stands in for, same shape.
        value: The result of the forward pass, bit for bit.

    Source:
        Bengio et al., arXiv 1308.3432.
    """
    return _StraightThrough.apply(surrogate, value)


def coded(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """Codes that pass their gradient on to what they encode, the scale held constant.

    Args:
        x: ``(..., k)``, about ``codes * scale``.
        codes: ``(..., k)``.
        scale: ``(..., 1)``; where it is 0 (a row of zeros in int8) no gradient flows.

    Returns:
        The codes, ``(..., k)``.
    """
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    return straight_through(x * inverse, codes)


def as_bf16(x: Tensor) -> Tensor:
    """Rounds to bf16, kept in fp32; the gradient passes unrounded."""
    return straight_through(x, x.detach().bfloat16().float())


def exported(form: str, values: Tensor, scale: Tensor, bias: Tensor | None) -> LinearParameters:
    """Copies of a linear's parameters, without gradients, as the kernels take them."""
    values, scale = values.detach().clone(), scale.detach().clone()
    bias = torch.zeros_like(scale) if bias is None else bias.detach().clone()
    return LinearParameters(form, values, scale, bias)


def linear_as_deployed(
    form: str, x: Tensor, values: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """Computes a linear as the kernel of its form does, in the same order of operations.

    For the int8 forms ``(codes · valuesᵀ) · (x_scale · scale) + bias``. The sum over whole numbers
    is exact in fp32 up to 2^24, as the kernel's is in int32. The bf16 forms round x first; the
    product of two bf16 numbers is exact in fp32.

    Args:
        form: A linear form in ``kernels.workload.FORMS``.
        x: fp32 ``(..., k)``.
        values: fp32 ``(n, k)``, see ``kernels.packing.LinearParameters``.
        scale: fp32 ``(n,)``.
        bias: fp32 ``(n,)`` or None.

    Returns:
        fp32 ``(..., n)``.
    """
    fused = FORMS[form]["fused"]
    if "cast" in fused:
        x = as_bf16(x)
    if "scale" not in fused:
        return F.linear(x, values, bias)
    if "quantise" in fused:
        codes, x_scale = quantise_rows(x.detach())
        y = F.linear(coded(x, codes, x_scale), values) * (x_scale * scale)
    else:
        y = F.linear(x, values) * scale
    return y if bias is None else y + bias


def check_form(form: str, supported: tuple[str, ...]) -> None:
    """Refuses a form that a layer cannot take.

    Raises:
        ValueError: Naming the forms that it can take.
    """
    if form not in supported:
        raise ValueError(f"form: {form!r} is not one of {', '.join(supported)}")

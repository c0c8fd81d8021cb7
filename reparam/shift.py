"""ShiftLinear: a linear whose weights are signed powers of two, one scale per output channel."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from kernels.forms import FORMS
from kernels.packing import nearest_pow2
from reparam.fake_quantise import coded, straight_through
from reparam.form_linear import FormLinear, copied

SHIFT_FORMS = tuple(name for name, form in FORMS.items() if form["primitive"] == "shift")

ShiftVariant = Literal["Q", "PS"]


def exponent_range(form: str, bits: int | None = None) -> tuple[int, int]:
    """Smallest and largest p of a weight ±2^p.

    Args:
        form: A shift form.
        bits: As in ``ShiftLinear``.

    Raises:
        ValueError: Unless bits are 3 to 8.
    """
    if bits is not None and not 3 <= bits <= 8:
        raise ValueError(f"bits: {bits!r} is not from 3 to 8")
    low, high = FORMS[form]["exponent_min"], FORMS[form]["exponent_max"]
    return (low if bits is None else max(low, high + 1 - 2 ** (bits - 1))), high


class ShiftLinear(FormLinear):
    """Linear with ``W = ±2^p · scale``, trained so that it can be exported without loss.

    Variant Q keeps a float weight and rounds it on the fly. Variant PS learns the exponent ``s``
    and the sign ``g`` themselves: ``W = 2^round(s) · sign(g) · scale`` with a fixed scale. Zero is
    no power of two, hence sign(0) = +1 and DeepShift's third sign value is not used.

    Args:
        weight: ``(n, k)`` to start from; copied.
        bias: ``(n,)`` or None; copied.
        form: One of ``SHIFT_FORMS``, which says the range of p and the type of the activations.
        variant: ``Q`` or ``PS``.
        bits: Bits of a weight, 3 to 8: a sign and the others for p. They narrow the range of p;
            where the form's own is narrower, that remains. None for the form's own.

    Raises:
        ValueError: On another form, variant or number of bits.

    Source:
        DeepShift, arXiv 1905.13298; the scale per channel is ours.
    """

    FORMS = SHIFT_FORMS

    weight: nn.Parameter
    exponent: nn.Parameter
    sign: nn.Parameter
    scale: Tensor

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        form: str,
        variant: ShiftVariant = "Q",
        bits: int | None = None,
    ) -> None:
        super().__init__(weight, form)
        if variant not in ("Q", "PS"):
            raise ValueError(f"variant: {variant!r} is not one of Q, PS")
        self.variant = variant
        self.exponent_min, self.exponent_max = exponent_range(form, bits)
        weight = weight.detach().clone()
        if variant == "Q":
            self.weight = nn.Parameter(weight)
        else:
            values, scale = nearest_pow2(weight, self.exponent_min, self.exponent_max)
            self.exponent = nn.Parameter(torch.log2(values.abs()))
            self.sign = nn.Parameter(torch.sign(values))
            self.register_buffer("scale", scale)
        self.bias = copied(bias)

    def values_and_scale(self) -> tuple[Tensor, Tensor]:
        """The weight as values ±2^p ``(n, k)``, with gradient, and scale ``(n,)``."""
        if self.variant == "Q":
            values, scale = nearest_pow2(self.weight.detach(), self.exponent_min, self.exponent_max)
            return coded(self.weight, values, scale[:, None]), scale
        whole = self.exponent.detach().clamp(self.exponent_min, self.exponent_max).round()
        sign = torch.where(self.sign.detach() < 0, -1.0, 1.0)
        magnitude = torch.exp2(straight_through(self.exponent, whole))
        return magnitude * straight_through(self.sign, sign), self.scale

    def extra_repr(self) -> str:
        """Sizes, form, variant and range of the exponent."""
        exponents = f"p={self.exponent_min}..{self.exponent_max}"
        return f"{super().extra_repr()}, variant={self.variant}, {exponents}"

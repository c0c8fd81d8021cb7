"""MultLinear: a linear that multiplies, in whole numbers or not: what a shift is compared with."""

from __future__ import annotations

from torch import Tensor, nn

from kernels.packing import WHOLE_WEIGHTS, quantise_channels
from reparam.fake_quantise import as_bf16, coded
from reparam.form_linear import FormLinear, copied

MULT_FORMS = ("mult_fp32", "mult_bf16", "mult_int8", "mult_int7")


class MultLinear(FormLinear):
    """Linear of a mult form; in whole numbers, weights per channel and activations per row.

    Args:
        weight: ``(n, k)`` to start from; copied.
        bias: ``(n,)`` or None; copied.
        form: One of ``MULT_FORMS``.
    """

    FORMS = MULT_FORMS

    def __init__(self, weight: Tensor, bias: Tensor | None, form: str) -> None:
        super().__init__(weight, form)
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = copied(bias)

    def values_and_scale(self) -> tuple[Tensor, Tensor]:
        """The weight as values ``(n, k)``, with gradient, and scale ``(n,)``."""
        if self.form not in WHOLE_WEIGHTS:
            weight = self.weight if self.form == "mult_fp32" else as_bf16(self.weight)
            return weight, weight.new_ones(self.out_features)
        codes, scale = quantise_channels(self.weight.detach(), WHOLE_WEIGHTS[self.form])
        return coded(self.weight, codes, scale[:, None]), scale

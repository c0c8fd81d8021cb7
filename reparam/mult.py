"""MultLinear: a linear that multiplies, in whole numbers or not: what a shift is compared with."""

from __future__ import annotations

from torch import Tensor, nn

from kernels.packing import WHOLE_WEIGHTS, LinearParameters, quantise_channels
from reparam.fake_quantise import as_bf16, check_form, coded, exported, linear_as_deployed

MULT_FORMS = ("mult_fp32", "mult_bf16", "mult_int8", "mult_int7")


class MultLinear(nn.Module):
    """Linear of a mult form; in whole numbers, weights per channel and activations per row.

    Args:
        weight: ``(n, k)`` to start from; copied.
        bias: ``(n,)`` or None; copied.
        form: One of ``MULT_FORMS``.

    Raises:
        ValueError: On another form.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, form: str) -> None:
        super().__init__()
        check_form(form, MULT_FORMS)
        self.form = form
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    def from_linear(cls, linear: nn.Linear, form: str) -> MultLinear:
        """A mult linear that starts from a linear's weight and bias."""
        return cls(linear.weight, linear.bias, form)

    def values_and_scale(self) -> tuple[Tensor, Tensor]:
        """The weight as values ``(n, k)``, with gradient, and scale ``(n,)``."""
        if self.form not in WHOLE_WEIGHTS:
            weight = self.weight if self.form == "mult_fp32" else as_bf16(self.weight)
            return weight, weight.new_ones(self.out_features)
        codes, scale = quantise_channels(self.weight.detach(), WHOLE_WEIGHTS[self.form])
        return coded(self.weight, codes, scale[:, None]), scale

    def forward(self, x: Tensor) -> Tensor:
        """fp32 ``(..., k)`` to ``(..., n)``."""
        values, scale = self.values_and_scale()
        return linear_as_deployed(self.form, x, values, scale, self.bias)

    def export(self) -> LinearParameters:
        """The parameters as the kernels take them."""
        return exported(self.form, *self.values_and_scale(), self.bias)

    def extra_repr(self) -> str:
        """Sizes and form."""
        return f"{self.in_features}, {self.out_features}, form={self.form}"

"""AddLinear: a linear whose weights are ±1, one scale per output channel; it adds and subtracts."""

from __future__ import annotations

from torch import Tensor, nn

from kernels.forms import FORMS
from kernels.packing import LinearParameters, signs
from reparam.fake_quantise import check_form, coded, exported, linear_as_deployed

ADD_FORMS = tuple(
    name for name, form in FORMS.items() if (form["primitive"], form["w_layout"]) == ("add", "nk")
)


class AddLinear(nn.Module):
    """Linear with ``W = ±scale``: a float weight is trained, and only its sign is used.

    Args:
        weight: ``(n, k)`` to start from; copied.
        bias: ``(n,)`` or None; copied.
        form: One of ``ADD_FORMS``.

    Raises:
        ValueError: On another form.

    Source:
        BinaryConnect, arXiv 1511.00363; the scale is that of XNOR-Net, arXiv 1603.05279.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, form: str) -> None:
        super().__init__()
        check_form(form, ADD_FORMS)
        self.form = form
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    def from_linear(cls, linear: nn.Linear, form: str) -> AddLinear:
        """An add linear that starts from a linear's weight and bias."""
        return cls(linear.weight, linear.bias, form)

    def values_and_scale(self) -> tuple[Tensor, Tensor]:
        """The weight as ±1 ``(n, k)``, with gradient, and scale ``(n,)``."""
        values, scale = signs(self.weight.detach())
        return coded(self.weight, values, scale[:, None]), scale

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

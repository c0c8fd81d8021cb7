"""AddLinear: a linear whose weights are ±1, one scale per output channel; it adds and subtracts."""

from __future__ import annotations

from torch import Tensor, nn

from kernels.forms import FORMS
from kernels.packing import signs
from reparam.fake_quantise import coded
from reparam.form_linear import FormLinear, copied

ADD_FORMS = tuple(
    name for name, form in FORMS.items() if (form["primitive"], form["w_layout"]) == ("add", "nk")
)


class AddLinear(FormLinear):
    """Linear with ``W = ±scale``: a float weight is trained, and only its sign is used.

    Args:
        weight: ``(n, k)`` to start from; copied.
        bias: ``(n,)`` or None; copied.
        form: One of ``ADD_FORMS``.

    Source:
        BinaryConnect, arXiv 1511.00363; the scale is that of XNOR-Net, arXiv 1603.05279.
    """

    FORMS = ADD_FORMS

    def __init__(self, weight: Tensor, bias: Tensor | None, form: str) -> None:
        super().__init__(weight, form)
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = copied(bias)

    def values_and_scale(self) -> tuple[Tensor, Tensor]:
        """The weight as ±1 ``(n, k)``, with gradient, and scale ``(n,)``."""
        values, scale = signs(self.weight.detach())
        return coded(self.weight, values, scale[:, None]), scale

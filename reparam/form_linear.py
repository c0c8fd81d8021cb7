"""FormLinear: what linears have in common that train as the kernel of their form computes."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from torch import Tensor, nn

from kernels.packing import LinearParameters
from reparam.fake_quantise import check_form, exported, linear_as_deployed


class FormLinear(nn.Module):
    """A linear of a form, trained so that it can be exported without loss.

    Args:
        weight: ``(n, k)`` to start from.
        form: One of ``FORMS``.

    Raises:
        ValueError: On another form.

    Attributes:
        FORMS: Forms that a class can take.
    """

    FORMS: ClassVar[tuple[str, ...]]
    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, form: str) -> None:
        super().__init__()
        check_form(form, self.FORMS)
        self.form = form
        self.out_features, self.in_features = weight.shape

    @classmethod
    def from_linear(cls, linear: nn.Linear, form: str, *options: Any) -> Self:
        """One that starts from a linear's weight and bias."""
        return cls(linear.weight, linear.bias, form, *options)  # type: ignore[arg-type, call-arg]

    def values_and_scale(self) -> tuple[Tensor, Tensor]:
        """The weight as values ``(n, k)``, with gradient, and scale ``(n,)``."""
        raise NotImplementedError

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


def copied(tensor: Tensor | None) -> nn.Parameter | None:
    """A parameter of its own that starts as a tensor; None for none."""
    return None if tensor is None else nn.Parameter(tensor.detach().clone())

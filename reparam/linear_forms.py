"""A plain linear in another form, with all that a form leaves open."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, nn

from kernels.forms import FORMS
from reparam.add_linear import ADD_FORMS, AddLinear
from reparam.mult import MULT_FORMS, MultLinear
from reparam.shift import SHIFT_FORMS, ShiftLinear, ShiftVariant

LINEAR_FORMS = (*MULT_FORMS, *SHIFT_FORMS, *ADD_FORMS)

ActivationClip = Literal["none", "calibrated", "learned"]


class Clip(nn.Module):
    """Limits activations, so that a few large ones do not set the scale of a whole row.

    Kernels quantise a row by its largest magnitude: behind a clip the scale of a row is at most
    ``limit / 127``. The limit is infinite until ``post_training_`` or ``limit`` itself sets it.

    Args:
        learned: Whether the limit is trained, by the gradient of what it cuts off.

    Source:
        PACT, arXiv 1805.06085.
    """

    limit: Tensor

    def __init__(self, learned: bool) -> None:
        super().__init__()
        limit = torch.tensor(torch.inf)
        if learned:
            self.limit = nn.Parameter(limit)
        else:
            self.register_buffer("limit", limit)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, unchanged in it."""
        return torch.clamp(x, -self.limit, self.limit)


def linear_in_form(
    linear: nn.Linear,
    form: str,
    variant: ShiftVariant = "Q",
    bits: int | None = None,
    clip: ActivationClip = "none",
) -> nn.Module:
    """A trainable linear of a form that starts from a linear's weights.

    Args:
        linear: Its weights are copied.
        form: A linear form.
        variant: How shift weights are trained.
        bits: Bits of a shift weight, see ``ShiftLinear``.
        clip: Whether a ``Clip`` stands before it; forms that do not quantise need none.

    Returns:
        A ``FormLinear``, or a sequence of a ``Clip`` named ``clip`` and that, named ``linear``.
    """
    made: nn.Module
    if form in SHIFT_FORMS:
        made = ShiftLinear.from_linear(linear, form, variant, bits)
    else:
        made = (AddLinear if form in ADD_FORMS else MultLinear).from_linear(linear, form)
    if clip == "none" or "quantise" not in FORMS[form]["fused"]:
        return made
    before = Clip(clip == "learned").to(linear.weight)
    return nn.Sequential(OrderedDict(clip=before, linear=made))

"""Agreement of a deployed model with its trained form, layer by layer and decision by decision.

Both compute the same, up to the order of fp32 sums. But codes and routers decide by thresholds: a
value within rounding of one may fall on the other side, and then the images' classes may differ.
Each such image is followed to the first decision that differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.forms import quantises
from kernels.packing import quantise_rows
from reparam.add_attention import AddProducts
from reparam.data import Data
from reparam.deploy import deploy
from reparam.deployed import DeployedAngular, Fused
from reparam.form_linear import FormLinear
from reparam.moe import MoEMlp, moe_layers
from reparam.quadratic_attention import QuadraticCore
from reparam.results import Agreement

# What fp32 sums in another order come to after some layers, relative to a row's largest value.
ROUNDING = 1e-4


@dataclass(frozen=True)
class Flip:
    """The first decision that two forms of a model take differently for an image.

    Attributes:
        layer: Qualified name of the module that decides; ``class`` for the result.
        gap: Largest distance between the two forms' values of a flipped decision, relative to
            the largest value of their row. The threshold lies between them.
    """

    layer: str
    gap: float


def agreement(
    trained: nn.Module, deployed: nn.Module, data: Data, differing: Tensor, batch_size: int
) -> Agreement:
    """Compares both forms on the test set.

    Args:
        trained: The model as it was trained.
        deployed: What was made of it; its layers keep their names.
        data: Task.
        differing: bool ``(images,)``, true where their predicted classes differ.
        batch_size: Images at a time.
    """
    traced, largest, start = 0, 0.0, 0
    layers = deploy(trained, fuse=False)
    for images, _ in data.batches("test", batch_size, False):
        largest = max(largest, layer_error(trained, layers, images))
        for image in images[differing[start : start + len(images)]]:
            flip = first_flip(trained, deployed, image[None])
            traced += flip is not None and flip.gap <= ROUNDING
        start += len(images)
    return Agreement(
        images=len(differing),
        differing=int(differing.sum()),
        traced=traced,
        max_layer_error=largest,
    )


@torch.no_grad()
def layer_error(trained: nn.Module, deployed: nn.Module, images: Tensor) -> float:
    """Largest relative error ``‖deployed - trained‖ / ‖trained‖`` of a converted layer.

    Each deployed layer is fed what its trained form was, so that errors do not add up. What lies
    inside of an MoE layer is compared as part of it.

    Args:
        trained: The model as it was trained.
        deployed: What was made of it, not fused.
        images: ``(b, c, h, w)``.
    """
    errors = [0.0]
    inside_moe = tuple(f"{fqn}." for fqn, _ in moe_layers(trained))
    theirs = dict(deployed.named_modules())
    # A fused attention takes other inputs between its projections: it is compared as a whole.
    names = [
        fqn
        for fqn, module in trained.named_modules()
        if not fqn.startswith(inside_moe)
        and fqn in theirs
        and type(theirs[fqn]) is not type(module)
        and not isinstance(theirs[fqn], DeployedAngular)
    ]

    def compare(fqn: str, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        ours = theirs[fqn](*inputs, **named)
        errors.append(float((ours - output).norm() / output.norm()))

    handles = [
        trained.get_submodule(fqn).register_forward_hook(
            lambda module, inputs, named, output, fqn=fqn: compare(fqn, inputs, named, output),
            with_kwargs=True,
        )
        for fqn in names
    ]
    try:
        trained.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
    return max(errors)


def first_flip(trained: nn.Module, deployed: nn.Module, image: Tensor) -> Flip | None:
    """The first decision that both forms take differently; None if there is none.

    Args:
        trained, deployed: Both forms.
        image: ``(1, c, h, w)``.
    """
    ours, our_logits = _decision_inputs(trained, trained, image)
    theirs, their_logits = _decision_inputs(trained, deployed, image)
    for fqn, our_inputs in ours.items():
        if fqn in theirs:
            module = trained.get_submodule(fqn)
            pairs = zip(_decisions(module, our_inputs), _decisions(module, theirs[fqn]))
            gaps = [_gap(*first, *second) for first, second in pairs]
            if any(gap is not None for gap in gaps):
                return Flip(fqn, max(gap for gap in gaps if gap is not None))
    gap = _gap(*_choice(our_logits), *_choice(their_logits))
    return None if gap is None else Flip("class", gap)


@torch.no_grad()
def _decision_inputs(
    trained: nn.Module, form: nn.Module, image: Tensor
) -> tuple[dict[str, tuple[Any, ...]], Tensor]:
    """Inputs of each deciding module in order of execution, and the logits."""
    found: dict[str, tuple[Tensor, ...]] = {}

    def note(fqn: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            found[fqn] = _as_trained(module, inputs)

        return hook

    parts = dict(form.named_modules())
    handles = [
        parts[fqn].register_forward_pre_hook(note(fqn))
        for fqn, module in trained.named_modules()
        if _decides(module) and fqn in parts
    ]
    try:
        logits = form.eval()(image)
    finally:
        for handle in handles:
            handle.remove()
    return found, logits


def _as_trained(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The inputs that the trained form of a module would decide on."""
    if isinstance(module, DeployedAngular):
        return module.split(inputs[0])
    if isinstance(module, Fused):
        return (module.normalised(inputs[0]),)
    return inputs


def _decides(module: nn.Module) -> bool:
    if isinstance(module, FormLinear):
        return quantises(module.form)
    return isinstance(module, AddProducts | MoEMlp | QuadraticCore)


def _decisions(module: nn.Module, inputs: tuple[Any, ...]) -> list[tuple[Tensor, Tensor]]:
    """Values relative to the largest of their row, and what is decided from them."""
    if isinstance(module, AddProducts):
        return [(_relative(x), x > 0) for x in inputs[:2]]
    if isinstance(module, QuadraticCore):
        return [(_relative(x), x > 0) for x in module.hashing(*inputs[:2])]
    if isinstance(module, MoEMlp):
        return [_choice(module.router.gate(inputs[0].flatten(0, -2)))]
    return [(_relative(inputs[0]), quantise_rows(inputs[0])[0])]


def _choice(logits: Tensor) -> tuple[Tensor, Tensor]:
    return _relative(logits), F.one_hot(logits.argmax(dim=-1), logits.shape[-1])


def _relative(x: Tensor) -> Tensor:
    return x / x.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def _gap(values: Tensor, codes: Tensor, other_values: Tensor, other_codes: Tensor) -> float | None:
    if codes.shape != other_codes.shape:
        return float("inf")
    flipped = codes != other_codes
    if not flipped.any():
        return None
    return float((values - other_values)[flipped].abs().max())

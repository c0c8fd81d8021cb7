"""Post-training shift: the best power-of-two codes of trained linears, without training.

For each layer some of its inputs are collected. The scale of each output channel is searched for,
and the weights are rounded one input after the other, each rounding's error made up for by the
weights still to come, so that the layer's output, not its weight, changes least.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kernels.packing import round_to_pow2
from reparam.linear_forms import Clip
from reparam.one_pass import watch_pass
from reparam.shift import ShiftLinear

# Rounding to powers of two repeats with each octave: scales of one octave are all there are.
_RATIOS = tuple(2.0 ** (-step / 8) for step in range(8))
_FEEDBACK_RATIOS = _RATIOS[::2]
_CLIP_RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
_ROWS = 2048
_DAMPING = 0.01


@dataclass(frozen=True)
class Fit:
    """What fitting did to one layer.

    Attributes:
        before, after: Error of the output relative to that of the float weights, ``‖y' - y‖ / ‖y‖``
            on the calibration inputs; None with a reason.
        reason: Why nothing was fitted, or empty.
    """

    before: float | None
    after: float | None
    reason: str = ""


@torch.no_grad()
def post_training_(
    model: nn.Module, calibration: Tensor, error_feedback: bool = True
) -> dict[str, Fit]:
    """Fits codes, scales, biases and clips of all shift linears to calibration images, in place.

    What a layer should compute is taken from its float weights, so this is for a model that was
    just converted, in variant Q. The float weights become what the codes stand for.

    Args:
        model: Converted; left in the mode that it was in.
        calibration: Images.
        error_feedback: Whether the error of a rounded weight is made up for by those still to
            come (GPTQ); otherwise the scales alone are searched for.

    Returns:
        What was done, by qualified name; a layer that got no input, as an expert may, and one in
        variant PS, which has no float weights, are left alone with the reason.

    Source:
        GPTQ, arXiv 2210.17323.
    """
    layers = {fqn: part for fqn, part in model.named_modules() if isinstance(part, ShiftLinear)}
    clips = _clips(model)
    inputs: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        rows = args[0].detach().reshape(-1, args[0].shape[-1]).float()
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(rows), generator=generator)[:_ROWS].to(rows.device)
        inputs[module] = (
            torch.cat([inputs[module], rows[chosen]]) if module in inputs else rows[chosen]
        )

    inner = [clips.get(layer, layer) for layer in layers.values()]
    watch_pass(model, calibration, dict.fromkeys(inner, note))
    return {
        fqn: _fit(layer, clips.get(layer), inputs.get(clips.get(layer, layer)), error_feedback)
        for fqn, layer in layers.items()
    }


def _clips(model: nn.Module) -> dict[nn.Module, Clip]:
    """The clip in front of a linear, by linear."""
    pairs = [list(part) for part in model.modules() if isinstance(part, nn.Sequential)]
    return {pair[1]: pair[0] for pair in pairs if len(pair) == 2 and isinstance(pair[0], Clip)}


def _fit(layer: ShiftLinear, clip: Clip | None, x: Tensor | None, error_feedback: bool) -> Fit:
    if layer.variant != "Q":
        return Fit(None, None, "variant PS has no float weights to fit to")
    if x is None or not len(x):
        return Fit(None, None, "got no calibration inputs")
    weight = layer.weight.clone()
    expected = F.linear(x, weight, layer.bias)
    before = _relative_error(layer(x if clip is None else clip(x)), expected)
    if clip is not None:
        _fit_clip(layer, clip, x, expected)
        x = clip(x)
    start = layer.state_dict()
    start = {name: tensor.clone() for name, tensor in start.items()}
    layer.weight.copy_(best_codes(weight, x, layer.exponent_min, error_feedback))
    if layer.bias is not None:
        layer.bias.add_((expected - layer(x)).mean(0))
    after = _relative_error(layer(x), expected)
    if after > before:
        layer.load_state_dict(start)
        after = _relative_error(layer(x), expected)
    return Fit(before, after)


def best_codes(weight: Tensor, x: Tensor, exponent_min: int, error_feedback: bool) -> Tensor:
    """The weights ``±2^p * scale`` that change the output for given inputs least.

    Args:
        weight: Float weights ``(n, k)``.
        x: Inputs ``(rows, k)``.
        exponent_min: Smallest p; the largest is 0.
        error_feedback: As in ``post_training_``.

    Returns:
        ``(n, k)``: what the codes stand for. Rounding them again gives them back.
    """
    hessian = x.T @ x / len(x)
    largest = weight.abs().amax(1)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    candidates = [_rounded(weight, ratio * largest, exponent_min) for ratio in _RATIOS]
    if error_feedback:
        inverse = _inverse_root(hessian)
        candidates += [
            _rounded_with_feedback(weight, ratio * largest, exponent_min, inverse)
            for ratio in _FEEDBACK_RATIOS
        ]
    errors = torch.stack([_output_error(made - weight, hessian) for made in candidates])
    best = errors.argmin(0)
    return torch.stack(candidates)[best, torch.arange(len(weight), device=weight.device)]


def _rounded(weight: Tensor, scale: Tensor, exponent_min: int) -> Tensor:
    return round_to_pow2(weight / scale[:, None], exponent_min, 0) * scale[:, None]


def _rounded_with_feedback(
    weight: Tensor, scale: Tensor, exponent_min: int, inverse_root: Tensor
) -> Tensor:
    left, made = weight.clone(), torch.empty_like(weight)
    for i in range(weight.shape[1]):
        column = left[:, i : i + 1]
        made[:, i : i + 1] = _rounded(column, scale, exponent_min)
        error = (column - made[:, i : i + 1]) / inverse_root[i, i]
        left[:, i + 1 :] -= error * inverse_root[i, i + 1 :]
    return made


def _inverse_root(hessian: Tensor) -> Tensor:
    """Upper triangular U with ``UᵀU`` the inverse of the damped hessian."""
    damping = _DAMPING * hessian.diagonal().mean().clamp_min(1e-12)
    damped = hessian.double() + damping * torch.eye(len(hessian), device=hessian.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).to(hessian.dtype)


def _output_error(difference: Tensor, hessian: Tensor) -> Tensor:
    """Mean square of what a change of the weights changes of each output."""
    return ((difference @ hessian) * difference).sum(1)


def _fit_clip(layer: ShiftLinear, clip: Clip, x: Tensor, expected: Tensor) -> None:
    largest = x.abs().max()
    errors = []
    for ratio in _CLIP_RATIOS:
        clip.limit.fill_(ratio * largest)
        errors.append(_relative_error(layer(clip(x)), expected))
    clip.limit.fill_(_CLIP_RATIOS[errors.index(min(errors))] * largest)


def _relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y - expected).norm() / expected.norm().clamp_min(1e-12))

"""Fits a converted attention to the one it replaces, before any training.

Linear-angular attention has a magnitude of its own. One gain for each head, the taps of the token
convolution and a bias are solved for by least squares, so that the heads' outputs come as near to
the original's as the form allows; the gain then goes into the projection and costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reparam.add_attention import (
    TOKEN_WINDOW,
    AddAttention,
    LinearCore,
    linear_angular,
)
from reparam.attention_structure import FUSED
from reparam.coded_attention import CodedAttention
from reparam.kernelised_hashing import KernelisedHash, fitting_hooks
from reparam.one_pass import evaluating, watch_pass, watched

_RIDGE = 1e-6
# A gain that the taps would have to be divided by.
_SMALLEST_GAIN = 1e-3

Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass(frozen=True)
class Calibration:
    """Error of a converted attention's output relative to the original's, on the same inputs.

    Attributes:
        before: With the weights carried over.
        after: With hashing, gains and taps fitted.
    """

    before: float
    after: float


def captured_arguments(
    model: nn.Module, example: Tensor, names: Iterable[str]
) -> dict[str, Arguments]:
    """What modules are called with in one forward pass, the first time, by qualified name."""
    found: dict[nn.Module, Arguments] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        found.setdefault(module, (args, kwargs))

    asked = {fqn: model.get_submodule(fqn) for fqn in names}
    watch_pass(model, example, dict.fromkeys(asked.values(), note))
    return {fqn: found[part] for fqn, part in asked.items() if part in found}


def calibrate_(made: nn.Module, original: nn.Module, arguments: Arguments) -> Calibration:
    """Fits what is free in a converted attention.

    Args:
        made: What replaces ``original``; changed in place.
        original: Left as it is.
        arguments: What it is called with.
    """
    args, kwargs = arguments
    with evaluating(original), evaluating(made):
        expected = _tokens(original(*args, **kwargs))
        before = _relative_error(_tokens(made(*args, **kwargs)), expected)
        start = {name: tensor.clone() for name, tensor in made.state_dict().items()}
        _fit_hashing(made, arguments)
        if isinstance(made, AddAttention):
            _fit_add_attention(made, original, arguments)
        elif isinstance(made, CodedAttention) and isinstance(made.core, LinearCore):
            _fit_core(made, made.core, arguments)
        after = _relative_error(_tokens(made(*args, **kwargs)), expected)
        hashed = any(isinstance(part, KernelisedHash) for part in made.modules())
        if after > before and not hashed:
            made.load_state_dict(start)
            after = before
    return Calibration(before, after)


def head_terms(normed: Tensor, v: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The gain and taps with which ``gain * normed + taps * v`` is nearest to a target.

    Args:
        normed, v, target: ``(b, heads, tokens, head_dim)``.

    Returns:
        Gain ``(heads,)`` and taps ``(heads, TOKEN_WINDOW)``.
    """
    reach = TOKEN_WINDOW // 2
    padded = F.pad(v, (0, 0, reach, reach))
    shifted = [padded[:, :, i : i + v.shape[2]] for i in range(TOKEN_WINDOW)]
    columns = torch.stack([normed, *shifted], dim=-1).transpose(0, 1).flatten(1, -2).double()
    wanted = target.transpose(0, 1).flatten(1).double()[..., None]
    gram = columns.transpose(1, 2) @ columns
    ridge = _RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    solved = torch.linalg.solve(gram + ridge[:, None, None] * eye, columns.transpose(1, 2) @ wanted)
    gain, taps = solved[:, 0, 0], solved[:, 1:, 0]
    return gain.to(v.dtype), taps.to(v.dtype)


def _fit_hashing(made: nn.Module, arguments: Arguments) -> None:
    hooks = fitting_hooks(made)
    if hooks:
        with watched(hooks):
            made(*arguments[0], **arguments[1])


def _fit_add_attention(made: AddAttention, original: nn.Module, arguments: Arguments) -> None:
    """Solves on the heads' outputs, which the original hands to its projection."""
    seen: list[Tensor] = []
    projection = cast(nn.Linear, original.proj)
    with watched({projection: lambda module, args, kwargs: seen.append(args[0])}):
        original(*arguments[0], **arguments[1])
    heads, proj = made.num_heads, cast(nn.Linear, made.proj)
    target = seen[0].unflatten(-1, (heads, -1)).transpose(1, 2)
    q, k, v = made.heads(arguments[0][0])
    normed, _ = linear_angular(q, k, v, made.add_products, made.token_conv)
    gain, taps = head_terms(normed, v, target)
    sign = torch.where(gain < 0, -1.0, 1.0)
    gain = sign * gain.abs().clamp_min(_SMALLEST_GAIN * target.std() * v.shape[-1] ** 0.5)
    made.token_conv.weight.copy_((taps / gain[:, None])[:, None, :, None])
    got = gain[:, None, None] * (normed + made.token_conv(v))
    missing = (target - got).mean((0, 2)).flatten()
    if proj.bias is not None:
        proj.bias.add_(proj.weight @ missing)
    proj.weight.mul_(gain.repeat_interleave(v.shape[-1]))


def _fit_core(made: CodedAttention, core: LinearCore, arguments: Arguments) -> None:
    recorder = _Recorder()
    made.core = recorder
    made(*arguments[0], **arguments[1])
    made.core = core
    q, k, v, target = recorder.seen[0]
    normed, _ = core.terms(q, k, v)
    v, target = v.reshape(normed.shape), target.reshape(normed.shape)
    gain, taps = head_terms(normed, v, target)
    core.gain.copy_(gain[:, None, None])
    core.token_conv.weight.copy_(taps[:, None, :, None])


class _Recorder(nn.Module):
    """A core that computes what the original does, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> Tensor:
        out = FUSED(q, k, v, *rest, **named)
        self.seen.append((q, k, v, out))
        return out


def _tokens(output: Any) -> Tensor:
    """The tokens of what an attention gives back; some give their grid's size, too."""
    return output[0] if isinstance(output, tuple) else output


def _relative_error(y: Tensor, expected: Tensor) -> float:
    return float((y - expected).norm() / expected.norm().clamp_min(1e-12))

"""Mixture of experts that differ in what they compute with: multiplications or shifts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reparam.linear_forms import linear_in_form
from reparam.shift import ShiftVariant


@dataclass(frozen=True)
class Routing:
    """Where a router sent the tokens of one forward pass.

    Attributes:
        probabilities: p ``(tokens, experts)``, the softmax of the logits without noise.
        load: q ``(tokens, experts)``, the probability that an expert is top-1 under the noise.
        choice: Index of the expert that each token went to, ``(tokens,)``.
        counts: Tokens of each expert, ``(experts,)``.
    """

    probabilities: Tensor
    load: Tensor
    choice: Tensor
    counts: Tensor


class Router(nn.Module):
    """Chooses one expert for each token: a linear, a softmax and, in training, noise.

    The noise has standard deviation 1/experts and moves the choice only, not the probabilities.

    Args:
        dim: Features of a token.
        experts: Number of experts, at least 2.

    Source:
        Sparsely-gated mixture of experts, arXiv 1701.06538; noise as in V-MoE, arXiv 2106.05974.
    """

    def __init__(self, dim: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, experts)
        self.noise_std = 1 / experts
        self.draw_noise: Callable[[Tensor], Tensor] = torch.randn_like
        nn.init.trunc_normal_(self.gate.weight, std=0.02)
        nn.init.zeros_(self.gate.bias)

    def forward(self, tokens: Tensor) -> Routing:
        """Routes tokens ``(tokens, dim)``."""
        # Under autocast too, noise and load are computed in fp32.
        logits = self.gate(tokens).float()
        noise = self.noise_std * self.draw_noise(logits) if self.training else 0.0
        choice = (logits.detach() + noise).argmax(dim=-1)
        # bincount would make the host wait for a GPU to learn the largest index.
        chosen = choice[:, None] == torch.arange(logits.shape[-1], device=logits.device)
        return Routing(
            probabilities=logits.softmax(dim=-1),
            load=top1_probability(logits, self.noise_std),
            choice=choice,
            counts=chosen.sum(0),
        )


def top1_probability(logits: Tensor, noise_std: float) -> Tensor:
    """Probability that an expert has the largest logit once Gaussian noise is added to each.

    Exact for two experts, and differentiable where the choice itself is not. Among more, the
    strongest rival stands for all of them.

    Args:
        logits: ``(tokens, experts)``.
        noise_std: Standard deviation of the noise on each logit.

    Returns:
        ``(tokens, experts)``.
    """
    top, index = logits.topk(2, dim=-1)
    is_top = torch.arange(logits.shape[-1], device=logits.device) == index[:, :1]
    rival = torch.where(is_top, top[:, 1:], top[:, :1])
    # The difference of two independent noises has √2 times their deviation.
    return torch.special.ndtr((logits - rival) / (math.sqrt(2) * noise_std))


class MoEMlp(nn.Module):
    """Sends each token to one expert: ``y = p_i(x) · E_i(x)`` for the top-1 expert i.

    Any number of tokens may go to an expert, also none; nothing is padded or dropped. Experts work
    on tokens alone: they are MLPs or, where an MLP mixes tokens between its linears (the depthwise
    convolution of PVT v2), each of its linears is an ``MoEMlp`` of its own.

    Attributes:
        routing: Of the last forward pass; None before the first.
        expert_latency_ms: Latency of each expert at all tokens of the layer, ``(experts,)``; NaN
            until ``reparam.expert_latency.set_expert_latencies_`` sets it.

    Args:
        dim: Features of a token.
        experts: Token-wise modules by name, at least 2.
    """

    expert_latency_ms: Tensor

    def __init__(self, dim: int, experts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.router = Router(dim, len(experts))
        self.experts = nn.ModuleDict(experts)
        self.register_buffer("expert_latency_ms", torch.full((len(experts),), math.nan))
        self.routing: Routing | None = None

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        forms: Mapping[str, str],
        shift_variant: ShiftVariant = "Q",
        shift_bits: int | None = None,
    ) -> MoEMlp:
        """Makes each expert a copy of a pre-trained MLP or linear, in its own form.

        The last linear of a copy is multiplied by the number of experts E, so that a router that
        is still undecided (p = 1/E) gives back the module's own output.

        Args:
            module: An ``nn.Linear``, or an MLP with ``nn.Linear`` fc1 and fc2.
            forms: Linear form by name of the expert.
            shift_variant: How shift weights are trained.
            shift_bits: Bits of a shift weight, see ``ShiftLinear``.
        """
        first = _linear(module, "fc1")
        experts = {}
        for name, form in forms.items():
            made_in = partial(linear_in_form, form=form, variant=shift_variant, bits=shift_bits)
            experts[name] = _expert(module, made_in, gain=len(forms))
        made = cls(first.in_features, experts).to(first.weight)
        return made.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """fp32 ``(..., dim)`` to ``(..., n)``."""
        tokens = x.reshape(-1, x.shape[-1])
        self.routing = self.router(tokens)
        gates = self.routing.probabilities.gather(1, self.routing.choice[:, None])
        # On a GPU the host would have to wait for the number of tokens of each expert.
        everywhere = self.training and tokens.device.type != "cpu"
        combine = self._combine_all if everywhere else self._combine_chosen
        return combine(tokens, self.routing.choice, gates).reshape(*x.shape[:-1], -1)

    def _combine_all(self, tokens: Tensor, choice: Tensor, gates: Tensor) -> Tensor:
        """Every expert computes all tokens and keeps its own; no size depends on the choice."""
        outputs = [
            torch.where(choice[:, None] == i, gates * expert(tokens), 0.0)
            for i, expert in enumerate(self.experts.values())
        ]
        return torch.stack(outputs).sum(0)

    def _combine_chosen(self, tokens: Tensor, choice: Tensor, gates: Tensor) -> Tensor:
        """Every expert computes its own tokens alone."""
        indices, outputs = [], []
        for i, expert in enumerate(self.experts.values()):
            index = torch.nonzero(choice == i).squeeze(1)
            if len(index):
                indices.append(index)
                chosen = expert(tokens.index_select(0, index))
                outputs.append(gates.index_select(0, index) * chosen)
        gathered = torch.cat(outputs)
        return torch.empty_like(gathered).index_copy(0, torch.cat(indices), gathered)

    def __getstate__(self) -> dict[str, Any]:
        # Statistics in the graph of a training step cannot be copied, and need not be.
        return {**self.__dict__, "routing": None}


def moe_layers(model: nn.Module) -> Iterator[tuple[str, MoEMlp]]:
    """The MoE layers of a model with their qualified names."""
    for fqn, module in model.named_modules():
        if isinstance(module, MoEMlp):
            yield fqn, module


def _expert(module: nn.Module, convert: Callable[[nn.Linear], nn.Module], gain: float) -> nn.Module:
    expert = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in _linear(expert, "fc2").parameters():
            parameter.mul_(gain)
    if isinstance(expert, nn.Linear):
        return convert(expert)
    for name in ("fc1", "fc2"):
        setattr(expert, name, convert(getattr(expert, name)))
    return expert


def _linear(module: nn.Module, name: str) -> nn.Linear:
    return module if isinstance(module, nn.Linear) else getattr(module, name)

"""What a forward pass does, operator by operator; of deployed models and torch's originals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cost_models.work import Work, far_counts
from kernels import expert_ops, layer_ops
from kernels.workload import Workload, attention, linear
from reparam.one_pass import evaluating


def work_of(model: nn.Module, *inputs: Any, **named: Any) -> Work:
    """Watches one forward pass in evaluation mode.

    Args:
        model: Any; left as it was.
        inputs, named: Of its ``forward``.

    Returns:
        Products of ours in the forms that they have, torch's matrix products as ``mult_fp32``.
        Tokens are routed as these inputs are.
    """
    return _watched(_Watch(experts=True), model, inputs, named)


def work_beside_experts(model: nn.Module, *inputs: Any, **named: Any) -> Work:
    """The same without the products of routed experts: what no dispatch changes."""
    return _watched(_Watch(experts=False), model, inputs, named)


def _watched(watch: _Watch, model: nn.Module, inputs: Any, named: Any) -> Work:
    with evaluating(model), watch:
        model(*inputs, **named)
    counts = {"calls": 1.0} | {name: number for name, number in watch.counts.items() if number}
    return Work(dict(watch.products), counts, dict(watch.experts))


class _Watch(TorchDispatchMode):
    def __init__(self, experts: bool) -> None:
        super().__init__()
        self.products: Counter[Workload] = Counter()
        self.experts: Counter[Workload] = Counter()
        self.counts: Counter[str] = Counter()
        self._with_experts = experts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.counts["operators"] += 1
            note = _NOTES.get(func.overloadpacket._qualified_op_name, _Watch._elements)
            note(self, args, result)
        return result

    def _product(self, workload: Workload, number: int = 1) -> None:
        self.products[workload] += number

    def _elements(self, args: Any, result: Any) -> None:
        if isinstance(result, Tensor):
            self.counts["elements"] += result.numel()
        elif isinstance(result, tuple | list):
            self.counts["elements"] += sum(x.numel() for x in result if isinstance(x, Tensor))

    def _dispatched(
        self, tokens: Tensor, norm: Tensor | None, gate: Tensor | None, gate_bias: Tensor | None
    ) -> list[int]:
        """Tokens of each expert, or none at all where nobody wants to know."""
        if gate is None:
            return [tokens.shape[0]]
        self.counts["routed"] += tokens.numel()
        self.counts["routed_tokens"] += tokens.shape[0]
        if not self._with_experts:
            return [0] * gate.shape[0]
        counts: list[int] = expert_ops.route(tokens, norm, gate, gate_bias)[2].tolist()
        return counts

    def _normalised(self, x: Tensor, norm: Tensor | None) -> None:
        if norm is not None:
            self.counts["normalised"] += x.numel()
            self.counts["normalised_tokens"] += x.shape[:-1].numel()

    def _weights(self, weights: Iterable[Tensor]) -> None:
        self.counts["weight_bytes"] += sum(weight.nbytes for weight in weights)

    def _linear(self, args: Any, result: Tensor) -> None:
        x, packed, form, n = args[:4]
        self._weights(packed)
        self._normalised(x, args[4] if len(args) > 4 else None)
        if len(args) > 5 and args[5]:
            self.counts["activated"] += result.numel()
        self._product(linear(form, x.shape[:-1].numel(), x.shape[-1], n))

    def _add_attention(self, args: Any, result: Tensor) -> None:
        q, _, v, alphabet = args
        self._product(attention(q.shape[0], q.shape[1], q.shape[2], v.shape[2], alphabet).both)

    def _angular(self, args: Any, result: Tensor) -> None:
        qkv, conv, alphabet = args
        (images, tokens, width), heads = qkv.shape, conv.shape[0]
        head_dim = width // (3 * heads)
        self._product(attention(images * heads, tokens, head_dim, head_dim, alphabet).both)
        self.counts["elements"] += result.numel()

    def _moe(self, args: Any, result: Tensor) -> None:
        x, norm, gate, gate_bias, _, forms, sizes, gelu, _ = args
        tokens = x.reshape(-1, x.shape[-1])
        self._normalised(tokens, norm)
        self.counts["activated"] += gelu * tokens.shape[0] * sizes[1]
        counts = self._dispatched(tokens, norm, gate, gate_bias)
        shapes = [(m, k, n) for m in counts for k, n in pairwise(sizes)]
        self._experts(zip(forms, shapes, strict=True), x, result)

    def _experts(
        self, linears: Iterable[tuple[str, tuple[int, int, int]]], x: Tensor, result: Tensor
    ) -> None:
        """Products and weights; those of an expert without tokens stay where they are."""
        weights = 0
        for form, (m, k, n) in linears:
            if m:
                self.experts[linear(form, m, k, n)] += 1
            if m or not self._with_experts:
                weights += linear(form, 1, k, n).weight_bytes
        self.counts["weight_bytes"] += weights
        self.counts.update(far_counts(weights, x.nbytes + result.nbytes))

    def _depthwise(self, args: Any, result: Tensor) -> None:
        self.counts["depthwise_macs"] += args[1].shape[0] * result.numel()

    def _depthwise_moe(self, args: Any, result: Tensor) -> None:
        x, weight, bias, height, gate, gate_bias, _, forms, n, _ = args
        self.counts["depthwise_macs"] += weight.shape[0] * x.numel()
        hidden = x
        if gate is not None and self._with_experts:
            hidden = layer_ops.depthwise_gelu(x, weight, bias, height, True)
        counts = self._dispatched(hidden.flatten(0, 1), None, gate, gate_bias)
        shapes = [(m, x.shape[-1], n) for m in counts]
        self._experts(zip(forms, shapes, strict=True), x, result)

    def _patches(self, args: Any, result: Tensor) -> None:
        self.counts["patch_elements"] += result.numel()

    def _addmm(self, args: Any, result: Tensor) -> None:
        x, w = args[-2:]
        self._weights([w])
        self._product(linear("mult_fp32", x.shape[0], x.shape[1], w.shape[1]))

    def _convolution(self, args: Any, result: Tensor) -> None:
        x, weight = args[:2]
        self._weights([weight])
        is_depthwise = x.shape[1] > 1 and weight.shape[1] == 1
        name = "depthwise_macs" if is_depthwise else "conv_macs"
        self.counts[name] += result.numel() * weight[0].numel()

    def _bmm(self, args: Any, result: Tensor) -> None:
        self.counts["attention_macs"] += result.numel() * args[0].shape[-1]

    def _code_attention(self, args: Any, result: Tensor) -> None:
        """Of the values alone: codes are compared 32 bits at a time."""
        k, v = args[1:3]
        self.counts["attention_macs"] += result.shape[:-1].numel() * k.shape[-2] * v.shape[-1]

    def _attention(self, args: Any, result: Any) -> None:
        q, k, v = args[:3]
        pairs = q.shape[:-1].numel() * k.shape[-2]
        self.counts["attention_macs"] += pairs * (q.shape[-1] + v.shape[-1])


_NOTES = {
    "shiftadd::linear": _Watch._linear,
    "shiftadd::add_attention": _Watch._add_attention,
    "shiftadd::angular_attention": _Watch._angular,
    "shiftadd::code_attention": _Watch._code_attention,
    "shiftadd::moe": _Watch._moe,
    "shiftadd::depthwise_gelu": _Watch._depthwise,
    "shiftadd::depthwise_moe": _Watch._depthwise_moe,
    "shiftadd::patches": _Watch._patches,
    "aten::addmm": _Watch._addmm,
    "aten::mm": _Watch._addmm,
    "aten::convolution": _Watch._convolution,
    "aten::bmm": _Watch._bmm,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _Watch._attention,
    "aten::_scaled_dot_product_efficient_attention": _Watch._attention,
    "aten::_scaled_dot_product_flash_attention": _Watch._attention,
}

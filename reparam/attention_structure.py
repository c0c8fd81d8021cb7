"""What a model's attentions compute, found by watching one forward pass, whatever their classes.

An attention is a module that compares two sets of vectors by a product and passes the result
through a softmax over its last dimension: in one call of ``scaled_dot_product_attention``, or in
steps of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from reparam.one_pass import evaluating

FUSED = F.scaled_dot_product_attention
_PRODUCTS = {torch.matmul, torch.bmm, Tensor.matmul, Tensor.bmm, Tensor.__matmul__}
_SOFTMAXES = {torch.softmax, F.softmax, Tensor.softmax}
# What AddAttention.forward can be given beside the tokens.
_PLAIN_KEYWORDS = {"attn_mask", "is_causal", "feat_size", "size"}


@dataclass(frozen=True)
class AttentionTrace:
    """What one attention did in a forward pass.

    Attributes:
        fused: Whether by ``scaled_dot_product_attention``.
        scores: Otherwise which of the module's products of activations are compared by a softmax,
            counted from 0 in order of execution.
        queries: Shape of the queries, ``(..., heads, tokens, head_dim)``.
        keys: Shape of the keys, in the same order.
        masked: Whether a position bias or mask was added to the fused product.
        tokens_in: Whether the module took nothing but tokens ``(b, tokens, dim)``, compared all of
            them with each other and gave back as many: what a self-attention of our own can
            replace as a whole.
        over_channels: Whether channels were compared, not tokens.
    """

    fused: bool
    scores: tuple[int, ...]
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    masked: bool = False
    tokens_in: bool = False
    over_channels: bool = False

    @property
    def heads(self) -> int:
        """Heads; 1 where they are not told apart from the batch."""
        return self.queries[-3] if len(self.queries) > 3 else 1


@dataclass(frozen=True)
class Product:
    """One matrix product of a forward pass.

    Attributes:
        fqn: Qualified name of the innermost module that ran.
        left: Shape of the activations, ``(..., m, k)``.
        right: Shape of what they are multiplied by, ``(..., k, n)``.
        is_linear: Whether that is the weight of a linear, and not activations.
    """

    fqn: str
    left: tuple[int, ...]
    right: tuple[int, ...]
    is_linear: bool = False


@dataclass(frozen=True)
class ModelTrace:
    """What a model did in a forward pass.

    Attributes:
        attentions: By qualified name.
        called: Shape of the first input of each module that ran, by qualified name; empty if it is
            no tensor. The weight of a linear that is not among them was used without it.
        unpaired: Names of modules with a softmax over no product: attentions of another kind.
        products: All linears, 1×1 convolutions too, and all products of activations, each as often
            as it was computed.
    """

    attentions: dict[str, AttentionTrace]
    called: dict[str, tuple[int, ...]]
    unpaired: tuple[str, ...]
    products: tuple[Product, ...]

    def same_as_for(self, others: ModelTrace) -> frozenset[str]:
        """Names of the modules whose input has the shape that it has for more or fewer images."""
        return frozenset(
            fqn for fqn, shape in self.called.items() if shape and others.called.get(fqn) == shape
        )


def is_product(function: Any, operands: tuple[Any, ...]) -> bool:
    """Whether a call of torch multiplies two matrices of activations."""
    return function in _PRODUCTS and not any(
        isinstance(x, nn.Parameter) or x.dim() < 2 for x in operands[:2]
    )


# Switches of timm's attentions that change how, not what they compute: to the fused product, and
# to calling a linear whose bias is held apart instead of using its weight.
_SWITCHES = ("fused_attn", "qkv_bias_separate")


def open_(module: nn.Module) -> None:
    """Makes a module compute by parts that can be replaced, where it has the choice."""
    for name in _SWITCHES:
        if hasattr(module, name):
            setattr(module, name, True)


@contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """All modules ``open_`` for a while; they go back to what they were."""
    before = [
        (part, name, getattr(part, name))
        for part in model.modules()
        for name in _SWITCHES
        if hasattr(part, name)
    ]
    for part in model.modules():
        open_(part)
    try:
        yield
    finally:
        for part, name, value in before:
            setattr(part, name, value)


def example_input(model: nn.Module) -> Tensor:
    """Noise of the size that a timm model takes, batch 2, on its device; always the same."""
    settings: Mapping[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    channels, *size = settings.get("test_input_size", settings.get("input_size", (3, 224, 224)))
    channels, *size = settings.get("input_size", (channels, *size))
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or size
    if isinstance(size, int):
        size = (size, size)
    first = next((part for part in model.modules() if isinstance(part, nn.Conv2d)), None)
    channels = first.in_channels if first is not None else channels
    # A model may change the channels before its first convolution, and says then what it takes.
    channels = getattr(model, "in_chans", channels)
    noise = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))
    parameter = next(model.parameters())
    return noise.to(parameter)


def trace(model: nn.Module, example: Tensor) -> ModelTrace:
    """Watches one forward pass in evaluation mode; the model stays as it was.

    Args:
        model: Any.
        example: Its input.
    """
    watch = _Watch()
    with ExitStack() as stack:
        stack.enter_context(opened(model))
        stack.enter_context(evaluating(model))
        for fqn, part in model.named_modules():
            watch_module = watch.enter(fqn)
            stack.callback(part.register_forward_pre_hook(watch_module, with_kwargs=True).remove)
            hook = part.register_forward_hook(watch.leave, with_kwargs=True, always_call=True)
            stack.callback(hook.remove)
        with watch:
            model(example)
    unpaired = tuple(dict.fromkeys(n for n in watch.unpaired if n not in watch.found))
    return ModelTrace(watch.found, watch.called, unpaired, tuple(watch.computed))


@dataclass
class _Call:
    """A module whose forward is running."""

    fqn: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    products: int = 0


@dataclass
class _Product:
    """A product of activations, and where it stands."""

    call: _Call
    position: int
    left: tuple[int, ...]
    right: tuple[int, ...]


@dataclass(eq=False)
class _Watch(TorchFunctionMode):
    """Notes attentions while a model runs."""

    found: dict[str, AttentionTrace] = field(default_factory=dict)
    called: dict[str, tuple[int, ...]] = field(default_factory=dict)
    unpaired: list[str] = field(default_factory=list)
    running: list[_Call] = field(default_factory=list)
    products: list[_Product] = field(default_factory=list)
    computed: list[Product] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def enter(self, fqn: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.running.append(_Call(fqn, args, kwargs))
            first = args[0] if args else None
            self.called[fqn] = tuple(first.shape) if isinstance(first, Tensor) else ()

        return hook

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = self.running.pop()
        self.products = [product for product in self.products if product.call is not call]
        seen = self.found.get(call.fqn)
        if seen is not None and seen.tokens_in:
            same = isinstance(output, Tensor) and output.shape == call.args[0].shape
            self.found[call.fqn] = replace(seen, tokens_in=same)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.running:
            return out
        if func is FUSED:
            self._fused(*args, **kwargs)
        elif func is F.linear:
            self._linear(*args, **kwargs)
        elif func is F.conv2d:
            self._convolution(out, *args, **kwargs)
        elif is_product(func, args):
            call = self.running[-1]
            left, right = tuple(args[0].shape), tuple(args[1].shape)
            self.products.append(_Product(call, call.products, left, right))
            self.computed.append(Product(call.fqn, left, right))
            for outer in self.running:
                outer.products += 1
        elif func in _SOFTMAXES:
            self._softmax(args[0], kwargs.get("dim", args[1] if len(args) > 1 else None))
        return out

    def _fused(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **named: Any) -> None:
        mask = named.get("attn_mask", rest[0] if rest else None)
        causal = named.get("is_causal", rest[2] if len(rest) > 2 else False)
        call = self.running[-1]
        masked = mask is not None or bool(causal)
        queries, keys = tuple(query.shape), tuple(key.shape)
        self._note(call, AttentionTrace(True, (), queries, keys, masked))
        scores = (*queries[:-1], keys[-2])
        self.computed.append(Product(call.fqn, queries, (*keys[:-2], keys[-1], keys[-2])))
        self.computed.append(Product(call.fqn, scores, tuple(value.shape)))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        n, k = weight.shape
        fqn = self.running[-1].fqn
        self.computed.append(Product(fqn, tuple(input.shape), (k, n), is_linear=True))

    def _convolution(
        self, out: Tensor, input: Tensor, weight: Tensor, *rest: Any, **named: Any
    ) -> None:
        """Of each pixel alone it is a linear; any other kind is no product of matrices."""
        n, k, *window = weight.shape
        if window == [1, 1] and k == input.shape[-3]:
            pixels = (*out.shape[:-3], out.shape[-2] * out.shape[-1], k)
            fqn = self.running[-1].fqn
            self.computed.append(Product(fqn, pixels, (k, n), is_linear=True))

    def _softmax(self, scores: Tensor, dim: int) -> None:
        if dim not in (-1, scores.dim() - 1):
            self.unpaired.append(self.running[-1].fqn)
            return
        for made in reversed(self.products):
            if (made.left[-2], made.right[-1]) == scores.shape[-2:]:
                keys = (*made.right[:-2], made.right[-1], made.right[-2])
                self._note(made.call, AttentionTrace(False, (made.position,), made.left, keys))
                self.products.clear()
                return
        self.unpaired.append(self.running[-1].fqn)

    def _note(self, call: _Call, trace: AttentionTrace) -> None:
        before = self.found.get(call.fqn)
        trace = replace(
            trace, tokens_in=_tokens_in(call, trace), over_channels=_over_channels(call, trace)
        )
        if before is not None:
            # Several heads or several calls: what holds must hold for each of them.
            trace = replace(
                trace,
                scores=tuple(sorted({*before.scores, *trace.scores})),
                masked=before.masked or trace.masked,
                tokens_in=before.tokens_in and trace.tokens_in and trace.fused,
                over_channels=before.over_channels or trace.over_channels,
            )
        self.found[call.fqn] = trace


def _tokens_in(call: _Call, trace: AttentionTrace) -> bool:
    x, *rest = call.args or (None,)
    rest += [value for name, value in call.kwargs.items() if name not in _PLAIN_KEYWORDS]
    if not isinstance(x, Tensor) or x.dim() != 3 or len(trace.queries) != 4:
        return False
    nothing_more = not any(isinstance(value, Tensor) for value in [*rest, *call.kwargs.values()])
    return nothing_more and x.shape[0] == trace.queries[0] and x.shape[1] == trace.queries[2]


def _over_channels(call: _Call, trace: AttentionTrace) -> bool:
    """Whether what was compared are the channels of the input: rows × heads of them in all."""
    x = call.args[0] if call.args else None
    if not isinstance(x, Tensor) or x.dim() not in (3, 4):
        return False
    rows, width = trace.queries[-2:]
    flat = x.flatten(2) if x.dim() == 4 else x.transpose(1, 2)
    channels, tokens = flat.shape[-2:]
    if x.dim() == 4 and rows * trace.heads == x.shape[-1]:
        channels, tokens = x.shape[-1], x.shape[1] * x.shape[2]
    return rows * trace.heads == channels and width == tokens and rows != tokens

"""What each layer of a model computes now, and what it would compute in each form. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from kernels.forms import FORMS
from kernels.workload import Workload, attention, linear
from profiler.model_workloads import ModelLayer
from profiler.sweep_config import AttentionShape, LinearShape

SHIFT_FORMS: tuple[str, ...] = tuple(
    name for name, form in FORMS.items() if form["primitive"] == "shift"
)


@dataclass(frozen=True)
class Layer:
    """One decision to take.

    Attributes:
        fqn: Qualified name of the module.
        rule: ``attention``, ``attention_linears`` or ``mlp``; ``other`` is only counted.
        original: What it computes now, as fp32 products.
        forms: What it would compute instead, by the name of the form that it is converted to.
        after: Qualified name of an attention; the layer exists only once that is converted.
        before: The same; the layer exists only as long as that is not converted.
        note: What the comparison leaves out.
        no_form: Why there is none, where ``forms`` is empty.
    """

    fqn: str
    rule: Literal["attention", "attention_linears", "mlp", "other"]
    original: tuple[Workload, ...]
    forms: dict[str, tuple[Workload, ...]] = field(default_factory=dict)
    after: str | None = None
    before: str | None = None
    note: str | None = None
    no_form: str = "no form applies"


def linear_layer(
    fqn: str, rule: str, tokens: int, inputs: int, outputs: int, forms: Sequence[str] = SHIFT_FORMS
) -> Layer:
    """A linear that may become a shift.

    Args:
        fqn: Its qualified name.
        rule: ``attention_linears``, ``mlp`` or ``other``.
        tokens: Batch folded in.
        inputs, outputs: Features.
        forms: Forms that it may take.
    """
    found = {form: (linear(form, tokens, inputs, outputs),) for form in forms}
    dense = (linear("mult_fp32", tokens, inputs, outputs),)
    return Layer(fqn, rule, dense, found if rule != "other" else {})  # type: ignore[arg-type]


def softmax_products(b: int, tokens: int, keys: int, head_dim: int) -> tuple[Workload, Workload]:
    """The two fp32 products of softmax attention, QKᵀ and (softmax)V; the softmax is left out.

    Args:
        b: Batch × heads.
        tokens, keys: Queries and keys of a sequence.
        head_dim: Features of a head.
    """
    scores = Workload(primitive="mult", b=b, m=tokens, k=head_dim, n=keys, w_layout="kn")
    return scores, Workload(primitive="mult", b=b, m=tokens, k=keys, n=head_dim, w_layout="kn")


def plan(
    layers: Iterable[ModelLayer], shift_forms: Sequence[str] = SHIFT_FORMS, alphabet: str = "pm1"
) -> tuple[Layer, ...]:
    """The decisions that a model asks for.

    Add attention takes its keys from all tokens: where the original has fewer, one linear over all
    tokens takes the place of those for queries and for the reduced keys and values.

    Args:
        layers: Of ``profiler.model_workloads``.
        shift_forms: Forms that linears may take.
        alphabet: Binary alphabet of attention codes.
    """
    layers = list(layers)
    attentions = {layer.name: layer for layer in layers if isinstance(layer.shape, AttentionShape)}
    reduced = {
        name
        for name, layer in attentions.items()
        if isinstance(layer.shape, AttentionShape) and layer.keys != layer.shape.tokens
    }
    linears = {layer.name: layer.shape for layer in layers if isinstance(layer.shape, LinearShape)}
    found: list[Layer] = []
    for layer in layers:
        parent, _, leaf = layer.name.rpartition(".")
        if isinstance(layer.shape, AttentionShape):
            found += _attention(layer, linears, layer.name in reduced, shift_forms, alphabet)
            continue
        one = linear_layer(layer.name, layer.rule, *_sizes(layer.shape), shift_forms)
        gone = parent in reduced and leaf in ("q", "kv")
        found.append(replace(one, before=parent) if gone else one)
    return tuple(found)


def _sizes(shape: LinearShape) -> tuple[int, int, int]:
    assert isinstance(shape.m, int)
    return shape.m, shape.k, shape.n


def _attention(
    layer: ModelLayer,
    linears: dict[str, LinearShape],
    is_reduced: bool,
    shift_forms: Sequence[str],
    alphabet: str,
) -> list[Layer]:
    shape, fqn = layer.shape, layer.name
    assert isinstance(shape, AttentionShape) and layer.keys is not None
    b, tokens = shape.b, shape.tokens
    assert isinstance(b, int) and isinstance(tokens, int)
    softmax = softmax_products(b, tokens, layer.keys, shape.n)
    form = f"add_attention_{alphabet}"
    add = attention(b, tokens, shape.bits, shape.n, alphabet).both
    leaves_out = "the softmax is not counted, nor what surrounds the products in either form"
    names = (f"{fqn}.q", f"{fqn}.kv")
    if not is_reduced or not all(name in linears for name in names):
        return [Layer(fqn, "attention", softmax, {form: (add,)}, note=leaves_out)]
    q, kv = (_sizes(linears[name]) for name in names)
    merged = (q[0], q[1], q[2] + kv[2])
    inputs = tuple(linear("mult_fp32", *sizes) for sizes in (q, kv))
    whole = Layer(
        fqn,
        "attention",
        (*inputs, *softmax),
        {form: (linear("mult_fp32", *merged), add)},
        note=f"{leaves_out}, nor the original's spatial reduction",
    )
    made = linear_layer(f"{fqn}.qkv", "attention_linears", *merged, shift_forms)
    return [whole, replace(made, after=fqn)]

"""What can stand in the place of an attention, or why nothing can."""

from __future__ import annotations

from torch import nn

from reparam.add_attention import (
    AddAttention,
    LinearCore,
    dropped_parts,
    is_softmax_attention,
    refusal,
)
from reparam.attention_structure import AttentionTrace
from reparam.coded_attention import with_core
from reparam.conversion_rules import LayerConfig
from reparam.kernelised_hashing import KernelisedHash
from reparam.quadratic_attention import QuadraticCore

# What was made and its name, or None and the reason.
Attempt = tuple[nn.Module | None, str]


def linear_form(module: nn.Module, traced: AttentionTrace, options: LayerConfig) -> Attempt:
    """Linear attention in place of a module, or None with the reason."""
    what = f"add attention ({_codes(options)})"
    plain = traced.tokens_in and not traced.masked and not traced.over_channels
    if plain and is_softmax_attention(module) and refusal(module) is None:
        hashing = _hashing(module, traced, options)
        dropped = dropped_parts(module)
        without = f", without spatial reduction ({', '.join(dropped)})" if dropped else ""
        return AddAttention.from_attention(module, options.alphabet, hashing), what + without
    if reason := _linear_refusal(traced, options):
        return None, reason
    heads = _heads(module, traced)
    core = LinearCore(
        heads, options.alphabet, _hashing(module, traced, options), options.drop_bias
    ).to(next(module.parameters()))
    without = ", without position bias and mask" if traced.masked else ""
    made = with_core(module, core.train(module.training))
    return made, f"{what} inside of {type(module).__name__}{without}"


def _linear_refusal(traced: AttentionTrace, options: LayerConfig) -> str | None:
    if traced.over_channels:
        return "compares channels, not tokens: it is linear in the tokens already"
    if not traced.fused:
        return "takes a softmax of its own of its scores; the quadratic form keeps that"
    if traced.queries[-2] != traced.keys[-2]:
        return "queries are not of the same tokens as keys; the quadratic form keeps that"
    if traced.masked and not options.drop_bias:
        return (
            "has a position bias or mask, which linear attention would lose: drop_bias drops it,"
            " the quadratic form keeps it"
        )
    return None


def quadratic_form(module: nn.Module, traced: AttentionTrace, options: LayerConfig) -> Attempt:
    """Quadratic attention on codes inside of a module, or None with the reason."""
    if options.similarity == "angular" and not traced.fused:
        return None, "takes a softmax of its own of its scores, which angular similarity is not"
    if options.hashing == "kernelised" and traced.over_channels:
        return None, "compares channels, which hash functions of tokens are not for"
    hashing = _hashing(module, traced, options)
    core = QuadraticCore(options.alphabet, options.similarity, hashing)
    made = with_core(
        module, core.to(next(module.parameters())).train(module.training), traced.scores
    )
    return made, f"quadratic attention ({_codes(options)}, {options.similarity})"


def _hashing(module: nn.Module, traced: AttentionTrace, options: LayerConfig) -> nn.Module | None:
    if options.hashing == "sign":
        return None
    return KernelisedHash(
        _heads(module, traced),
        traced.queries[-1],
        options.alphabet,
        options.hash_bits,
        options.hash_anchors,
    )


def _codes(options: LayerConfig) -> str:
    kernelised = f", {options.hash_bits} bits by kernelised hashing"
    return options.alphabet + (kernelised if options.hashing == "kernelised" else "")


def _heads(module: nn.Module, traced: AttentionTrace) -> int:
    """Heads, where the third dimension from the end is theirs and not that of windows."""
    known = {getattr(module, name, None) for name in ("num_heads", "heads")}
    return traced.heads if traced.heads in known else 1

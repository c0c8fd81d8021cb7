"""The models of a fine-tuning run against each other: speed, accuracy, tokens on shift."""

from __future__ import annotations

from reparam.results import FinetuneResults, VariantResult
from reports import formats
from reports.comparisons import Ratio, speed_ratio


def original_of(results: FinetuneResults) -> VariantResult | None:
    """The variant that all others are set against."""
    return next((variant for variant in results.variants if variant.name == "original"), None)


def fastest_original(results: FinetuneResults) -> VariantResult | None:
    """The original in the fastest form that was measured: as it is, or compiled by torch."""
    measured = [
        variant
        for variant in results.variants
        if variant.name.startswith("original") and variant.latency_ms is not None
    ]
    return min(
        measured,
        key=lambda variant: variant.latency_ms.value if variant.latency_ms else 0.0,
        default=None,
    )


def unmeasured_originals(results: FinetuneResults) -> dict[str, str]:
    """Forms of the original without a latency, and why: any might have been the fastest."""
    return {
        variant.title: variant.latency_reason or "no reason given"
        for variant in results.variants
        if variant.name.startswith("original") and variant.latency_ms is None
    }


def variant_speed(results: FinetuneResults, variant: VariantResult) -> Ratio | None:
    """How many times faster a variant is than the fastest original that was measured, if any."""
    original = fastest_original(results)
    if original is None or original.latency_ms is None or variant.latency_ms is None:
        return None
    return speed_ratio(original.latency_ms, variant.latency_ms)


def assess(results: FinetuneResults, variant: VariantResult) -> str:
    """``pays``: surely faster and not surely less accurate; ``mixed``: faster, less accurate.

    Undecided is also what is faster while a form of the original has no figure; what is slower
    stays slower.
    """
    speed = variant_speed(results, variant)
    if speed is None or speed.outcome == "undecided":
        return "undecided"
    if speed.outcome == "does not pay":
        return "does not pay"
    if variant.difference is None or unmeasured_originals(results):
        return "undecided"
    return "mixed" if variant.difference.high < 0 else "pays"


def form_in_words(original: VariantResult) -> str:
    """What ran, for people."""
    compiled = original.name != "original"
    return "original under torch.compile, in fp32" if compiled else "original in fp32"


def points_in_words(variant: VariantResult) -> str:
    """The difference in top-1 with its interval."""
    if variant.difference is None:
        return "not compared"
    ends = formats.ends(variant.difference, formats.signed)
    return f"{formats.signed(variant.difference.value)} points {ends}"


def shift_share(variant: VariantResult) -> float | None:
    """Share of tokens on shift experts in percent, the mean over the MoE layers."""
    shares = [
        sum(share for expert, share in layer.share.items() if expert.startswith("shift"))
        for layer in variant.dispatch
    ]
    return 100 * sum(shares) / len(shares) if shares else None

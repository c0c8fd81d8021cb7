"""Does it pay here? The sentence and the key figures, computed from the run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from profiler.device import DeviceInfo
from reparam.ablation_results import AblationResults
from reparam.results import FinetuneResults, VariantResult
from reparam.versus_torch_result import VersusTorch
from reports import formats
from reports.comparisons import (
    Comparison,
    Ratio,
    compare,
    count_outcomes,
    median_own_mult,
    outcomes_in_words,
    settings,
    speed_ratio,
)
from reports.html import Card, Verdict
from reports.rival_section import least_speedup, rival_sentence
from reports.run_folder import RunFolder


def short_label(device: DeviceInfo) -> str:
    """The device's name and threads; its vector extensions stand in the table of the machine."""
    return (
        f"{device.name}, {device.threads} thread{'s' * (device.threads != 1)}"
        if device.kind == "cpu"
        else device.name
    )


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


def variant_speed(results: FinetuneResults, variant: VariantResult) -> Ratio | None:
    """How many times faster a variant is than the fastest original; None if one is unmeasured."""
    original = fastest_original(results)
    if original is None or original.latency_ms is None or variant.latency_ms is None:
        return None
    return speed_ratio(original.latency_ms, variant.latency_ms)


def assess(results: FinetuneResults, variant: VariantResult) -> str:
    """``pays``: surely faster and not surely less accurate; ``mixed``: faster, less accurate."""
    speed = variant_speed(results, variant)
    if speed is None or speed.outcome == "undecided":
        return "undecided"
    if speed.outcome == "does not pay":
        return "does not pay"
    if variant.difference is None:
        return "undecided"
    return "mixed" if variant.difference.high < 0 else "pays"


def main_setting(run: RunFolder) -> list[Comparison]:
    """The comparisons that the verdict rests on: the main device, hot before cold."""
    main = run.device.fingerprint if run.device else None
    found = settings(compare(run.rows or ()), main)
    return found[0] if found and found[0][0].device.fingerprint == main else []


_OPENING = {
    "pays": "It pays here",
    "does not pay": "It does not pay here",
    "mixed": "It pays in time but costs accuracy here",
    "undecided": "Not decided here",
}


def _model_sentence(results: FinetuneResults, variant: VariantResult, status: str) -> str:
    original = fastest_original(results)
    speed = variant_speed(results, variant)
    where = (
        f"on {short_label(results.device)}, “{variant.title}” of {results.model}, trained on "
        f"{results.data},"
    )
    if speed is None or original is None or original.latency_ms is None or not variant.latency_ms:
        unmeasured = original_of(results)
        why_not = unmeasured.latency_reason if unmeasured else None
        reason = variant.latency_reason or why_not or "no original was measured"
        return f"Not decided here: {where} has no measured latency to compare ({reason})."
    sentence = (
        f"{_OPENING[status]}: {where} takes {formats.significant(variant.latency_ms.value)} ms "
        f"a batch of {results.deploy_batch} against "
        f"{formats.significant(original.latency_ms.value)} ms for the "
        f"{_form_of(original)}, "
        f"{formats.significant(speed.value)}× its speed {formats.ends(speed)}"
    )
    if status == "undecided" and speed.outcome == "undecided":
        sentence += ", a difference within the measurement's uncertainty"
    accuracy = variant.deployed_top1
    if accuracy is None:
        return f"{sentence}; its deployed top-1 was not measured."
    changed = f", {_points(variant)}" if variant.difference else ""
    return f"{sentence}, at {accuracy.value:.2f}\u00a0% top-1{changed}."


def _form_of(original: VariantResult) -> str:
    compiled = original.name != "original"
    return "original under torch.compile, in fp32" if compiled else "original in fp32"


def _points(variant: VariantResult) -> str:
    if variant.difference is None:
        return "not compared"
    ends = formats.ends(variant.difference, formats.signed)
    return f"{formats.signed(variant.difference.value)} points {ends}"


def _kernel_sentences(comparisons: Sequence[Comparison]) -> tuple[str, ...]:
    counted = outcomes_in_words(comparisons)
    if not counted:
        return ()
    sentences = (
        "Kernel by kernel, ours without multiplications beat every multiplication measured, the "
        f"baselines' and our own: {counted}.",
    )
    own = median_own_mult(comparisons)
    if own is None:
        return sentences
    return (
        *sentences,
        f"What the shift itself brings: int8 shift runs at {formats.significant(own.value)}× the "
        f"speed of our own mult, the faster of 8 and 7 bits (median; "
        f"{formats.significant(own.low or 0)}× to {formats.significant(own.high or 0)}× over the "
        "products).",
    )


def _weights_sentence(results: FinetuneResults) -> str:
    original, last = original_of(results), results.variants[-1]
    if original is None or original is last:
        return ""
    change = 100 * (last.weight_bytes / original.weight_bytes - 1)
    return (
        f"Its weights take {formats.bytes_text(last.weight_bytes)} against "
        f"{formats.bytes_text(original.weight_bytes)} ({formats.signed(change, 0)} %)."
    )


def _others_sentence(run: RunFolder) -> str:
    """Names the models on the page that the verdict is not about."""
    named = run.results.model if run.results else None
    others = [f"{model} ({file})" for model, file in run.models.items() if model != named]
    return f"Other models on this page: {', '.join(others)}." if others else ""


def _rival_sentences(run: RunFolder) -> list[str]:
    return [rival_sentence(one) for one in run.versus_torch.comparisons] if run.versus_torch else []


def _rivals_verdict(run: RunFolder, found: VersusTorch, kernels: tuple[str, ...]) -> Verdict:
    """On whole models whose accuracy nobody measured: faster in time is not yet that it pays."""
    ratios = [one.speedup[name] for one in found.comparisons if (name := least_speedup(one))]
    if ratios and all(ratio.low > 1 for ratio in ratios):
        status, opening = "mixed", "It is faster here, at an accuracy that was not measured"
    elif ratios and all(ratio.high < 1 for ratio in ratios):
        status, opening = "does not pay", "It does not pay here"
    elif any(ratio.low > 1 for ratio in ratios):
        status, opening = "mixed", "It depends on the batch here"
    else:
        status, opening = "undecided", "Not decided here"
    first, *rest = _rival_sentences(run)
    headline = f"{opening}: on {short_label(found.device)}, {first}"
    return Verdict(status, headline, (*rest, *kernels))  # type: ignore[arg-type]


def _ablation_verdict(found: AblationResults, kernels: tuple[str, ...]) -> Verdict | None:
    """On variants over several seeds, whose original was timed in one form only; None without any.

    A variant that is slower than that form does not pay; one that is faster may still be slower
    than PyTorch's fastest.
    """
    timed = [
        one
        for one in found.summaries
        if one.latency_ratio is not None and one.difference_mean is not None
    ]
    best = min(timed, key=lambda one: one.latency_ratio or math.inf, default=None)
    if best is None:
        return None
    ratio, difference = best.latency_ratio_interval, best.difference
    if ratio is None or difference is None:
        why_not = "an ablation of one seed has no intervals"
        return Verdict("undecided", f"Not decided here: {why_not}.", kernels)
    slower = all(one.latency_ratio_interval.low > 1 for one in timed if one.latency_ratio_interval)
    opening = (
        "It does not pay here"
        if slower
        else "Not decided here: an ablation does not measure PyTorch's fastest form of the original"
    )
    headline = (
        f"{opening}. On {short_label(found.device)}, the fastest of {len(timed)} variants of "
        f"{found.model} on {found.data}, “{best.title}”, takes {formats.significant(ratio.value)} "
        f"of the latency of the original in fp32 {formats.ends(ratio)}, at "
        f"{formats.signed(difference.value)} points of top-1 "
        f"{formats.ends(difference, formats.signed)}, over {best.seeds} seeds."
    )
    return Verdict("does not pay" if slower else "undecided", headline, kernels)


def decide(run: RunFolder) -> Verdict:
    """The verdict on the last variant; without one on whole models, kernels or an ablation."""
    comparisons = main_setting(run)
    kernels = _kernel_sentences(comparisons)
    results = run.results
    if results and results.variants:
        last = results.variants[-1]
        status = assess(results, last)
        better = [v for v in results.variants[1:-1] if assess(results, v) == "pays"]
        beside = (_weights_sentence(results), _others_sentence(run), *_rival_sentences(run))
        details = [text for text in (*beside, *kernels) if text]
        headline = _model_sentence(results, last, status)
        if better and status != "pays":
            names = ", ".join(f"“{variant.title}”" for variant in better)
            headline = headline.replace(_OPENING[status], "Mixed", 1)
            details.insert(0, f"What does pay: {names}.")
            status = "mixed"
        return Verdict(status, headline, tuple(details))  # type: ignore[arg-type]
    if run.versus_torch and run.versus_torch.comparisons:
        return _rivals_verdict(run, run.versus_torch, kernels)
    counts = count_outcomes(comparisons)
    total = sum(counts.values())
    if not total or not run.device:
        ablated = _ablation_verdict(run.ablation, kernels) if run.ablation else None
        return ablated or Verdict(
            "undecided", "Not decided here: nothing to compare was measured.", kernels
        )
    if counts["undecided"] == total:
        status, opening = "undecided", "Not decided here"
    elif counts["pays"] == total:
        status, opening = "pays", "Kernel by kernel it pays here"
    elif not counts["pays"]:
        status, opening = "does not pay", "It does not pay here"
    else:
        status, opening = "mixed", "It depends on the product here"
    headline = (
        f"{opening}: on {short_label(run.device)}, ours beat every multiplication measured: "
        f"{outcomes_in_words(comparisons)}."
    )
    return Verdict(status, headline, (*kernels[1:], "No model was fine-tuned in this run."))  # type: ignore[arg-type]


def shift_share(variant: VariantResult) -> float | None:
    """Share of tokens on shift experts in percent, the mean over the MoE layers."""
    shares = [
        sum(share for expert, share in layer.share.items() if expert.startswith("shift"))
        for layer in variant.dispatch
    ]
    return 100 * sum(shares) / len(shares) if shares else None


def held_out_mape(run: RunFolder, column: str = "mape") -> float | None:
    """An error column of fit.json, the mean over the held-out rows, in percent."""
    fits = [fit for fit in run.fit.fits if getattr(fit, column) is not None] if run.fit else []
    rows = sum(fit.rows_test for fit in fits)
    return sum(getattr(fit, column) * fit.rows_test for fit in fits) / rows if rows else None


def extrapolated_in_words(run: RunFolder) -> str:
    """The error apart for rows beyond the sizes that were learned from; empty without such."""
    fits = run.fit.fits if run.fit else ()
    inside = [fit.inside for fit in fits if fit.inside]
    outside = [fit.outside for fit in fits if fit.outside]
    if not outside:
        return ""
    parts = [
        f"{formats.percent(sum(one.mape * one.rows for one in part) / rows)} on the {rows} {where}"
        for part, where in (
            (inside, "inside the sizes that were learned from"),
            (outside, "beyond them"),
        )
        if (rows := sum(one.rows for one in part))
    ]
    return ", ".join(parts)


def key_figures(run: RunFolder) -> tuple[Card, ...]:
    """The six figures on top; a dash and its reason where one is missing."""
    return (*_model_cards(run), _own_mult_card(run), _fit_card(run))


def _model_cards(run: RunFolder) -> tuple[Card, ...]:
    labels = ("Top-1, deployed", "Latency, measured", "Weight bytes", "Share of tokens on shift")
    results = run.results
    if results is None or not results.variants:
        top1, _, *others = (
            Card(label, formats.DASH, "no results.json in this run") for label in labels
        )
        return (top1, _rival_card(labels[1], run.versus_torch), *others)
    original, last = original_of(results), results.variants[-1]
    fastest = fastest_original(results)
    accuracy, speed, share = last.deployed_top1, variant_speed(results, last), shift_share(last)
    base = (original.deployed_top1 or original.top1) if original else None
    against = f"original {base.value:.2f} %" if base else "no original"
    return (
        Card(
            labels[0],
            f"{accuracy.value:.2f} %" if accuracy else formats.DASH,
            f"{against}; {_points(last)}, paired"
            if accuracy and last.difference
            else "not deployed",
        ),
        Card(
            f"{labels[1]}, batch {results.deploy_batch}",
            f"{formats.significant(last.latency_ms.value)} ms" if last.latency_ms else formats.DASH,
            f"{_form_of(fastest)} {formats.significant(fastest.latency_ms.value)} ms; "
            f"{formats.significant(speed.value)}× its speed {formats.ends(speed)}"
            if speed and fastest and fastest.latency_ms
            else last.latency_reason or "the original was not measured",
        ),
        Card(
            labels[2],
            formats.bytes_text(last.weight_bytes),
            f"original {formats.bytes_text(original.weight_bytes)}; "
            f"{formats.significant(100 * last.weight_bytes / original.weight_bytes)} % of it"
            if original
            else "no original",
        ),
        Card(
            labels[3],
            formats.percent(share),
            f"mean of {len(last.dispatch)} MoE layers" if last.dispatch else "no MoE layer",
        ),
    )


def _rival_card(label: str, found: VersusTorch | None) -> Card:
    """The first model that was set against PyTorch's, in the form of ours that gains least."""
    one = next(iter(found.comparisons), None) if found else None
    name = least_speedup(one) if one else None
    if one is None or name is None:
        return Card(label, formats.DASH, "no results.json in this run")
    known = {way.name: way.latency_ms.value for way in one.contestants if way.latency_ms}
    ratio = one.speedup[name]
    return Card(
        f"{label}, batch {one.batch}",
        f"{formats.significant(known[name])} ms",
        f"{one.best_torch} {formats.significant(known[one.best_torch or ''])} ms; "
        f"{formats.significant(ratio.value)}× its speed {formats.ends(ratio)}",
    )


def _own_mult_card(run: RunFolder) -> Card:
    own = median_own_mult(main_setting(run))
    label = "What shift brings over our own mult"
    if own is None:
        return Card(label, formats.DASH, "int8 shift and mult were not both measured")
    return Card(
        label,
        f"{formats.significant(own.value)}×",
        f"the faster of 8 and 7 bits, median speed ratio; {formats.significant(own.low or 0)}× to "
        f"{formats.significant(own.high or 0)}× over the products",
    )


def _fit_card(run: RunFolder) -> Card:
    label, error = "Latency model, held-out error (MAPE)", held_out_mape(run)
    if error is None:
        reason = "no fit.json in this run" if run.fit is None else "no held-out rows"
        return Card(label, formats.DASH, reason)
    roofline = formats.percent(held_out_mape(run, "mape_roofline"))
    nearest = formats.percent(held_out_mape(run, "mape_nearest"))
    apart = extrapolated_in_words(run)
    return Card(
        label,
        formats.percent(error),
        (f"{apart}; " if apart else "") + f"roofline {roofline}, nearest neighbour {nearest}",
    )

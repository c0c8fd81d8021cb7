"""Does it pay here? The sentence, computed from the run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from reparam.ablation_results import AblationResults
from reparam.results import FinetuneResults, VariantResult
from reparam.versus_torch_result import VersusTorch
from reports import formats
from reports.comparisons import (
    Comparison,
    count_outcomes,
    main_setting,
    median_own_mult,
    outcomes_in_words,
    own_mults_in_words,
)
from reports.formats import short_label
from reports.html import Verdict
from reports.rival_section import absent_of_torch, least_speedup, rival_sentence
from reports.run_folder import RunFolder
from reports.whole_models import (
    assess,
    fastest_original,
    form_in_words,
    original_of,
    points_in_words,
    unmeasured_originals,
    variant_speed,
)

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
        f"{form_in_words(original)}, "
        f"{formats.significant(speed.value)}× its speed {formats.ends(speed)}"
    )
    if status == "undecided" and speed.outcome == "undecided":
        sentence += ", a difference within the measurement's uncertainty"
    elif status == "undecided" and (absent := unmeasured_originals(results)):
        names = "; ".join(f"{title}: {reason}" for title, reason in absent.items())
        sentence += f", but another form of it was not measured ({names})"
    accuracy = variant.deployed_top1
    if accuracy is None:
        return f"{sentence}; its deployed top-1 was not measured."
    changed = f", {points_in_words(variant)}" if variant.difference else ""
    return f"{sentence}, at {accuracy.value:.2f}\u00a0% top-1{changed}."


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
        f"speed of our own mult{own_mults_in_words(comparisons)} (median; "
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
    is_whole = not any(absent_of_torch(one) for one in found.comparisons)
    if ratios and all(ratio.low > 1 for ratio in ratios) and is_whole:
        status, opening = "mixed", "It is faster here, at an accuracy that was not measured"
    elif ratios and all(ratio.high < 1 for ratio in ratios):
        status, opening = "does not pay", "It does not pay here"
    elif any(ratio.low > 1 for ratio in ratios) and is_whole:
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
    comparisons = main_setting(run.rows or (), run.device)
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
    if counts["pays"] == total:
        status, opening = "pays", "Kernel by kernel it pays here"
    elif counts["does not pay"] == total:
        status, opening = "does not pay", "It does not pay here"
    elif counts["pays"]:
        status, opening = "mixed", "It depends on the product here"
    else:
        status, opening = "undecided", "It is not shown to pay here"
    headline = (
        f"{opening}: on {short_label(run.device)}, ours beat every multiplication measured: "
        f"{outcomes_in_words(comparisons)}."
    )
    untrained = () if run.ablation else ("No model was fine-tuned in this run.",)
    return Verdict(status, headline, (*kernels[1:], *untrained))  # type: ignore[arg-type]

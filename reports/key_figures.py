"""The key figures on top of the page, computed from the run."""

from __future__ import annotations

from reparam.versus_torch_result import VersusTorch
from reports import formats
from reports.comparisons import main_setting, median_own_mult, own_mults_in_words
from reports.fit_errors import extrapolated_in_words, held_out_mape
from reports.html import Card
from reports.rival_section import least_speedup
from reports.run_folder import RunFolder
from reports.whole_models import (
    fastest_original,
    form_in_words,
    original_of,
    points_in_words,
    shift_share,
    unmeasured_originals,
    variant_speed,
)


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
    absent = "".join(f"; {title} was not measured" for title in unmeasured_originals(results))
    accuracy, speed, share = last.deployed_top1, variant_speed(results, last), shift_share(last)
    base = (original.deployed_top1 or original.top1) if original else None
    against = f"original {base.value:.2f} %" if base else "no original"
    return (
        Card(
            labels[0],
            f"{accuracy.value:.2f} %" if accuracy else formats.DASH,
            f"{against}; {points_in_words(last)}, paired"
            if accuracy and last.difference
            else "not deployed",
        ),
        Card(
            labels[1],
            f"{formats.significant(last.latency_ms.value)} ms" if last.latency_ms else formats.DASH,
            f"batch {results.deploy_batch}; {form_in_words(fastest)} "
            f"{formats.significant(fastest.latency_ms.value)} ms; "
            f"{formats.significant(speed.value)}× its speed {formats.ends(speed)}{absent}"
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
    ratio, best_ms = one.speedup[name], known[one.best_torch or ""]
    return Card(
        label,
        f"{formats.significant(known[name])} ms",
        f"batch {one.batch}; {one.best_torch} {formats.significant(best_ms)} ms; "
        f"{formats.significant(ratio.value)}× its speed {formats.ends(ratio)}",
    )


def _own_mult_card(run: RunFolder) -> Card:
    comparisons = main_setting(run.rows or (), run.device)
    own = median_own_mult(comparisons)
    label = "What shift brings over our own mult"
    if own is None:
        return Card(
            label, formats.DASH, "int8 shift and mult were not both measured on this device"
        )
    return Card(
        label,
        f"{formats.significant(own.value)}×",
        f"our mult{own_mults_in_words(comparisons)}; median speed ratio, "
        f"{formats.significant(own.low or 0)}× to {formats.significant(own.high or 0)}× over the "
        "products",
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

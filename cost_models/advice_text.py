"""Advice for people: the verdict, what it brings, and the layers that can be told apart."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from cost_models.advice_result import Advice, Decision, Interval
from cost_models.break_even import BreakEven


def lines(advice: Advice) -> Iterator[str]:
    """The verdict and the figures of the whole model, one sentence a line."""
    where = f" on {advice.device.label}" if advice.device else ""
    yield f"{advice.verdict}: {advice.model} at batch {advice.batch}{where}: {advice.reason}"
    totals = advice.totals
    if totals and totals.saved_ms:
        yield f"latency saved: {_interval(totals.saved_ms)} ms a batch, " + (
            f"of {_interval(totals.original_ms)} ms in the strongest baselines"
            if totals.original_ms
            else "the original's is not known"
        )
        if totals.uncounted:
            yield f"not counted in the original: {totals.uncounted} products without a baseline"
    if totals and totals.converted:
        energy = totals.energy_saved_mj
        said = "unknown" if energy is None else f"{energy:.3g} mJ a batch, {totals.energy_source}"
        yield f"energy saved: {said}; a modelled figure is good for its sign and has no interval"
        yield (
            f"weights: {totals.fp32_weight_bytes:,} bytes as trained, "
            f"{totals.weight_bytes:,} as advised"
        )
    own = Counter(
        one.against_own_mult.verdict
        for one in advice.decisions
        if one.verdict == "pays" and one.against_own_mult
    )
    if own:
        counted = ", ".join(f"{number} {verdict}" for verdict, number in own.items())
        yield f"what the shift itself brings, against our own bf16 or int8 mult: {counted}"
    for reason, number in Counter(_unknown_reasons(advice)).most_common(3):
        yield f"unknown ({number}): {reason}"
    if advice.caution:
        yield f"caution: {advice.caution}"
    for command in advice.measure:
        yield f"measure: {command}"


def _unknown_reasons(advice: Advice) -> Iterator[str]:
    return (one.reason for one in advice.decisions if one.verdict == "unknown")


def decision_table(advice: Advice) -> Table:
    """One line for the layers of a stage that are alike."""
    table = Table(
        caption="µs: strongest baseline → converted, ~ extrapolated, ≥ a bound; over torch: speed "
        "over that baseline; over mult: over our own bf16 or int8; same: over torch's form of the "
        "same linear attention; tokens: where it is faster",
        box=SIMPLE,
        padding=0,
    )
    table.add_column("layers", overflow="fold")
    for heading in ("number", "verdict", "form", "µs", "over torch", "over mult", "same", "tokens"):
        table.add_column(heading, justify="right", no_wrap=True)
    alike = Counter((_pattern(one.fqn), one.verdict, *_cells(one)) for one in advice.decisions)
    for (pattern, *cells), number in alike.items():
        table.add_row(escape(pattern), str(number), *(escape(cell) for cell in cells))
    return table


def _pattern(fqn: str) -> str:
    """The last number of a qualified name, which counts the blocks, as a star."""
    return re.sub(r"\.\d+\.(?!.*\.\d+\.)", ".*.", fqn)


def _cells(one: Decision) -> tuple[str, ...]:
    new, old = one.converted, one.original
    mark = "~" if "extrapolated" in (old.source, new.source if new else "") else ""
    before = f"{1e3 * old.latency_ms:.0f}" if old.latency_ms else f"≥{1e3 * old.low_ms:.0f}"
    after = f"{1e3 * new.latency_ms:.0f}" if new and new.latency_ms else "?"
    ratios = (one.against_baseline, one.against_own_mult, one.against_same_product)
    return (
        one.form or "-",
        f"{mark}{before} → {after}",
        *(f"{r.speed.value:.2f}" if r and r.speed else "-" for r in ratios),
        _tokens(one.break_even),
    )


def _tokens(found: BreakEven | None) -> str:
    if found is None or found.where == "unknown":
        return "-"
    if found.where in ("above", "below"):
        return f"{'≥' if found.where == 'above' else '<'} {found.tokens}"
    if found.where == "mixed":
        return f"changes at {found.tokens}"
    return f"{found.where} in {found.first_tokens}…{found.last_tokens}"


def _interval(found: Interval) -> str:
    return f"{found.value:.3g} [{found.low:.3g}, {found.high:.3g}]"

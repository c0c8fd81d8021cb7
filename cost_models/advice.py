"""Advice: which layers of a model to convert to what on a device. Pure functions.

layers = conversion_plan.plan(model_layers("pvt_v2_b0", batch=1))
advice = advise(layers, LatencyTable.load("latency_table.json"))
reparameterize_(model, config, filter_fn=advice.allows)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from cost_models.advice_result import Advice, Comparison, Decision, Interval, Totals, Verdict
from cost_models.break_even import BreakEven, break_even
from cost_models.conversion_plan import Layer
from cost_models.latency_table import LatencyTable
from cost_models.layer_cost import Cost, CostModel
from kernels.workload import Workload


def advise(
    layers: Iterable[Layer],
    table: LatencyTable,
    model: str = "model",
    batch: int = 1,
    table_name: str | None = None,
    strict: bool = False,
    with_break_even: bool = True,
) -> Advice:
    """Decides layer by layer. Nothing is trained, measured or read.

    Args:
        layers: Of ``conversion_plan.plan``, or made by hand.
        table: Of the device.
        model, batch, table_name: For the record.
        strict: Refuse shapes outside of what was measured: they become unknown.
        with_break_even: Whether to search the token counts as well, which takes longest.
    """
    costs = CostModel(table, strict)
    found: dict[str, Decision] = {}
    others: list[Layer] = []
    searched: dict[tuple[object, ...], BreakEven] = {}
    for layer in layers:
        if layer.after and not _converts(found, layer.after):
            continue
        if layer.before and _converts(found, layer.before):
            continue
        if layer.rule == "other":
            others.append(layer)
            continue
        decision = decide(layer, costs)
        if with_break_even and layer.rule != "attention" and decision.form:
            decision = decision.model_copy(
                update={"break_even": _break_even(layer, decision.form, costs, searched)}
            )
        found[layer.fqn] = decision
    decisions = tuple(found.values())
    verdict, reason = _verdict(decisions)
    return Advice(
        model=model,
        batch=batch,
        device=table.device,
        table=table_name,
        table_sha256=table.sha256,
        strict=strict,
        verdict=verdict,
        reason=reason,
        decisions=decisions,
        totals=_totals(decisions, others, costs),
        caution=table.caution,
    )


def decide(layer: Layer, costs: CostModel) -> Decision:
    """One layer, without its break-even."""
    original = costs.strongest_baseline(layer.original)
    known = {form: costs.ours(workloads) for form, workloads in layer.forms.items()}
    answered = {form: cost for form, cost in known.items() if cost.latency_ms is not None}
    form = _best_form(answered, original) or next(iter(known), None)
    converted = known[form] if form else None
    against = compare(original, converted, layer.no_form)
    own = None
    if converted and layer.rule != "attention":
        own = compare(costs.own_mult(layer.original), converted)
    same = None
    if form and converted and layer.rule == "attention":
        same = compare(costs.strongest_baseline(layer.forms[form]), converted)
    saved, source = _energy_saved(original, converted)
    return Decision(
        fqn=layer.fqn,
        rule=layer.rule,
        form=form,
        verdict=against.verdict,
        reason=against.reason or _in_words(against),
        original=original,
        converted=converted,
        against_baseline=against,
        against_own_mult=own,
        against_same_product=same,
        break_even=None,
        fp32_weight_bytes=sum(workload.weight_bytes for workload in layer.original),
        energy_saved_mj=saved,
        energy_source=source,
        note=layer.note,
    )


def compare(original: Cost, new: Cost | None, no_form: str = "no form applies") -> Comparison:
    """``pays`` if the whole interval of the new lies below the original's, and the other way."""
    if new is None:
        return Comparison(speed=None, verdict="unknown", reason=no_form)
    if new.latency_ms is None or new.high_ms is None:
        return Comparison(speed=None, verdict="unknown", reason=new.reason)
    speed = None
    if original.latency_ms is not None and original.high_ms is not None:
        speed = Interval(
            value=original.latency_ms / new.latency_ms,
            low=original.low_ms / new.high_ms,
            high=original.high_ms / new.low_ms,
        )
    if new.high_ms < original.low_ms:
        return Comparison(speed=speed, verdict="pays")
    if original.high_ms is not None and original.high_ms < new.low_ms:
        return Comparison(speed=speed, verdict="does not pay")
    reason = original.reason or "the two intervals overlap"
    return Comparison(speed=speed, verdict="unknown", reason=reason)


def _in_words(comparison: Comparison) -> str:
    speed = comparison.speed
    if speed is None:
        return "faster than a baseline at the fastest rate that any reached in the table"
    return f"{speed.value:.2f}× the strongest baseline [{speed.low:.2f}, {speed.high:.2f}]"


def _best_form(answered: dict[str, Cost], original: Cost) -> str | None:
    if not answered:
        return None
    pays = {f: cost for f, cost in answered.items() if compare(original, cost).verdict == "pays"}
    among = pays or answered
    fastest = min(among.values(), key=lambda cost: cost.latency_ms or 0.0)
    alike = [form for form, cost in among.items() if cost.low_ms <= (fastest.high_ms or 0.0)]
    return min(alike, key=lambda form: (among[form].weight_bytes, among[form].latency_ms))


def _energy_saved(
    original: Cost, converted: Cost | None
) -> tuple[float | None, Literal["measured", "modelled"] | None]:
    if converted is None:
        return None, None
    if original.energy_source == converted.energy_source == "measured":
        return (original.energy_mj or 0.0) - (converted.energy_mj or 0.0), "measured"
    before, after = original.modelled_energy_mj, converted.modelled_energy_mj
    if before is None or after is None:
        return None, None
    return before - after, "modelled"


def _converts(found: dict[str, Decision], fqn: str) -> bool:
    return fqn in found and found[fqn].verdict == "pays"


def _break_even(
    layer: Layer, form: str, costs: CostModel, searched: dict[tuple[object, ...], BreakEven]
) -> BreakEven:
    (dense,), (new,) = layer.original, layer.forms[form]
    key = (form, dense.k, dense.n)
    if key not in searched:

        def at(tokens: int) -> tuple[Cost, Cost]:
            pair: list[Workload] = [one.with_sizes(m=tokens) for one in (dense, new)]
            return costs.strongest_baseline(pair[:1]), costs.ours(pair[1:])

        searched[key] = break_even(at)
    return searched[key]


def _verdict(decisions: tuple[Decision, ...]) -> tuple[Verdict, str]:
    counted = {
        verdict: sum(one.verdict == verdict for one in decisions)
        for verdict in ("pays", "does not pay", "unknown")
    }
    if not decisions:
        return "unknown", "no layer of this model was recognised: no rule covers any"
    split = ", ".join(f"{verdict}: {number}" for verdict, number in counted.items() if number)
    if counted["pays"]:
        return "pays", f"convert {counted['pays']} of {len(decisions)} layers ({split})"
    if counted["unknown"]:
        return "unknown", f"convert none before more is measured ({split})"
    return "does not pay", f"convert none: no layer would surely be faster ({split})"


def _totals(decisions: tuple[Decision, ...], others: list[Layer], costs: CostModel) -> Totals:
    taken = [one for one in decisions if one.verdict == "pays" and one.converted]
    rest = [costs.strongest_baseline(layer.original) for layer in others]
    counted = [c for c in [one.original for one in decisions] + rest if c.latency_ms is not None]
    energies = [one.energy_saved_mj for one in taken if one.energy_saved_mj is not None]
    sources = {one.energy_source for one in taken}
    kept_bytes = sum(w.weight_bytes for layer in others for w in layer.original)
    # The linears inside a converted attention are decisions of their own.
    linears = [one for one in decisions if one.rule != "attention"]
    return Totals(
        layers=len(decisions),
        converted=len(taken),
        unknown=sum(one.verdict == "unknown" for one in decisions),
        saved_ms=_saved(taken) if taken else None,
        original_ms=_summed(counted) if counted else None,
        uncounted=len(decisions) + len(rest) - len(counted),
        energy_saved_mj=sum(energies) if taken and len(energies) == len(taken) else None,
        energy_source=sources.pop() if len(sources) == 1 else "modelled" if sources else None,
        fp32_weight_bytes=kept_bytes + sum(one.fp32_weight_bytes for one in linears),
        weight_bytes=kept_bytes + sum(_bytes_as_advised(one) for one in linears),
    )


def _bytes_as_advised(one: Decision) -> int:
    is_taken = one.verdict == "pays" and one.converted is not None
    return one.converted.weight_bytes if is_taken and one.converted else one.fp32_weight_bytes


def _saved(taken: list[Decision]) -> Interval:
    """A bound stands in for the original where it has no latency."""
    pairs = [(one.original, one.converted) for one in taken if one.converted]
    value = sum((old.latency_ms or old.low_ms) - (new.latency_ms or 0.0) for old, new in pairs)
    low = sum(old.low_ms - (new.high_ms or 0.0) for old, new in pairs)
    high = sum((old.high_ms or old.low_ms) - new.low_ms for old, new in pairs)
    return Interval(value=value, low=low, high=max(high, value))


def _summed(costs: list[Cost]) -> Interval:
    return Interval(
        value=sum(cost.latency_ms or 0.0 for cost in costs),
        low=sum(cost.low_ms for cost in costs),
        high=sum(cost.high_ms or 0.0 for cost in costs),
    )

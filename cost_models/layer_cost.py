"""What products cost on a device by its latency table: ours, and the strongest baseline."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from cost_models.latency_table import Estimate, LatencyTable, TableError
from cost_models.operation_energy import OperationEnergy, UnknownOperation, operation_energy
from kernels.forms import FORMS
from kernels.workload import Workload

# The forms in which torch multiplies, and we: what a shift has to beat.
MULT_FORMS: tuple[str, ...] = ("mult_fp32", "mult_bf16", "mult_int8")
OWN_MULT_FORMS: tuple[str, ...] = ("mult_bf16", "mult_int8", "mult_int7")

Source = Literal["measured", "predicted", "extrapolated", "bound"]
_SOURCES: tuple[Source, ...] = ("measured", "predicted", "extrapolated", "bound")

STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Cost(BaseModel):
    """Cost of one launch of one or several products, one after the other.

    Attributes:
        latency_ms: None with ``reason`` where the table cannot answer for all of them.
        low_ms, high_ms: Interval; ends of several products add up. Without a latency, ``low_ms`` is
            a bound: what the products take at least.
        source: The least sure of what it is made of; ``bound`` for a lower bound alone.
        kernels: Form and lowering of each product.
        energy_mj: Measured if ``energy_source`` says so, else the modelled one; None if unknown.
        energy_source: ``measured`` on the device, or ``modelled`` at 45 nm. It has no interval.
        modelled_energy_mj, compute_energy_mj: Modelled with memory, and of arithmetic alone.
        weight_bytes: Stored parameters in these forms.
        reason: Why there is no latency.
    """

    model_config = STRICT

    latency_ms: Annotated[float, Field(gt=0)] | None
    low_ms: Annotated[float, Field(ge=0)]
    high_ms: Annotated[float, Field(gt=0)] | None
    source: Source
    kernels: tuple[str, ...]
    energy_mj: float | None
    energy_source: Literal["measured", "modelled"] | None
    modelled_energy_mj: float | None
    compute_energy_mj: float | None
    weight_bytes: int
    reason: str | None = None


@dataclass(frozen=True)
class _Part:
    """The cost of one product, and who computes it."""

    workload: Workload
    kernel: str
    latency_ms: float | None
    low_ms: float
    high_ms: float | None
    source: Source
    measured_mj: float | None = None
    reason: str | None = None


class CostModel:
    """Answers for one table.

    Args:
        table: Of the device.
        strict: Whether to refuse shapes outside of what was measured.
    """

    def __init__(self, table: LatencyTable, strict: bool = False) -> None:
        self.table, self._strict = table, strict
        rates = [
            entry.workload.macs / entry.latency_ms for entry in table.entries if entry.is_baseline
        ]
        self._fastest_macs_per_ms = max(rates, default=None)
        self._baseline: Callable[[Workload], _Part] = lru_cache(None)(self._strongest_baseline)

    def ours(self, workloads: Sequence[Workload]) -> Cost:
        """Our fastest kernels for exactly these forms; fp32 mult among them in its fastest form."""
        return _add_up([self._ours(workload) for workload in workloads])

    def own_mult(self, workloads: Sequence[Workload]) -> Cost:
        """Our fastest multiplication of the same products, in bf16, int8 or 7 bits."""
        return _add_up([self._own_mult(workload, OWN_MULT_FORMS) for workload in workloads])

    def strongest_baseline(self, workloads: Sequence[Workload]) -> Cost:
        """The other projects' fastest for the same products: fp32, bf16 or int8.

        Of several implementations the fastest is taken end by end: the interval is that of the
        minimum. A linear in a form without a figure leaves the reason, and softmax attention, which
        is of no form, a lower bound as well.
        """
        return _add_up([self._baseline(workload) for workload in workloads])

    def _ours(self, workload: Workload) -> _Part:
        if workload.form == "mult_fp32":
            # A linear that stays is computed by whoever is fastest, before and after.
            return self._baseline(workload)
        try:
            estimate = self.table.lookup(workload, strict=self._strict)
        except TableError as error:
            return _unknown(workload, str(error))
        return _part(workload, estimate)

    def _own_mult(self, workload: Workload, forms: Iterable[str]) -> _Part:
        found = []
        for form in forms:
            other = _in_form(workload, form)
            try:
                found.append(_part(other, self.table.lookup(other, strict=self._strict)))
            except TableError:
                continue
        if not found:
            return _unknown(workload, "no bf16 or int8 mult of ours in the table")
        return _fastest(found)

    def _strongest_baseline(self, workload: Workload) -> _Part:
        form = workload.form
        alternatives = MULT_FORMS if form in MULT_FORMS else (form,)
        found: list[_Part] = []
        missing: list[str] = []
        for name in alternatives:
            other = _in_form(workload, name) if name in FORMS else workload
            known = [self._named(other, lowering) for lowering in self._lowerings(other, name)]
            answers = [part for part in known if part.latency_ms is not None]
            found += answers
            if not answers:
                missing.append(known[0].reason if known and known[0].reason else name)
        if missing:
            what = workload.product if form == "custom" else " or ".join(missing)
            return _Part(
                workload=workload,
                kernel="unknown",
                latency_ms=None,
                low_ms=self._floor_ms(workload) if form == "custom" else 0.0,
                high_ms=min((part.high_ms for part in found if part.high_ms), default=None),
                source="bound",
                reason=f"no baseline of {what} in the table",
            )
        return _fastest(found)

    def _lowerings(self, workload: Workload, form: str) -> tuple[str, ...]:
        if form in FORMS:
            return self.table.baselines(form)
        rows = (entry for entry in self.table.entries if entry.workload == workload)
        return tuple(entry.lowering for entry in rows if entry.is_baseline)

    def _named(self, workload: Workload, lowering: str) -> _Part:
        try:
            return _part(workload, self.table.lookup(workload, lowering, self._strict))
        except TableError as error:
            return _unknown(workload, str(error))

    def _floor_ms(self, workload: Workload) -> float:
        """What the work takes at the fastest rate that any baseline reached on the device.

        Zero where a form of baseline is missing: that one might have been the fastest.
        """
        if self._fastest_macs_per_ms is None or not all(map(self.table.baselines, MULT_FORMS)):
            return 0.0
        return workload.macs / self._fastest_macs_per_ms


def _in_form(workload: Workload, form: str) -> Workload:
    """The same linear in another form."""
    sizes = {name: getattr(workload, name) for name in ("b", "m", "k", "n")}
    return Workload(**sizes, **FORMS[form])


def _part(workload: Workload, estimate: Estimate) -> _Part:
    return _Part(
        workload=workload,
        kernel=f"{workload.form} {estimate.lowering}",
        latency_ms=estimate.latency_ms,
        low_ms=estimate.low_ms,
        high_ms=estimate.high_ms,
        source=estimate.source,
        measured_mj=estimate.energy_mj if estimate.energy_source == "measured" else None,
    )


def _unknown(workload: Workload, reason: str) -> _Part:
    return _Part(workload, "unknown", None, 0.0, None, "bound", reason=reason)


def _fastest(found: list[_Part]) -> _Part:
    """The fastest of several, with the interval of the minimum."""
    best = min(found, key=lambda part: part.latency_ms or 0.0)
    return _Part(
        workload=best.workload,
        kernel=best.kernel,
        latency_ms=best.latency_ms,
        low_ms=min(part.low_ms for part in found),
        high_ms=min(part.high_ms or 0.0 for part in found),
        source=best.source,
        measured_mj=best.measured_mj,
    )


def _add_up(parts: list[_Part]) -> Cost:
    reasons = [part.reason for part in parts if part.reason]
    highs = [part.high_ms for part in parts if part.high_ms is not None]
    measured = [part.measured_mj for part in parts if part.measured_mj is not None]
    is_measured = len(measured) == len(parts)
    modelled = [_modelled(part.workload) for part in parts]
    known = [energy for energy in modelled if energy]
    is_known = len(known) == len(parts)
    with_memory = sum(energy.with_memory_mj for energy in known) if is_known else None
    return Cost(
        latency_ms=None if reasons else sum(part.latency_ms or 0.0 for part in parts),
        low_ms=sum(part.low_ms for part in parts),
        high_ms=sum(highs) if len(highs) == len(parts) else None,
        source=max((part.source for part in parts), key=_SOURCES.index),
        kernels=tuple(part.kernel for part in parts),
        energy_mj=sum(measured) if is_measured else with_memory,
        energy_source="measured" if is_measured else "modelled" if is_known else None,
        modelled_energy_mj=with_memory,
        compute_energy_mj=sum(energy.compute_mj for energy in known) if is_known else None,
        weight_bytes=sum(part.workload.weight_bytes for part in parts),
        reason="; ".join(dict.fromkeys(reasons)) or None,
    )


def _modelled(workload: Workload) -> OperationEnergy | None:
    try:
        return operation_energy(workload)
    except UnknownOperation:
        return None

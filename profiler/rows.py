"""Rows of one product: its candidates timed in the same rounds, set against each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from profiler.candidates import Candidate, bind_all
from profiler.energy import EnergyReading
from profiler.interleaved import detail_name, schedule_of
from profiler.measurement import Measurement
from profiler.passes import far_behind, of_a_pass, pool
from profiler.ratios import paired_ratio
from profiler.roofline import roofline_share
from profiler.samples import Timing
from profiler.settings import Setting

# Types of the mults that each shift is set against: what the shift itself brings.
_MULTS_OF = {
    "shift_int8": ("int8", "int7"),
    "shift_int8_wide": ("int8", "int7"),
    "shift_int4": ("int8", "int7"),
    "shift_bf16": ("bf16",),
    "shift_fp32": ("fp32",),
}


@dataclass
class Product:
    """The candidates of one product and what was measured of them so far.

    Attributes:
        group: They.
        passes: By state of the caches, the timings of each pass.
        energies: By state of the caches and candidate: read in the first pass.
    """

    group: Sequence[Candidate]
    passes: dict[str, list[dict[str, Timing]]] = field(default_factory=dict)
    energies: dict[tuple[str, str], EnergyReading] = field(default_factory=dict)


def measure(product: Product, setting: Setting) -> Iterator[list[Measurement]]:
    """Measures the candidates of one product once more.

    Args:
        product: Gets what was measured.
        setting: On what and how.

    Yields:
        Its rows for one state of the caches after the other: those are written together, since
        their ratios come from the same rounds.
    """
    launches, failed = bind_all(product.group, setting)
    settings = of_a_pass(setting.timing, setting.config.passes)
    for cache in setting.config.cache:
        passes = product.passes.setdefault(cache, [])
        rivals = [candidate.name for candidate in launches if candidate.is_baseline]
        left_out = far_behind(passes[0], rivals) if passes else set()
        named = {c.name: launch for c, launch in launches.items() if c.name not in left_out}
        with setting.accounting.charge("sampling"):
            passes.append(setting.site.time(named, settings, cache))
        by_name = pool(passes)
        timings = {candidate: by_name[candidate.name] for candidate in launches}
        rows = [failed_row(candidate, cache, setting) for candidate in failed]
        for candidate, launch in launches.items():
            key = (cache, candidate.name)
            if key not in product.energies:
                product.energies[key] = read_energy(candidate, launch, setting)
            energy = product.energies[key]
            details = details_of(candidate, timings, setting) | energy.details
            rows.append(
                finished_row(candidate, cache, timings[candidate], energy, details, setting)
            )
        yield rows


def details_of(
    candidate: Candidate, timings: Mapping[Candidate, Timing], setting: Setting
) -> dict[str, Any]:
    """What the clock noted, ratios within this run, and what bounds the kernel."""
    timing = timings[candidate]
    details: dict[str, Any] = dict(timing.details)
    rivals = [c for c in timings if c.is_baseline and timings[c].latency_ms]
    if rivals and not candidate.is_baseline:
        best = min(rivals, key=lambda rival: timings[rival].latency_ms or 0.0)
        details |= _ratio("speedup", timings[best], timing)
        details["speedup_baseline"] = best.lowering
    for types, mult in _own_mults(candidate, tuple(timings)).items():
        details |= _ratio(detail_name(types), timing, timings[mult])
    overhead_ms = setting.launch_overheads.get("torch" if candidate.is_baseline else "ours")
    if overhead_ms is not None:
        details["launch_overhead_ms"] = overhead_ms
    share = roofline_share(candidate.workload, timing.latency_ms, setting.roofs)
    if share is not None:
        details["roofline_share"] = share
    return details


def _own_mults(shift: Candidate, candidates: Sequence[Candidate]) -> dict[str, Candidate]:
    """Our mult of each types that a shift is set against: of its schedule if there is one.

    Args:
        shift: Any candidate; only a shift has such mults.
        candidates: Of the same product.
    """
    found = {}
    for types in _MULTS_OF.get(shift.workload.form, ()):
        mults = [c for c in candidates if c.workload.form == f"mult_{types}" and not c.is_baseline]
        mults.sort(key=lambda c: schedule_of(c.lowering) != schedule_of(shift.lowering))
        if mults:
            found[types] = mults[0]
    return found


def _ratio(label: str, above: Timing, below: Timing) -> dict[str, Any]:
    ratio = paired_ratio(above, below)
    if ratio is None:
        return {}
    return {label: ratio.value, f"{label}_low": ratio.low, f"{label}_high": ratio.high}


def read_energy(candidate: Candidate, launch: Any, setting: Setting) -> EnergyReading:
    """Measured energy of a launch, where the sweep asks for it."""
    if candidate.workload not in setting.config.energy_workloads:
        return EnergyReading(reason="the sweep did not ask for its energy (energy = true)")
    with setting.accounting.charge("energy"):
        return setting.site.energy(launch)


def failed_row(candidate: Candidate, cache: Any, setting: Setting) -> Measurement:
    """A row that says why there is no figure."""
    return _row(
        candidate,
        cache,
        setting,
        status="failed",
        reason=candidate.problem,
        energy_reason="no figure without a kernel",
    )


def finished_row(
    candidate: Candidate,
    cache: Any,
    timing: Timing,
    energy: EnergyReading,
    details: dict[str, Any],
    setting: Setting,
) -> Measurement:
    """A row with its figures."""
    return _row(
        candidate,
        cache,
        setting,
        **timing.columns,
        noise_floor=setting.noise_floor,
        energy_mj=energy.energy_mj,
        energy_net_mj=energy.energy_net_mj,
        energy_window_s=energy.window_s,
        energy_source=energy.source,
        energy_reason=energy.reason,
        details=details,
    )


def _row(candidate: Candidate, cache: Any, setting: Setting, **figures: Any) -> Measurement:
    return Measurement(
        workload=candidate.workload,
        subject=candidate.workload.label,
        device=setting.device,
        lowering=candidate.lowering,
        is_baseline=candidate.is_baseline,
        cache=cache,
        weight_bytes=candidate.workload.weight_bytes,
        max_abs_error=candidate.max_abs_error,
        relative_error=candidate.relative_error,
        run=setting.run,
        **figures,
    )

"""Rows of one product: its candidates timed in the same rounds, set against each other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from profiler.candidates import Candidate, bind_all, key_of
from profiler.device import DeviceError
from profiler.energy import EnergyReading
from profiler.interleaved import detail_name, schedule_of
from profiler.measurement import Cache, Measurement, reason_of
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

# Its windows are of launches back to back.
_COLD = EnergyReading(reason="energy is measured with hot caches")
_NOT_ASKED = "the sweep did not ask for its energy"


@dataclass
class Product:
    """The candidates of one product and what was measured of them so far.

    Attributes:
        group: They.
        caches: States of the caches in which they are timed.
        passes: By state of the caches, the timings of each pass.
        energies: By candidate: read once.
    """

    group: Sequence[Candidate]
    caches: Sequence[Cache]
    passes: dict[Cache, list[dict[str, Timing]]] = field(default_factory=dict)
    energies: dict[str, EnergyReading] = field(default_factory=dict)


def products_of(
    checked: Sequence[Candidate], setting: Setting, finished: Collection[str]
) -> list[Product]:
    """The products to measure: of those that can be measured, all that replace each other.

    Args:
        checked: Candidates.
        setting: On what and how.
        finished: Keys of rows that need not be measured again. A state of the caches in which that
            is so of a whole product is left alone.
    """
    groups: dict[str, list[Candidate]] = {}
    for candidate in checked:
        if not candidate.problem:
            groups.setdefault(candidate.workload.product, []).append(candidate)

    def caches(group: Sequence[Candidate]) -> list[Cache]:
        return [
            cache
            for cache in setting.config.cache
            if any(key_of(candidate, cache, setting) not in finished for candidate in group)
        ]

    return [Product(group, caches(group)) for group in groups.values()]


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
    for cache in product.caches:
        passes = product.passes.setdefault(cache, [])
        rivals = [candidate.name for candidate in launches if candidate.is_baseline]
        left_out = far_behind(passes[0], rivals) if passes else set()
        named = {c.name: launch for c, launch in launches.items() if c.name not in left_out}
        with setting.accounting.charge("sampling"):
            passes.append(setting.site.time(named, settings, cache))
        by_name = pool(passes)
        # What found no memory this time has its timings of the passes before.
        timings = {c: by_name[c.name] for c in product.group if c.name in by_name}
        rows = [failed_row(c, cache, setting) for c in failed if c.name not in by_name]
        for candidate, timing in timings.items():
            energy = _COLD
            if cache == "hot":
                if candidate.name not in product.energies:
                    launch = launches[candidate]
                    product.energies[candidate.name] = read_energy(candidate, launch, setting)
                energy = product.energies[candidate.name]
            details = details_of(candidate, timings, setting) | energy.details
            rows.append(finished_row(candidate, cache, timing, energy, details, setting))
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
        return EnergyReading(reason=f"{_NOT_ASKED} (--energy, or energy = true in its TOML)")
    try:
        with setting.accounting.charge("energy"):
            return setting.site.energy(launch)
    except DeviceError:
        raise
    except Exception as error:
        return EnergyReading(reason=f"energy: {reason_of(error)}")


def lacks_energy(row: Measurement, setting: Setting) -> bool:
    """Whether a row was measured before anybody asked for its energy, and now somebody does."""
    return row.workload in setting.config.energy_workloads and (row.energy_reason or "").startswith(
        _NOT_ASKED
    )


def failed_row(candidate: Candidate, cache: Cache, setting: Setting) -> Measurement:
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
    cache: Cache,
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


def _row(candidate: Candidate, cache: Cache, setting: Setting, **figures: Any) -> Measurement:
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

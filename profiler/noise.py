"""The noise floor of a sweep: a kernel against itself, measured as any two rivals would be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from profiler.candidates import Candidate, bind_all
from profiler.ratios import noise_floor
from profiler.settings import Setting


def representatives(sound: Sequence[Candidate]) -> list[Candidate]:
    """One kernel of ours for each primitive: that of the median size."""
    ours: dict[str, list[Candidate]] = {}
    for candidate in sound:
        if not candidate.is_baseline:
            ours.setdefault(candidate.workload.primitive, []).append(candidate)
    return [
        sorted(found, key=lambda candidate: candidate.workload.macs)[len(found) // 2]
        for found in ours.values()
    ]


def measure_noise_floor(sound: Sequence[Candidate], setting: Setting) -> float | None:
    """The largest noise floor among the A/A pairs of the representatives.

    A pair is the same kernel bound twice, each time to operands of its own, and interleaved.

    Returns:
        None where every pair was contended or did not fit, or there was none.
    """
    floors = []
    for candidate in representatives(sound):
        launches, _ = bind_all((candidate, replace(candidate)), setting)
        if len(launches) < 2:
            continue
        pair = dict(zip(("first", "second"), launches.values()))
        with setting.accounting.charge("sampling"):
            timings = setting.site.time(pair, setting.timing, setting.config.cache[0])
        floors.append(noise_floor(timings["first"], timings["second"]))
    return max((floor for floor in floors if floor is not None), default=None)

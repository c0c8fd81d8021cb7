"""Candidates: the kernels that can compute a sweep's products, built and checked before any clock.

Whatever goes wrong with one of them becomes its ``problem`` and ends as a row with that reason.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kernels.build import Kernel, superseded
from kernels.reference import max_abs_error, random_operands, relative_error
from kernels.workload import Workload
from profiler.device import DeviceError
from profiler.measurement import reason_of, row_key
from profiler.settings import Setting

# Inexact baselines round otherwise than they declare; beyond this they compute something else.
_INEXACT_TOLERANCE = 0.1
# Rivals and the oracle have copies of their own; more than this would not fit, or be killed for it.
_OPERANDS_SHARE = 0.1


@dataclass(frozen=True, eq=False)
class Candidate:
    """One kernel of a product, on its way to a row; ``problem`` once it cannot be measured."""

    workload: Workload
    lowering: str
    is_baseline: bool
    kernel: Kernel | None = None
    max_abs_error: float | None = None
    relative_error: float | None = None
    problem: str | None = None

    @property
    def name(self) -> str:
        """Unique within its product."""
        return f"{self.workload.form} {self.lowering}"


def candidates(setting: Setting) -> list[Candidate]:
    """Everything that computes one of the sweep's workloads on its device."""
    return [
        Candidate(workload, lowering, is_baseline)
        for workload in setting.config.workloads
        for lowering, is_baseline in setting.site.kernels(
            workload, setting.config.compiled_baselines
        )
        if (setting.config.baselines or not is_baseline)
        and (setting.config.superseded or lowering not in superseded(workload, setting.target))
    ]


def key_of(candidate: Candidate, cache: str, setting: Setting) -> str:
    """Key of the row that a candidate will become."""
    fingerprint = setting.device.fingerprint
    return row_key(candidate.workload.key, candidate.lowering, cache, fingerprint)


def unfinished(
    found: Sequence[Candidate], setting: Setting, finished: Collection[str]
) -> list[Candidate]:
    """Candidates without a row among the finished ones in some state of the caches."""
    caches = setting.config.cache
    return [c for c in found if not all(key_of(c, cache, setting) in finished for cache in caches)]


def rivals(checked: Sequence[Candidate], every: Sequence[Candidate]) -> list[Candidate]:
    """All others that compute a product of which something is to be timed.

    A figure is of rounds that rivals shared: one of them alone would have no ratio to any.
    """
    products = {candidate.workload.product for candidate in checked if not candidate.problem}
    known = {(candidate.workload, candidate.lowering) for candidate in checked}
    return [
        c for c in every if c.workload.product in products and (c.workload, c.lowering) not in known
    ]


def try_build(candidate: Candidate, setting: Setting) -> Candidate:
    """Builds a kernel, or notes why it cannot be built."""
    needed, memory = candidate.workload.traffic_bytes, setting.device.memory_bytes
    if memory and needed > _OPERANDS_SHARE * memory:
        return replace(candidate, problem=f"size: {needed} bytes of operands, {memory} of memory")
    try:
        with setting.accounting.charge("building"):
            kernel = setting.site.build(
                candidate.workload, candidate.lowering, candidate.is_baseline
            )
    except Exception as error:
        return replace(candidate, problem=f"build: {reason_of(error)}")
    return replace(candidate, kernel=kernel)


def try_check(candidate: Candidate, setting: Setting) -> Candidate:
    """Compares with the oracle on fresh random inputs: what is wrong is never timed."""
    if candidate.kernel is None:
        return candidate
    seed = int.from_bytes(os.urandom(4))
    workload = candidate.workload
    try:
        operands = random_operands(workload, seed)
        # torch.compile compiles at the first launch.
        with setting.accounting.charge("building"):
            out = setting.site.run(candidate.kernel, operands)
        with setting.accounting.charge("checking"):
            off_by, within = max_abs_error(workload, operands, out)
            lost = relative_error(workload, operands, out)
            if not candidate.kernel.exact:
                within = off_by <= _INEXACT_TOLERANCE * float(out.abs().max())
    except Exception as error:
        return replace(candidate, problem=f"launch: {reason_of(error)}")
    problem = None
    if not within:
        problem = f"wrong: off by {off_by:.3g} from the float64 oracle (seed {seed})"
    return replace(candidate, max_abs_error=off_by, relative_error=lost, problem=problem)


def bind(candidate: Candidate, setting: Setting) -> Any:
    """A launch on fixed random operands into a fixed output."""
    assert candidate.kernel is not None
    return setting.site.bind(candidate.kernel, random_operands(candidate.workload))


def bind_all(
    group: Sequence[Candidate], setting: Setting
) -> tuple[dict[Candidate, Any], list[Candidate]]:
    """Launches of the candidates that can be measured, and those that cannot.

    All of a product lie in memory at the same time, which may be too much for some.
    """
    launches: dict[Candidate, Any] = {}
    failed = []
    for candidate in group:
        if candidate.problem:
            failed.append(candidate)
            continue
        try:
            launches[candidate] = bind(candidate, setting)
        except DeviceError:
            raise
        except Exception as error:
            failed.append(replace(candidate, problem=f"operands: {reason_of(error)}"))
    return launches, failed

"""Measurement: one row, with its figures or the reason why there are none."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from kernels.workload import Workload
from profiler.device import DeviceInfo
from profiler.samples import CLOCK_RATE

# Name of the clock in rows of before.
_CLOCK_OF_A_RUN = "fma_gmacs_per_s"
# Of the clocks that a device was seen at, which part is below its full one.
_AT_BEST = 0.95

Cache = Literal["hot", "cold"]


class Measurement(BaseModel):
    """One measured figure, or the reason why there is none.

    Attributes:
        kind: ``primitive`` (one kernel), ``layer`` (an MoE or attention layer), ``model``.
        workload: For primitives; None for layers and models.
        subject: What was measured, in words: workload label, layer or model name.
        device: Who was measured.
        lowering: Which implementation: ``mult.tiled``, ``torch.fp32``, ``deployed``, ….
        is_baseline: True for an implementation of another project.
        cache: ``hot`` or ``cold``.
        latency_ms: Median of the kept samples, per launch.
        latency_low_ms, latency_high_ms: 95 % confidence interval of that median.
        latency_p10_ms, latency_p90_ms: Percentiles of the kept samples.
        samples_kept, samples_discarded: Clean and contaminated samples.
        samples_ms: The kept samples in the order in which they were taken, per launch; empty in
            rows that were read without them.
        bursts_ms: Median of each burst of samples in order, None where no sample was clean. Samples
            of one burst share much, bursts do not: count these as independent.
        stop_reason: Why sampling stopped: ``precision``, ``max_time``, ``contended``.
        noise_floor: Relative difference below which nothing of this sweep is called a difference,
            from the same kernel measured against itself; None where that was not measured.
        energy_mj, energy_net_mj: Measured energy per launch, gross and above idle.
        energy_window_s: Total length of the energy windows.
        energy_source: ``nvml-counter``, ``nvml-power``, ``rapl``, ``replay``; None if unmeasured.
        energy_reason: Why energy is None.
        weight_bytes: Stored parameters.
        peak_memory_bytes: None where not tracked.
        max_abs_error: Against the float64 oracle, on fresh random inputs.
        relative_error: Root mean square error against the fp32 product that a linear's form stands
            for: what its alphabet loses. None for other products.
        status: ``ok``; ``contended``, ``failed`` or ``skipped`` have latency None and a reason.
        run: Name of the sweep that wrote the row.
        details: Further facts as plain JSON (model rows: batch size, share of tokens, …).
        on_shared_core: Whether the figure is of a core that a neighbour worked on as well.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    kind: Literal["primitive", "layer", "model"] = "primitive"
    workload: Workload | None = None
    subject: str
    device: DeviceInfo
    lowering: str
    is_baseline: bool = False
    cache: Cache = "hot"
    latency_ms: float | None = Field(None, gt=0)
    latency_low_ms: float | None = None
    latency_high_ms: float | None = None
    latency_p10_ms: float | None = None
    latency_p90_ms: float | None = None
    samples_kept: int = 0
    samples_discarded: int = 0
    samples_ms: tuple[float, ...] = Field((), repr=False)
    bursts_ms: tuple[float | None, ...] = Field((), repr=False)
    stop_reason: str | None = None
    noise_floor: float | None = Field(None, ge=0)
    energy_mj: float | None = Field(None, gt=0)
    energy_net_mj: float | None = None
    energy_window_s: float | None = None
    energy_source: str | None = None
    energy_reason: str | None = None
    weight_bytes: int | None = None
    peak_memory_bytes: int | None = None
    max_abs_error: float | None = None
    relative_error: float | None = None
    status: Literal["ok", "contended", "failed", "skipped"] = "ok"
    reason: str | None = None
    run: str = ""
    created_at: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    details: dict[str, str | float | int | bool | None] = {}

    @model_validator(mode="after")
    def _a_missing_figure_has_a_reason(self) -> Measurement:
        if (self.latency_ms is None) == (self.status == "ok"):
            raise ValueError("latency_ms is given exactly when status is ok")
        if self.status != "ok" and not self.reason:
            raise ValueError("a row that is not ok needs a reason")
        if self.energy_mj is None and not self.energy_reason:
            raise ValueError("energy_reason is needed where energy_mj is missing")
        return self

    @property
    def on_shared_core(self) -> bool:
        """False where nobody looked, or nothing was timed; see ``profiler.shared_core``."""
        return self.latency_ms is not None and self.details.get("own_core") is False

    @property
    def clock(self) -> tuple[str, float] | None:
        """The CPU's mean clock, by a loop of multiplications; None where nobody looked.

        Returns:
            What its rate can be compared with, and the rate in 10⁹ a second. The loop of before had
            some of its sums on the stack, whose place made it up to a tenth slower in some
            processes: its rates can be compared within a run.
        """
        for name, loop in ((CLOCK_RATE, CLOCK_RATE), (_CLOCK_OF_A_RUN, f"before, {self.run}")):
            rate = self.details.get(name)
            if rate is not None:
                return loop, float(rate)
        return None

    @property
    def key(self) -> str:
        """Identity of the row: what was measured, how, on which device. Resume looks it up."""
        return row_key(
            self.workload.key if self.workload else subject_key(self.kind, self.subject),
            self.lowering,
            self.cache,
            self.device.fingerprint,
        )


def reason_of(error: Exception) -> str:
    """What went wrong, as the reason of a row: one line of at most 300 characters."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"[:300]


def subject_key(kind: str, subject: str) -> str:
    """What stands for the workload in the key of a layer or a model."""
    return f"{kind}:{subject}"


def row_key(subject_key: str, lowering: str, cache: str, fingerprint: str) -> str:
    """Content hash of a row's identity."""
    return hashlib.sha256(
        "|".join((subject_key, lowering, cache, fingerprint)).encode()
    ).hexdigest()[:24]


def full_clock(rows: Iterable[Measurement]) -> dict[str, float]:
    """The clock that a device mostly keeps at its best, of its rows, by ``Measurement.clock``."""
    rates: dict[str, list[float]] = {}
    for row in rows:
        if row.clock:
            loop, rate = row.clock
            rates.setdefault(loop, []).append(rate)
    return {loop: float(np.quantile(known, _AT_BEST)) for loop, known in rates.items()}

"""A fitted latency model as plain numbers, evaluated with NumPy alone.

What ``models.LearnedLatency`` fits is exactly this object, and a latency table stores it as text:
the errors in fit.json are those of the very code that answers a lookup.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from cost_models.features import EXTENTS, FEATURES, executed_macs, extents, features
from kernels.workload import FORMS, Workload

# Beyond the hull of the training shapes the interval grows by this factor with each octave, on
# either side: no held-out row says how wrong the model is out there.
WIDEN_PER_OCTAVE = 1.25
# Sharpness of the bend between the compute and the memory roof: 9 % above the roofs' corner.
_BEND = 8
# Shapes read back as inside despite the rounding of a logarithm.
_HULL_TOLERANCE = 1e-6

STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
Positive = Annotated[float, Field(gt=0)]
Size = Annotated[int, Field(ge=1, le=2**31)]


@dataclass(frozen=True)
class Prediction:
    """Latency of one workload: median and 90 % interval.

    Attributes:
        latency_ms: Median.
        low_ms, high_ms: 5 % and 95 % quantiles.
        octaves_outside: How far outside the training shapes, 0 inside.
    """

    latency_ms: float
    low_ms: float
    high_ms: float
    octaves_outside: float = 0.0


class RooflineParameters(BaseModel):
    """``t = launch + max(executed macs / rate, bytes / bandwidth)``.

    Source: Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009; with a launch overhead.

    Attributes:
        launch_ms: Latency of a launch that does nothing.
        macs_per_ms: Multiply-accumulates per millisecond.
        bytes_per_ms: Compulsory traffic per millisecond.
        tile, units: How the output is cut up and shared out; (1, 1) and 1 waste nothing.
    """

    model_config = STRICT

    launch_ms: Positive
    macs_per_ms: Positive
    bytes_per_ms: Positive
    tile: tuple[Size, Size]
    units: Size

    def latency_ms(self, workload: Workload) -> float:
        """Latency in ms; the two roofs are joined by a smooth maximum."""
        compute = executed_macs(workload, self.tile, self.units) / self.macs_per_ms
        memory = workload.traffic_bytes / self.bytes_per_ms
        peak = max(compute, memory)
        bend = ((compute / peak) ** _BEND + (memory / peak) ** _BEND) ** (1 / _BEND)
        return self.launch_ms + peak * bend


def matern52(
    left: NDArray[np.float64], right: NDArray[np.float64], scales: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Anisotropic Matérn kernel with ν = 5/2.

    Args:
        left: ``(p, d)``.
        right: ``(q, d)``.
        scales: Length scales ``(d,)``.

    Returns:
        Correlations ``(p, q)``.

    Source: Rasmussen, Williams: Gaussian Processes for Machine Learning, eq. 4.17.
    """
    difference = (left[:, None, :] - right[None, :, :]) / scales
    distance = math.sqrt(5) * np.sqrt((difference**2).sum(axis=-1))
    return (1 + distance + distance**2 / 3) * np.exp(-distance)


# Without equality of its own: NumPy's is elementwise, and two models are equal if their fields are.
@dataclass(frozen=True, eq=False)
class _Process:
    points: NDArray[np.float64]
    scales: NDArray[np.float64]
    precision: NDArray[np.float64]
    weights: NDArray[np.float64]


class FittedModel(BaseModel):
    """Roofline × exp(Gaussian process), for one form and lowering on one device.

    Attributes:
        form, lowering: What is modelled.
        is_baseline: True for an implementation of another project.
        roofline: The physical core.
        length_scales: By feature, in octaves; features that did not vary are left out.
        variance: Variance of the logarithm of latency over roofline.
        noise: Variance of that logarithm between two measurements of one shape.
        interval_width: Half of the 90 % interval in predictive standard deviations.
        hull: Least and largest training value of each extent, in octaves.
        points: Training shapes ``(rows, features)`` in the order of ``length_scales``.
        residuals: Training targets ``(rows,)``: logarithm of latency over roofline.
    """

    model_config = STRICT

    form: str
    lowering: str
    is_baseline: bool
    roofline: RooflineParameters
    length_scales: dict[str, Positive]
    variance: Positive
    noise: Positive
    interval_width: Positive
    hull: dict[str, tuple[float, float]]
    points: tuple[tuple[float, ...], ...]
    residuals: tuple[float, ...]

    @model_validator(mode="after")
    def _consistent(self) -> FittedModel:
        if self.form not in FORMS:
            raise ValueError(f"form: {self.form!r} is no form; known: {', '.join(FORMS)}")
        # The columns of points go by this order, and hand-edited or re-sorted JSON may lose it.
        if list(self.length_scales) != [name for name in FEATURES if name in self.length_scales]:
            raise ValueError(f"length_scales: must be among {', '.join(FEATURES)}, in this order")
        if set(self.hull) != set(EXTENTS):
            raise ValueError(f"hull: must hold exactly {', '.join(EXTENTS)}")
        if any(low > high for low, high in self.hull.values()):
            raise ValueError("hull: a lower bound lies above its upper bound")
        if not self.points or len(self.points) != len(self.residuals):
            raise ValueError("points: must be as many as residuals, and at least one")
        if any(len(point) != len(self.length_scales) for point in self.points):
            raise ValueError("points: must have one value for each of length_scales")
        try:
            usable = bool(np.isfinite(self._process.weights).all())
        except np.linalg.LinAlgError:
            usable = False
        if not usable:
            raise ValueError("noise: too small against variance to evaluate the model")
        return self

    @cached_property
    def _process(self) -> _Process:
        scales = np.array(list(self.length_scales.values()), dtype=float)
        points = np.array(self.points, dtype=float).reshape(len(self.points), len(scales))
        covariance = self.variance * matern52(points, points, scales)
        factor = np.linalg.inv(np.linalg.cholesky(covariance + self.noise * np.eye(len(points))))
        precision = factor.T @ factor
        return _Process(points, scales, precision, precision @ np.array(self.residuals))

    def leave_one_out(self) -> NDArray[np.float64]:
        """Each training row's error in its own predictive deviations when it is left out.

        Returns:
            ``(rows,)``.

        Source: Rasmussen, Williams: Gaussian Processes for Machine Learning, eq. 5.12.
        """
        return self._process.weights / np.sqrt(np.diag(self._process.precision))

    def octaves_outside(self, workload: Workload) -> float:
        """How far a workload lies outside the training shapes, in the worst direction."""
        beyond = [
            max(self.hull[name][0] - value, value - self.hull[name][1])
            for name, value in extents(workload).items()
        ]
        worst = max(beyond)
        return worst if worst > _HULL_TOLERANCE else 0.0

    def predict(self, workload: Workload) -> Prediction:
        """Median and 90 % interval; wider by WIDEN_PER_OCTAVE for each octave outside the hull.

        Raises:
            OverflowError: On parameters or sizes that no float can answer for.
        """
        process, values = self._process, features(workload)
        point = np.array([[values[name] for name in self.length_scales]], dtype=float)
        covariance = self.variance * matern52(point, process.points, process.scales)[0]
        explained = covariance @ process.precision @ covariance
        deviation = math.sqrt(max(self.noise, self.variance + self.noise - explained))
        latency_ms = self.roofline.latency_ms(workload) * math.exp(covariance @ process.weights)
        outside = self.octaves_outside(workload)
        factor = math.exp(self.interval_width * deviation) * WIDEN_PER_OCTAVE**outside
        return Prediction(latency_ms, latency_ms / factor, latency_ms * factor, outside)


def hull_of(workloads: Sequence[Workload]) -> dict[str, tuple[float, float]]:
    """Least and largest extent of some workloads, in octaves."""
    rows = [extents(workload) for workload in workloads]
    return {name: (min(r[name] for r in rows), max(r[name] for r in rows)) for name in rows[0]}

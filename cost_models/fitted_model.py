"""A fitted latency model as plain numbers, evaluated with NumPy alone.

What ``models.LearnedLatency`` fits is exactly this object, and a latency table stores it as text:
the errors in fit.json are those of the very code that answers a lookup.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from cost_models.features import (
    EXTENTS,
    FEATURES,
    FormFacts,
    Numbers,
    Sizes,
    extents,
    form_facts,
    points_of,
    sizes_of,
)
from cost_models.machine import Machine
from cost_models.physical_core import CORES
from kernels.forms import FORMS
from kernels.workload import Workload

# Beyond the hull of the training shapes the interval grows by this factor with each octave, on
# either side: no held-out row says how wrong the model is out there.
WIDEN_PER_OCTAVE = 1.25
# A model of another device has taken over at so many octaves outside, and is itself given up at so
# many outside of its own hull: in between both count, so that no step is at either edge.
_HANDOVER_OCTAVES = 1.0
# Shapes read back as inside despite the rounding of a logarithm.
_HULL_TOLERANCE = 1e-6
# Predictions at once: their correlations with the training rows stay in the caches.
_BLOCK = 2048

STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
Positive = Annotated[float, Field(gt=0)]
Size = Annotated[int, Field(ge=1, le=2**62)]


class Prediction(NamedTuple):
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


@dataclass(frozen=True)
class Predictions:
    """Latencies of many workloads, each ``(rows,)``; as in Prediction.

    Attributes:
        deviation: Predictive standard deviation of the logarithm of the latency.
    """

    latency_ms: NDArray[np.float64]
    low_ms: NDArray[np.float64]
    high_ms: NDArray[np.float64]
    octaves_outside: NDArray[np.float64]
    deviation: NDArray[np.float64]


class PhysicalCore(BaseModel):
    """``t = Σ cost · count``: the terms of ``physical_core.CORES`` with their fitted costs.

    Attributes:
        name: In CORES.
        units, tile_rows, tile_columns, l2_bytes, l3_bytes: As in ``machine.Machine``.
        costs_ms: Cost of one piece of each term; terms that cost nothing are left out.
    """

    model_config = STRICT

    name: str
    units: Size
    tile_rows: Size
    tile_columns: Size
    l2_bytes: Size
    l3_bytes: Size
    costs_ms: dict[str, Positive]

    @model_validator(mode="after")
    def _known(self) -> PhysicalCore:
        if self.name not in CORES:
            raise ValueError(f"name: {self.name!r} is no core; known: {', '.join(CORES)}")
        if not self.costs_ms:
            raise ValueError("costs_ms: must hold at least one term")
        return self

    @cached_property
    def machine(self) -> Machine:
        """What the counts depend on."""
        return Machine(self.units, self.tile_rows, self.tile_columns, self.l2_bytes, self.l3_bytes)

    def latency_ms(self, sizes: Sizes, facts: FormFacts) -> Numbers:
        """Latency in ms, of numbers or arrays.

        Raises:
            KeyError: On a cost of a term that the core does not count.
        """
        terms = CORES[self.name](sizes, facts, self.machine)
        latency_ms: Numbers = 0.0
        for name, cost in self.costs_ms.items():
            latency_ms = latency_ms + cost * terms[name]
        return latency_ms


@dataclass(frozen=True, eq=False)
class _Process:
    """What evaluating the Gaussian process needs; lengths are in units of the length scales.

    Attributes:
        columns, scales: Of FEATURES, and the length scale of each.
        points: Training shapes.
        weights: What the correlations with the training shapes are multiplied by for the mean.
        factor: Variance times the inverse of the Cholesky factor of their covariance, for
            correlations as well. In single precision, half as much to read at each lookup: what
            it explains is only an interval's variance.
        distances: ``distances @ (1, x · x, x)`` are five times the squared distances of a point,
            and behind them a third of each, and one.
    """

    columns: NDArray[np.int64]
    scales: NDArray[np.float64]
    points: NDArray[np.float64]
    weights: NDArray[np.float64]
    factor: NDArray[np.float32]
    distances: NDArray[np.float64]


def matern52(squared: NDArray[np.float64]) -> NDArray[np.float64]:
    """Matérn correlation with ν = 5/2 of squared distances in units of the length scale.

    Source: Rasmussen, Williams: Gaussian Processes for Machine Learning, eq. 4.17.
    """
    distance = np.sqrt(5 * squared)
    return (1 + distance + 5 / 3 * squared) * np.exp(-distance)


def squared_distances(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Between points ``(p, d)`` and ``(q, d)``: ``(p, q)``."""
    across = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1) - 2 * left @ right.T
    return np.maximum(across, 0)


class FittedModel(BaseModel):
    """Physical core × exp(Gaussian process), for one form and lowering on one device.

    Attributes:
        form, lowering: What is modelled.
        is_baseline: True for an implementation of another project.
        core: The physical core.
        length_scales: By feature, in octaves; features that did not vary are left out. Empty where
            nothing is learned beside the core.
        variance: Variance of the logarithm of latency over core.
        noise: Variance of that logarithm between two measurements of one shape.
        foreign_rows, foreign_noise: So many of the first rows are of another device, with so much
            more variance: what a transferred model still knows of them.
        interval_width: Half of the 90 % interval in predictive standard deviations.
        hull: Least and largest training value of each extent, in octaves.
        points: Training shapes ``(rows, features)`` in the order of ``length_scales``.
        residuals: Training targets ``(rows,)``: logarithm of latency over core.
        beyond: Model of another device, carried over to this one: answers for what lies outside of
            the hull and inside its own, the more the further outside.
    """

    model_config = STRICT

    form: str
    lowering: str
    is_baseline: bool
    core: PhysicalCore
    length_scales: dict[str, Positive]
    variance: Positive
    noise: Positive
    foreign_rows: Annotated[int, Field(ge=0)] = 0
    foreign_noise: Annotated[float, Field(ge=0)] = 0.0
    interval_width: Positive
    hull: dict[str, tuple[float, float]]
    points: tuple[tuple[float, ...], ...]
    residuals: tuple[float, ...]
    # Left out where there is none: tables of before keep their bytes and their hash.
    beyond: FittedModel | None = Field(default=None, exclude_if=lambda model: model is None)

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
        if self.beyond and (self.beyond.form, self.beyond.lowering) != (self.form, self.lowering):
            raise ValueError(f"beyond: is of {self.beyond.form} {self.beyond.lowering}")
        if self.foreign_rows > len(self.points):
            raise ValueError("foreign_rows: must not be more than there are points")
        try:
            self.core.latency_ms(Sizes(1.0, 1.0, 1.0, 1.0), self._facts)
        except KeyError as error:
            raise ValueError(
                f"core.costs_ms: {error} is no term of {self.core.name}; fitted by another version?"
                " Run `python -m cost_models.fit` on the store again"
            ) from error
        try:
            usable = bool(np.isfinite(self._process.weights).all())
        except np.linalg.LinAlgError:
            usable = False
        if not usable:
            raise ValueError("noise: too small against variance to evaluate the model")
        return self

    @property
    def columns(self) -> list[int]:
        """Which of FEATURES the process looks at, by number."""
        return [FEATURES.index(name) for name in self.length_scales]

    @cached_property
    def _facts(self) -> FormFacts:
        return form_facts(self.form)

    @cached_property
    def _bounds(self) -> NDArray[np.float64]:
        return np.array([self.hull[name] for name in EXTENTS])

    @cached_property
    def _limits(self) -> list[tuple[float, float]]:
        """The hull in the order of EXTENTS."""
        return [self.hull[name] for name in EXTENTS]

    @cached_property
    def _scaled(self) -> list[tuple[int, float]]:
        """The columns of FEATURES, and their length scales."""
        return list(zip(self.columns, self.length_scales.values()))

    @cached_property
    def _process(self) -> _Process:
        names = list(self.length_scales)
        scales = np.array([self.length_scales[name] for name in names], dtype=float)
        columns = np.array(self.columns, dtype=int)
        points = np.array(self.points, dtype=float).reshape(len(self.points), len(names)) / scales
        covariance = self.variance * matern52(squared_distances(points, points))
        noises = np.full(len(points), self.noise)
        noises[: self.foreign_rows] += self.foreign_noise
        factor = np.linalg.inv(np.linalg.cholesky(covariance + np.diag(noises)))
        weights = factor.T @ (factor @ np.array(self.residuals))
        # Of a file that is none of ours they may overflow: then nothing usable comes out.
        with np.errstate(over="ignore", invalid="ignore"):
            norms = (points**2).sum(axis=1)[:, None]
            squared = 5 * np.hstack((norms, np.ones_like(norms), -2 * points))
            distances = np.vstack((squared, squared / 3))
            distances[len(points) :, 0] += 1
            weights, factor = self.variance * weights, (self.variance * factor).astype(np.float32)
        return _Process(columns, scales, points, weights, factor, distances)

    def predict(self, workload: Workload) -> Prediction:
        """Median and 90 % interval; wider by WIDEN_PER_OCTAVE for each octave outside the hull.

        Raises:
            OverflowError: On parameters or sizes that no float can answer for.
        """
        latency_ms, half_width, outside = self._predict_own(workload)
        if outside and self.beyond:
            carried_ms, carried_half_width, far = self.beyond._predict_own(workload)
            weight = float(_weight_beyond(outside, far))
            latency_ms = latency_ms ** (1 - weight) * carried_ms**weight
            half_width += weight * (carried_half_width - half_width)
        factor = math.exp(half_width) * WIDEN_PER_OCTAVE**outside
        return Prediction(latency_ms, latency_ms / factor, latency_ms * factor, outside)

    def _predict_own(self, workload: Workload) -> tuple[float, float, float]:
        """Median, half of the interval inside the hull in log, and octaves outside of it."""
        sizes, facts = Sizes(workload.b, workload.m, workload.k, workload.n), self._facts
        latency_ms, variance = float(self.core.latency_ms(sizes, facts)), self.noise
        logs = list(map(math.log2, extents(sizes, facts)))
        if self.length_scales:
            log_factor, left = self._learned(logs)
            latency_ms *= math.exp(log_factor)
            variance += left
        outside = 0.0
        for value, (low, high) in zip(logs, self._limits):
            if not low <= value <= high:
                outside = max(outside, low - value, value - high)
        outside = outside if outside > _HULL_TOLERANCE else 0.0
        return latency_ms, self.interval_width * math.sqrt(variance), outside

    def _learned(self, logs: Sequence[float]) -> tuple[float, float]:
        """Mean of the process at one shape in octaves, and the variance that is left.

        ``matern52`` of it, in few passes over short arrays: each costs more than its arithmetic.
        """
        process = self._process
        point = [logs[column] / scale for column, scale in self._scaled]
        norm = 0.0
        for x in point:
            norm += x * x
        both = process.distances.dot(np.array([1.0, norm, *point]))
        rows = len(process.weights)
        distance, correlation = both[:rows], both[rows:]
        # Of a point upon a training shape, rounding may have left less than nothing.
        np.sqrt(np.abs(distance, distance), distance)
        np.add(correlation, distance, correlation)
        np.exp(np.negative(distance, distance), distance)
        np.multiply(correlation, distance, correlation)
        explained = process.factor.dot(correlation.astype(np.float32))
        left = max(0.0, self.variance - float(explained.dot(explained)))
        return float(process.weights.dot(correlation)), left

    def predict_many(self, workloads: Sequence[Workload] | Sizes) -> Predictions:
        """What ``predict`` says of each, without a loop: a sweep of shapes, or arrays of sizes."""
        sizes = workloads if isinstance(workloads, Sizes) else sizes_of(workloads)
        latency_ms, deviation, outside = self._predict_many_own(sizes)
        half_width = self.interval_width * deviation
        far = np.flatnonzero(outside)
        if self.beyond and len(far):
            carried_ms, carried_deviation, farther = self.beyond._predict_many_own(sizes.take(far))
            weight = _weight_beyond(outside[far], farther)
            latency_ms[far] = latency_ms[far] ** (1 - weight) * carried_ms**weight
            carried_half_width = self.beyond.interval_width * carried_deviation
            half_width[far] += weight * (carried_half_width - half_width[far])
            deviation[far] += weight * (carried_deviation - deviation[far])
        factor = np.exp(half_width) * WIDEN_PER_OCTAVE**outside
        return Predictions(latency_ms, latency_ms / factor, latency_ms * factor, outside, deviation)

    def _predict_many_own(
        self, sizes: Sizes
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Medians, deviations in log, and octaves outside of the hull, ``(rows,)`` each."""
        rows = len(sizes.m)
        process, facts = self._process, self._facts
        log_factor, variance = np.zeros(rows), np.full(rows, self.noise)
        if self.length_scales:
            points = points_of(sizes)[:, process.columns] / process.scales
            for start in range(0, rows, _BLOCK):
                block = slice(start, start + _BLOCK)
                squared = squared_distances(points[block], process.points)
                correlation = matern52(squared)
                explained = correlation.astype(np.float32) @ process.factor.T
                log_factor[block] = correlation @ process.weights
                left = self.variance - np.einsum("ij,ij->i", explained, explained)
                variance[block] += np.maximum(left, 0)
        latency_ms = self.core.latency_ms(sizes, facts) * np.exp(log_factor)
        logs = np.log2(np.stack(extents(sizes, facts), axis=1))
        outside = np.maximum(self._bounds[:, 0] - logs, logs - self._bounds[:, 1]).max(axis=1)
        outside = np.where(outside > _HULL_TOLERANCE, outside, 0.0)
        return latency_ms, np.sqrt(variance), outside


def _weight_beyond(outside: Numbers, far: Numbers) -> Numbers:
    """What share, in log, the model of another device has in an answer.

    Args:
        outside: Octaves outside of the hull of the device's own model.
        far: Octaves outside of the other's.
    """
    taken = np.clip(outside / _HANDOVER_OCTAVES, 0, 1)
    return taken * np.clip(1 - far / _HANDOVER_OCTAVES, 0, 1)


def changed(model: FittedModel, **values: object) -> FittedModel:
    """A model with other values; unlike pydantic's own copy it evaluates nothing of the old one."""
    return FittedModel(**(dict(model) | values))

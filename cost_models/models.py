"""Latency estimators with one interface: ``fit(workloads, latency_ms) -> self``, ``predict``.

All work on one form and lowering on one device, in the logarithm of the latency: an error of 10 %
weighs the same at 2 µs and at 50 ms.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.stats import t as student_t
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

from cost_models.features import FEATURES, executed_macs, features, parallel_units
from cost_models.fitted_model import FittedModel, Prediction, RooflineParameters, hull_of
from kernels.workload import Workload
from profiler.device import DeviceInfo

# Below this a roofline already has as many parameters as there are rows.
MIN_ROWS = 4
# 5 % and 95 % quantiles of a normal distribution lie this many deviations from its median.
Z90 = 1.645
# Output tiles to choose from, (rows, columns): none, our schedules', the rival libraries'.
TILES = ((1, 1), (16, 32), (32, 32), (64, 64), (128, 64), (128, 128))


class LatencyEstimator(Protocol):
    """What validation asks of a model."""

    def fit(self, workloads: Sequence[Workload], latency_ms: Sequence[float]) -> LatencyEstimator:
        """Learns from measured workloads and returns itself."""
        ...

    def predict(self, workloads: Sequence[Workload]) -> list[Prediction]:
        """Median and 90 % interval of each workload."""
        ...


def _around(latency_ms: float, log_deviation: float) -> Prediction:
    factor = math.exp(Z90 * log_deviation)
    return Prediction(latency_ms, latency_ms / factor, latency_ms * factor)


def fit_roofline(
    workloads: Sequence[Workload],
    latency_ms: Sequence[float],
    tile: tuple[int, int] = (1, 1),
    units: int = 1,
) -> tuple[RooflineParameters, NDArray[np.float64]]:
    """Robust least squares on log latency, from a launch-bound and a throughput-bound start.

    Args:
        workloads: Measured workloads.
        latency_ms: Their latencies.
        tile, units: How the output is cut up and shared out; the defaults waste nothing.

    Returns:
        The roofline, and the logarithm of modelled over measured latency, ``(rows,)``.
    """
    measured = np.asarray(latency_ms, dtype=float)
    least = measured.min()
    macs_rate = max(executed_macs(w, tile, units) / t for w, t in zip(workloads, measured))
    bytes_rate = max(w.traffic_bytes / t for w, t in zip(workloads, measured))

    def parameters(logs: NDArray[np.float64]) -> RooflineParameters:
        launch, macs, traffic = (float(value) for value in np.exp(logs))
        return RooflineParameters(
            launch_ms=launch, macs_per_ms=macs, bytes_per_ms=traffic, tile=tile, units=units
        )

    def errors(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        roofline = parameters(logs)
        return np.log([roofline.latency_ms(w) for w in workloads]) - np.log(measured)

    rates = np.array([macs_rate, bytes_rate])
    bounds = np.log([[least * 1e-3, *(rates / 4)], [least * 1.2, *(rates * 1e3)]])
    starts = [np.log([least * share, *(rates * 1.1)]) for share in (0.9, 0.1)]
    found = [
        least_squares(errors, start, bounds=bounds, loss="soft_l1", f_scale=0.2) for start in starts
    ]
    best = min(found, key=lambda result: result.cost)
    return parameters(best.x), errors(best.x)


class Roofline:
    """Launch overhead, compute roof and memory roof: what a model without learning can say.

    Attributes:
        parameters_: After ``fit``: the roofline itself.
    """

    def fit(self, workloads: Sequence[Workload], latency_ms: Sequence[float]) -> Roofline:
        """Fits three parameters; the spread is that of its training errors."""
        self.parameters_, errors = fit_roofline(workloads, latency_ms)
        self._log_deviation = math.sqrt((errors**2).sum() / max(1, len(errors) - 3))
        return self

    def predict(self, workloads: Sequence[Workload]) -> list[Prediction]:
        """The roofline's latency and 90 % interval of each workload."""
        return [_around(self.parameters_.latency_ms(w), self._log_deviation) for w in workloads]


class NearestNeighbour:
    """The nearest measured shape in octaves of b, m, k and n, scaled by the work."""

    def fit(self, workloads: Sequence[Workload], latency_ms: Sequence[float]) -> NearestNeighbour:
        """Remembers the rows; the spread comes from predicting each from the others."""
        self._known = list(zip(workloads, latency_ms))
        errors = [
            math.log(self._scaled(workload, self._known[:i] + self._known[i + 1 :]) / latency)
            for i, (workload, latency) in enumerate(self._known)
        ]
        self._log_deviation = math.sqrt(sum(error**2 for error in errors) / len(errors))
        return self

    def predict(self, workloads: Sequence[Workload]) -> list[Prediction]:
        """The neighbour's latency per multiply-accumulate times the workload's."""
        return [_around(self._scaled(w, self._known), self._log_deviation) for w in workloads]

    @staticmethod
    def _scaled(workload: Workload, known: list[tuple[Workload, float]]) -> float:
        here = features(workload)

        def distance(row: tuple[Workload, float]) -> float:
            there = features(row[0])
            return math.dist(list(here.values()), list(there.values()))

        neighbour, latency = min(known, key=distance)
        return latency * workload.macs / neighbour.macs


class LearnedLatency:
    """The main model: a roofline times the exponential of a Gaussian process on log2 features.

    The process learns what the roofline leaves out: tiles, waves, caches, the length of a loop.

    Attributes:
        fitted_: After ``fit``: the model as plain numbers, which is what predicts.
    """

    def __init__(
        self, form: str, lowering: str, is_baseline: bool, device: DeviceInfo, seed: int = 0
    ) -> None:
        self.form, self.lowering, self.is_baseline = form, lowering, is_baseline
        self._device, self._seed = device, seed

    def fit(self, workloads: Sequence[Workload], latency_ms: Sequence[float]) -> LearnedLatency:
        """Fits the roofline, then the process on what remains, then the interval's width.

        Raises:
            ValueError: On fewer than MIN_ROWS rows.
        """
        if len(workloads) < MIN_ROWS:
            raise ValueError(f"{len(workloads)} rows; a model needs {MIN_ROWS}")
        rooflines = [
            fit_roofline(workloads, latency_ms, tile, units)
            for tile in TILES
            for units in sorted({1, parallel_units(self._device)})
        ]
        roofline, _ = min(rooflines, key=lambda found: float(np.abs(found[1]).mean()))
        residuals = [math.log(t / roofline.latency_ms(w)) for w, t in zip(workloads, latency_ms)]
        table = [features(workload) for workload in workloads]
        names = [f for f in FEATURES if len({round(row[f], 6) for row in table}) > 1]
        points = [[row[name] for name in names] for row in table]
        scales, variance, noise = _hyper_parameters(points, residuals, self._seed)
        fitted = FittedModel(
            form=self.form,
            lowering=self.lowering,
            is_baseline=self.is_baseline,
            roofline=roofline,
            length_scales=dict(zip(names, scales)),
            variance=variance,
            noise=noise,
            interval_width=Z90,
            hull=hull_of(workloads),
            points=tuple(tuple(point) for point in points),
            residuals=tuple(residuals),
        )
        width = _interval_width(fitted.leave_one_out())
        self.fitted_ = fitted.model_copy(update={"interval_width": width})
        return self

    def predict(self, workloads: Sequence[Workload]) -> list[Prediction]:
        """Median and 90 % interval of each workload."""
        return [self.fitted_.predict(workload) for workload in workloads]


def _hyper_parameters(
    points: list[list[float]], residuals: list[float], seed: int
) -> tuple[list[float], float, float]:
    """Length scales, variance and noise of the largest marginal likelihood."""
    kernel = ConstantKernel(0.05, (1e-4, 4.0)) * Matern(
        [4.0] * len(points[0]), (1.0, 64.0), nu=2.5
    ) + WhiteKernel(1e-3, (1e-4, 0.1))
    regressor = GaussianProcessRegressor(
        kernel, alpha=0.0, n_restarts_optimizer=2, random_state=seed
    )
    with warnings.catch_warnings():
        # A length scale at its bound says that a feature does not matter; that is a result.
        warnings.simplefilter("ignore", ConvergenceWarning)
        regressor.fit(np.array(points), np.array(residuals))
    found = regressor.kernel_
    scales = np.atleast_1d(found.k1.k2.length_scale)
    return (
        [float(scale) for scale in scales],
        float(found.k1.k1.constant_value),
        float(found.k2.noise_level),
    )


def _interval_width(errors: NDArray[np.float64]) -> float:
    """Deviations that hold 90 % of the leave-one-out errors, and never less than theory asks.

    Source: split-conformal quantile with its correction for few rows (Vovk et al., 2005).
    """
    rows = len(errors)
    rank = min(rows, math.ceil(0.9 * (rows + 1)))
    theory = float(student_t.ppf(0.95, max(1, rows - MIN_ROWS)))
    return max(theory, float(np.sort(np.abs(errors))[rank - 1]))

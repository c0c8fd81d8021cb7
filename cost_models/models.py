"""The main latency model: a physical core, and a Gaussian process for what it leaves out.

All works on one form and lowering on one device, in the logarithm of the latency: an error of 10 %
weighs the same at 2 µs and at 50 ms. Measured energy in mJ is fitted by the same estimator.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import t as student_t
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
from sklearn.model_selection import GroupKFold

from cost_models.features import (
    FEATURES,
    FormFacts,
    Sizes,
    form_facts,
    hull_of,
    points_of,
    shape_groups,
    sizes_of,
)
from cost_models.fitted_model import FittedModel, PhysicalCore, Predictions, changed
from cost_models.machine import Machine, machines
from cost_models.physical_core import CORES, cores_for
from kernels.workload import Workload
from profiler.device import DeviceInfo

MIN_ROWS = 4
# 5 % and 95 % quantiles of a normal distribution lie this many deviations from its median.
Z90 = 1.645
_FOLDS = 8
# Relative errors beyond this weigh less and less: a disturbed row does not bend the core.
_HUBER = 0.1
_REWEIGHTINGS = 4
# How strongly a term's cost is pulled to nothing, in units of its largest share of a latency: of
# two terms that explain the same, both are used rather than one at the rows' mercy.
_SHRINKAGE = 0.05
# Cores that go on to the choice with a Gaussian process.
_FINALISTS = 2
# Hyper-parameters are searched on so many rows at most: the search takes their cube.
_SEARCH_ROWS = 300
_LEAST_NOISE = 1e-4


@dataclass(frozen=True)
class _Rows:
    """Rows to fit on: sizes, latencies ``(rows,)`` in ms and the group of each."""

    sizes: Sizes
    facts: FormFacts
    latency_ms: NDArray[np.float64]
    groups: NDArray[np.str_]

    def take(self, which: NDArray[np.int64]) -> _Rows:
        return _Rows(self.sizes.take(which), self.facts, self.latency_ms[which], self.groups[which])


def fit_core(
    name: str, machine: Machine, sizes: Sizes, facts: FormFacts, latency_ms: NDArray[np.float64]
) -> PhysicalCore:
    """Costs of a core's terms by non-negative least squares on the relative error.

    Args:
        name: In ``physical_core.CORES``.
        machine: What the counts depend on.
        sizes, facts: Of the measured workloads.
        latency_ms: ``(rows,)``.

    Source: Lawson, Hanson: Solving Least Squares Problems, 1974, ch. 23; reweighted for Huber's
        loss.
    """
    terms = CORES[name](sizes, facts, machine)
    relative = np.stack([column / latency_ms for column in terms.values()], axis=1)
    scale = np.maximum(relative.max(axis=0), 1e-300)
    weights = np.ones(len(latency_ms))
    shrinkage, nothing = _SHRINKAGE * np.eye(len(scale)), np.zeros(len(scale))
    for _ in range(_REWEIGHTINGS):
        root = np.sqrt(weights)
        rows = np.concatenate([relative / scale * root[:, None], shrinkage])
        costs, _norm = nnls(rows, np.concatenate([root, nothing]), maxiter=100 * len(scale))
        errors = np.abs(relative / scale @ costs - 1)
        weights = np.minimum(1.0, _HUBER / np.maximum(errors, 1e-12))
    costs_ms = {term: float(cost) for term, cost in zip(terms, costs / scale) if cost > 0}
    return PhysicalCore(name=name, **asdict(machine), costs_ms=costs_ms)


def folds_of(groups: NDArray[np.str_]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """(Training, left-out) rows of each fold; groups stay together where there are enough."""
    found = len(set(groups))
    keys = groups if found >= 3 else np.arange(len(groups)).astype(str)
    splits = GroupKFold(min(_FOLDS, len(set(keys)))).split(np.zeros(len(keys)), groups=keys)
    return [(np.asarray(train), np.asarray(left)) for train, left in splits]


@dataclass(frozen=True)
class _Candidate:
    core: str
    machine: Machine
    learned: bool


class LearnedLatency(BaseEstimator):
    """Physical core × exp(Gaussian process on octaves), chosen by cross-validation.

    The process learns what the core leaves out. Which core, with what caches and tiles, and whether
    anything is worth learning beside it, is decided on folds of the training rows; so is the
    interval's width.

    Attributes:
        fitted_: After ``fit``: the model as plain numbers, which is what predicts.
        errors_: After ``fit``: logarithm of measured over predicted latency of each training row
            by a model that was fitted without its group, ``(rows,)``.
    """

    def __init__(
        self, form: str, lowering: str, is_baseline: bool, device: DeviceInfo, seed: int = 0
    ) -> None:
        self.form, self.lowering, self.is_baseline = form, lowering, is_baseline
        self.device, self.seed = device, seed

    def fit(self, workloads: Sequence[Workload], latency_ms: Sequence[float]) -> LearnedLatency:
        """Chooses and fits core and process, then the interval's width.

        Raises:
            ValueError: On fewer than MIN_ROWS rows.
        """
        if len(workloads) < MIN_ROWS:
            raise ValueError(f"{len(workloads)} rows; a model needs {MIN_ROWS}")
        facts = form_facts(self.form)
        measured, groups = np.asarray(latency_ms, dtype=float), shape_groups(workloads)
        rows = _Rows(sizes_of(workloads), facts, measured, groups)
        hull, found = hull_of(workloads), []
        for candidate in self._finalists(rows):
            model = self._model(candidate, rows, hull)
            errors, deviations = _left_out(model, rows)
            found.append((float(np.abs(errors).mean()), model, errors, deviations))
        _, model, errors, deviations = min(found, key=lambda one: one[0])
        width = interval_width(errors / deviations)
        self.fitted_ = changed(model, interval_width=width)
        self.errors_ = errors
        return self

    def predict(self, workloads: Sequence[Workload]) -> NDArray[np.float64]:
        """Median latency of each workload in ms, ``(rows,)``."""
        return self.predict_interval(workloads).latency_ms

    def predict_interval(self, workloads: Sequence[Workload]) -> Predictions:
        """Median and 90 % interval of each workload."""
        return self.fitted_.predict_many(workloads)

    def _finalists(self, rows: _Rows) -> list[_Candidate]:
        """The cores with the least error of their own on left-out rows, with and without more."""
        every = [
            (name, machine)
            for name in cores_for(self.lowering, rows.facts, self.is_baseline, self.device)
            for machine in machines(name, rows.facts, self.device)
        ]

        def error(core: tuple[str, Machine]) -> float:
            errors = [
                np.abs(_residuals(_core_of(*core, rows.take(train)), rows.take(left)))
                for train, left in folds_of(rows.groups)
            ]
            return float(np.concatenate(errors).mean())

        best = sorted(every, key=error)[:_FINALISTS]
        return [_Candidate(*best[0], learned=False), *(_Candidate(*c, learned=True) for c in best)]

    def _model(
        self, candidate: _Candidate, rows: _Rows, hull: dict[str, tuple[float, float]]
    ) -> FittedModel:
        core = _core_of(candidate.core, candidate.machine, rows)
        residuals, every = _residuals(core, rows), points_of(rows.sizes)
        names: list[str] = []
        if candidate.learned:
            names = [f for i, f in enumerate(FEATURES) if np.ptp(every[:, i]) > 1e-6]
        points = every[:, [FEATURES.index(name) for name in names]]
        spread = max(_LEAST_NOISE, float(np.mean(residuals**2)))
        scales, variance, noise = [1.0] * len(names), spread, spread
        if names:
            scales, variance, noise = hyper_parameters(points, residuals, self.seed)
        return FittedModel(
            form=self.form,
            lowering=self.lowering,
            is_baseline=self.is_baseline,
            core=core,
            length_scales=dict(zip(names, scales)),
            variance=variance,
            noise=noise,
            interval_width=Z90,
            hull=hull,
            points=tuple(map(tuple, points.tolist())),
            residuals=tuple(residuals.tolist()),
        )


def _left_out(model: FittedModel, rows: _Rows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Log errors and predictive deviations of each row without its group, ``(rows,)`` each.

    The core is fitted anew for each fold; the process keeps its hyper-parameters.
    """
    errors, deviations = np.zeros(len(rows.groups)), np.zeros(len(rows.groups))
    for train, left in folds_of(rows.groups):
        fold = refitted(model, rows.sizes.take(train), rows.latency_ms[train])
        predicted = fold.predict_many(rows.take(left).sizes)
        errors[left] = np.log(rows.latency_ms[left] / predicted.latency_ms)
        deviations[left] = predicted.deviation
    return errors, deviations


def refitted(model: FittedModel, sizes: Sizes, latency_ms: NDArray[np.float64]) -> FittedModel:
    """A model of the same kind and hyper-parameters, fitted on other rows ``(rows,)``."""
    facts = form_facts(model.form)
    core = fit_core(model.core.name, model.core.machine, sizes, facts, latency_ms)
    residuals = np.log(latency_ms / np.maximum(core.latency_ms(sizes, facts), 1e-12))
    return changed(
        model,
        core=core,
        foreign_rows=0,
        points=tuple(map(tuple, points_of(sizes)[:, model.columns].tolist())),
        residuals=tuple(residuals.tolist()),
    )


def _core_of(name: str, machine: Machine, rows: _Rows) -> PhysicalCore:
    return fit_core(name, machine, rows.sizes, rows.facts, rows.latency_ms)


def _residuals(core: PhysicalCore, rows: _Rows) -> NDArray[np.float64]:
    return np.log(rows.latency_ms / np.maximum(core.latency_ms(rows.sizes, rows.facts), 1e-12))


def hyper_parameters(
    points: NDArray[np.float64], residuals: NDArray[np.float64], seed: int
) -> tuple[list[float], float, float]:
    """Length scales, variance and noise of the largest marginal likelihood.

    Args:
        points: ``(rows, features)`` in octaves.
        residuals: ``(rows,)``.
        seed: Of the rows to search on, where there are many.
    """
    chosen = np.random.default_rng(seed).permutation(len(points))[:_SEARCH_ROWS]
    kernel = ConstantKernel(0.01, (1e-4, 4.0)) * Matern(
        [4.0] * points.shape[1], (0.5, 64.0), nu=2.5
    ) + WhiteKernel(1e-3, (_LEAST_NOISE, 0.1))
    regressor = GaussianProcessRegressor(
        kernel, alpha=0.0, n_restarts_optimizer=1, random_state=seed
    )
    with warnings.catch_warnings():
        # A length scale at its bound says that a feature does not matter; that is a result.
        warnings.simplefilter("ignore", ConvergenceWarning)
        regressor.fit(points[chosen], residuals[chosen])
    found = regressor.kernel_
    scales = np.atleast_1d(found.k1.k2.length_scale)
    return (
        [float(scale) for scale in scales],
        float(found.k1.k1.constant_value),
        float(found.k2.noise_level),
    )


def interval_width(scores: NDArray[np.float64]) -> float:
    """Deviations that hold 90 % of the left-out errors; with few rows not less than theory asks.

    Args:
        scores: Error of each left-out row in its own predictive deviations.

    Source: split-conformal quantile with its correction for few rows (Vovk et al., 2005), of
        scores from cross-validation (Vovk, Cross-conformal predictors, 2015).
    """
    rows = len(scores)
    rank = min(rows, math.ceil(0.9 * (rows + 1)))
    found = float(np.sort(np.abs(scores))[rank - 1])
    if rows >= 20:
        return max(found, 1e-3)
    return max(found, float(student_t.ppf(0.95, max(1, rows - MIN_ROWS))))

"""A latency model of one device and a few measurements on another: a model of the other.

The devices share what a kernel does, not what it costs: the counts of the physical core are those
of the new device, its costs are the old ones times a factor for each kind of resource, and what was
learned beside the core is kept as a guess that new rows outweigh.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.stats import t as student_t
from sklearn.base import BaseEstimator

from cost_models.features import (
    FormFacts,
    Sizes,
    form_facts,
    hull_around,
    hull_of,
    parallel_units,
    points_of,
    shape_groups,
    sizes_of,
)
from cost_models.fitted_model import FittedModel, PhysicalCore, Predictions, changed
from cost_models.machine import Machine, panel_rows
from cost_models.models import folds_of, interval_width
from cost_models.physical_core import CORES
from kernels.workload import Workload
from profiler.device import DeviceInfo

# Rows to measure on a new device.
TRANSFER_ROWS = 10
_LEAST_ROWS = 4
# How far, in log, the factor of one resource may depart from the others' before rows must insist.
_DEPARTURE = 0.5
# What a row is expected to be off by, in log.
_ROW_ERROR = 0.1
# What is known of the other device's residuals beside a fit of the factors, at least, in log².
_LEAST_FOREIGN = 1e-4
RESOURCES = ("launch", "compute", "caches", "memory")


def resource_of(term: str) -> str:
    """Which resource a term of a physical core uses, in RESOURCES."""
    if term == "launch":
        return "launch"
    if term.endswith("_memory"):
        return "memory"
    return "caches" if term == "bytes" or term.endswith(("_l2", "_l3")) else "compute"


def choose_rows(workloads: Sequence[Workload], number: int = TRANSFER_ROWS) -> list[int]:
    """Which workloads to measure on a new device: far from each other, the middle first.

    Source: Gonzalez, Clustering to minimize the maximum intercluster distance, 1985.
    """
    points = points_of(sizes_of(workloads))
    chosen = [int(((points - np.median(points, axis=0)) ** 2).sum(axis=1).argmin())]
    distance = np.full(len(points), np.inf)
    while len(chosen) < min(number, len(points)):
        distance = np.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(axis=1))
        chosen.append(int(distance.argmax()))
    return chosen


def machine_on(core: PhysicalCore, facts: FormFacts, device: DeviceInfo) -> Machine:
    """The machine of a core as another device has it."""
    units = parallel_units(device) if core.name != "tiles" or core.units > 1 else 1
    machine = replace(core.machine, units=units)
    if core.name != "panels":
        return machine
    return replace(machine, tile_rows=panel_rows(device, facts))


class TransferredLatency(BaseEstimator):
    """A model of another device, fitted on a few of its rows.

    Attributes:
        fitted_: After ``fit``: the model as plain numbers.
        factors_: After ``fit``: cost there over cost here, by resource.
    """

    def __init__(self, source: FittedModel, device: DeviceInfo) -> None:
        self.source, self.device = source, device

    def fit(self, workloads: Sequence[Workload], latency_ms: Sequence[float]) -> TransferredLatency:
        """Fits the factors, then what is left at the rows, then the interval's width.

        Raises:
            ValueError: On fewer than 4 rows.
        """
        if len(workloads) < _LEAST_ROWS:
            raise ValueError(f"{len(workloads)} rows; a transfer needs {_LEAST_ROWS}")
        sizes, measured = sizes_of(workloads), np.asarray(latency_ms, dtype=float)
        scores = []
        for left in range(len(measured)):
            kept = np.delete(np.arange(len(measured)), left)
            model, _ = carried_over(self.source, self.device, sizes.take(kept), measured[kept])
            predicted = model.predict_many(sizes.take(np.array([left])))
            error = np.log(measured[left] / predicted.latency_ms[0])
            scores.append(abs(error) / predicted.deviation[0])
        theory = float(student_t.ppf(0.95, max(1, len(measured) - len(RESOURCES))))
        rank = min(len(scores), int(np.ceil(0.9 * (len(scores) + 1))))
        width = max(float(np.sort(scores)[rank - 1]), theory)
        hull = hull_around(self.source.hull, hull_of(workloads))
        model, self.factors_ = carried_over(self.source, self.device, sizes, measured)
        self.fitted_ = changed(model, interval_width=width, hull=hull)
        return self

    def predict(self, workloads: Sequence[Workload]) -> NDArray[np.float64]:
        """Median latency of each workload in ms, ``(rows,)``."""
        return self.predict_interval(workloads).latency_ms

    def predict_interval(self, workloads: Sequence[Workload]) -> Predictions:
        """Median and 90 % interval of each workload."""
        return self.fitted_.predict_many(workloads)


def left_out_errors(
    source_without: Callable[[NDArray[np.str_]], FittedModel],
    device: DeviceInfo,
    workloads: Sequence[Workload],
    latency_ms: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Log errors and predictive deviations of each row, its widths left out, ``(rows,)`` each.

    Args:
        source_without: What is known beside the rows, without some shape groups.
        device: That the rows are of.
        workloads, latency_ms: The rows.
    """
    sizes, groups = sizes_of(workloads), shape_groups(workloads)
    errors, deviations = np.zeros(len(groups)), np.zeros(len(groups))
    for train, left in folds_of(groups):
        source = source_without(groups[left])
        fold, _ = carried_over(source, device, sizes.take(train), latency_ms[train])
        predicted = fold.predict_many(sizes.take(left))
        errors[left] = np.log(latency_ms[left] / predicted.latency_ms)
        deviations[left] = predicted.deviation
    return errors, deviations


def carried_model(
    source: FittedModel,
    device: DeviceInfo,
    workloads: Sequence[Workload],
    latency_ms: NDArray[np.float64],
    left_out: tuple[NDArray[np.float64], NDArray[np.float64]],
) -> FittedModel:
    """As ``carried_over``, with the hull of both and intervals as wide as left-out errors ask.

    Args:
        source, device: As there.
        workloads, latency_ms: What was measured on it.
        left_out: As of ``left_out_errors``.
    """
    carried, _ = carried_over(source, device, sizes_of(workloads), latency_ms)
    errors, deviations = left_out
    hull = hull_around(source.hull, hull_of(workloads))
    return changed(carried, interval_width=interval_width(errors / deviations), hull=hull)


def carried_over(
    source: FittedModel, device: DeviceInfo, sizes: Sizes, latency_ms: NDArray[np.float64]
) -> tuple[FittedModel, dict[str, float]]:
    """A model of another device, with the source's hull and width of intervals.

    Args:
        source: Of the device that is known.
        device: The other one.
        sizes, latency_ms: What was measured on it, ``(rows,)``.

    Returns:
        The model, and cost there over cost here by resource.
    """
    facts = form_facts(source.form)
    core, factors = scaled_core(source.core, device, sizes, facts, latency_ms)
    beside = source.predict_many(sizes).latency_ms / source.core.latency_ms(sizes, facts)
    residuals = np.log(latency_ms / core.latency_ms(sizes, facts))
    foreign = max(_LEAST_FOREIGN, float(np.mean((residuals - np.log(beside)) ** 2)))
    points = points_of(sizes)[:, source.columns]
    model = changed(
        source,
        core=core,
        variance=max(source.variance, float(np.mean(residuals**2))),
        foreign_rows=len(source.points),
        foreign_noise=foreign,
        points=(*source.points, *map(tuple, points.tolist())),
        residuals=(*source.residuals, *residuals.tolist()),
    )
    return model, factors


def scaled_core(
    core: PhysicalCore,
    device: DeviceInfo,
    sizes: Sizes,
    facts: FormFacts,
    latency_ms: NDArray[np.float64],
) -> tuple[PhysicalCore, dict[str, float]]:
    """A core with the counts of another device, and each resource's costs times one factor.

    Args:
        core: Of the device that is known.
        device: The other one.
        sizes, facts, latency_ms: What was measured on it, ``(rows,)``.

    Returns:
        The core there, and the factors by resource.
    """
    machine = machine_on(core, facts, device)
    terms = CORES[core.name](sizes, facts, machine)
    costs = {name: _cost_of(name, core) for name in terms}
    by_resource = np.stack(
        [
            sum((costs[name] * terms[name] for name in terms if resource_of(name) == resource), 0.0)
            + 0 * latency_ms
            for resource in RESOURCES
        ]
    )

    def errors(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        common, own = logs[0], logs[1:]
        predicted = np.exp(common + own) @ by_resource
        return np.concatenate([np.log(predicted / latency_ms), own * _ROW_ERROR / _DEPARTURE])

    start = np.zeros(1 + len(RESOURCES))
    start[0] = float(np.median(np.log(latency_ms / by_resource.sum(axis=0))))
    found = least_squares(errors, start, loss="soft_l1", f_scale=0.2)
    factors = dict(zip(RESOURCES, map(float, np.exp(found.x[0] + found.x[1:]))))
    there = {name: cost * factors[resource_of(name)] for name, cost in costs.items() if cost > 0}
    return PhysicalCore(name=core.name, **asdict(machine), costs_ms=there), factors


def _cost_of(term: str, core: PhysicalCore) -> float:
    """Cost of a term; blocks of rows that the other device's tiles have not cost as their rows."""
    cost = core.costs_ms.get(term, 0.0)
    block = term.removeprefix("steps_of_")
    if cost == 0.0 and block.isdecimal():
        return int(block) * core.costs_ms.get("row_steps", 0.0)
    return cost

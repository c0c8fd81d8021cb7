"""What models of other devices say where this one was not measured.

A quick sweep has 10 to 30 rows of a kernel, on a handful of widths. Far from those a model of them
alone may be off many times over, while a table that ships has dozens of widths. What a kernel does
is the same on both devices, and what it costs here is told by few rows (``cost_models.transfer``).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from cost_models.features import (
    Sizes,
    form_facts,
    group_name,
    hull_around,
    hull_of,
    points_of,
    shape_groups,
    sizes_of,
)
from cost_models.fitted_model import FittedModel, changed
from cost_models.latency_table import LatencyTable
from cost_models.models import LearnedLatency, refitted
from cost_models.transfer import carried_model, carried_over, left_out_errors
from kernels.workload import Workload
from profiler.device import DeviceInfo

# Of the logarithm of the latency, on average.
_LARGEST_ERROR = math.log(1.25)
# What is left, at most, of an error that has clearly become less.
_CLEARLY_LESS = 0.9
# So many are of widths enough.
_ENOUGH_ROWS = 100
# With fewer, nothing is fitted in a fold.
_LEAST_ROWS = 3

Folds = list[tuple[NDArray[np.int64], NDArray[np.int64]]]

# By form and lowering, and then by the name of a table.
Priors = Mapping[tuple[str, str], Mapping[str, FittedModel]]


def priors_of(names: Iterable[str], device: DeviceInfo) -> Priors:
    """Models of tables that may be carried over to a device: those of its kind.

    Args:
        names: Of tables that ship, or files.
        device: That rows are of.

    Raises:
        TableError: If a table cannot be read.
    """
    found: dict[tuple[str, str], dict[str, FittedModel]] = {}
    for name in names:
        table = LatencyTable.load(name)
        for model in table.models if table.device.kind == device.kind else ():
            own = changed(model, beyond=None) if model.beyond else model
            found.setdefault((model.form, model.lowering), {})[name] = own
    return found


def extrapolate_by_(
    model: LearnedLatency,
    workloads: Sequence[Workload],
    latency_ms: Sequence[float],
    priors: Mapping[str, FittedModel],
) -> str | None:
    """Lets a fitted model answer by that of another device where it would extrapolate.

    That is carried over by the rows at hand: of several that know about as much of other sizes the
    one with which the model is least wrong about the largest and the smallest of the rows, fitted
    on the others. None is taken that leaves it off by more than a quarter there, or by not clearly
    less than it is alone.

    Args:
        model: Fitted on the two that follow.
        workloads, latency_ms: Of this device.
        priors: Models of the same kernel on others, by name.

    Returns:
        Whose model it is; None where none will do, or none is needed.
    """
    if not priors or len(workloads) >= _ENOUGH_ROWS:
        return None
    measured = np.asarray(latency_ms, dtype=float)
    folds = outward_folds(workloads)
    if not folds:
        return None
    reaches = {name: _octaves_beyond(model.fitted_, source) for name, source in priors.items()}
    errors = {
        name: _outward_error(model, source, workloads, measured, folds)
        for name, source in priors.items()
        if reaches[name] > 0 and reaches[name] >= max(reaches.values()) / 2
    }
    alone = _outward_error(model, None, workloads, measured, folds)
    chosen = min(errors, key=lambda name: errors[name], default=None)
    if chosen is None or errors[chosen] > min(_LARGEST_ERROR, _CLEARLY_LESS * alone):
        return None
    source = priors[chosen]
    left_out = left_out_errors(partial(without, source), model.device, workloads, measured)
    beyond = carried_model(source, model.device, workloads, measured, left_out)
    model.fitted_ = changed(model.fitted_, beyond=beyond)
    return chosen


def outward_folds(workloads: Sequence[Workload]) -> Folds:
    """(Training, left-out) rows: the largest third by each size, or the smallest, is left out.

    All that is left out lies outside of the sizes that are left, as what a table extrapolates to.
    """
    found = []
    for octaves in points_of(sizes_of(workloads)).T:
        for outward in (octaves, -octaves):
            edge = np.quantile(outward, 2 / 3, method="inverted_cdf")
            left = outward > edge if outward.max() > edge else outward == edge
            if (~left).sum() >= _LEAST_ROWS:
                found.append((np.flatnonzero(~left), np.flatnonzero(left)))
    return found


def _octaves_beyond(model: FittedModel, source: FittedModel) -> float:
    """By how much a model's hull grows with that of another, over all extents."""
    grown = hull_around(model.hull, source.hull)
    return sum(
        low - grown[name][0] + grown[name][1] - high for name, (low, high) in model.hull.items()
    )


def _outward_error(
    model: LearnedLatency,
    source: FittedModel | None,
    workloads: Sequence[Workload],
    latency_ms: NDArray[np.float64],
    folds: Folds,
) -> float:
    """Mean error, in log, of a model and one that is carried over on what folds leave out.

    The other has not seen the left-out widths on its own device either.
    """
    sizes, groups = sizes_of(workloads), shape_groups(workloads)
    errors = []
    for train, left in folds:
        hull, known = hull_of([workloads[i] for i in train]), sizes.take(train)
        fold = changed(_own_without(model, known, latency_ms[train], groups[left]), hull=hull)
        if source is not None:
            other = without(source, set(groups[left]))
            beyond, _ = carried_over(other, model.device, known, latency_ms[train])
            fold = changed(fold, beyond=changed(beyond, hull=hull_around(source.hull, hull)))
        predicted = fold.predict_many(sizes.take(left))
        errors.append(np.abs(np.log(latency_ms[left] / predicted.latency_ms)))
    return float(np.concatenate(errors).mean())


def _own_without(
    model: LearnedLatency, sizes: Sizes, latency_ms: NDArray[np.float64], left: NDArray[np.str_]
) -> FittedModel:
    """The model fitted on some rows alone; with what a shared core taught it of other widths."""
    if not model.fitted_.foreign_rows:
        return refitted(model.fitted_, sizes, latency_ms)
    taught = without(model.fitted_, set(left))
    return carried_over(taught, model.device, sizes, latency_ms)[0]


def without(source: FittedModel, groups: Collection[str]) -> FittedModel:
    """A model that has not seen the rows of some shape groups, but for what its core costs."""
    if not source.length_scales:
        return source
    kept = [i for i, group in enumerate(_shape_groups(source)) if group not in groups]
    if len(kept) == len(source.points):
        return source
    if not kept:
        return changed(source, length_scales={}, foreign_rows=0, points=((),), residuals=(0.0,))
    return changed(
        source,
        foreign_rows=sum(i < source.foreign_rows for i in kept),
        points=tuple(source.points[i] for i in kept),
        residuals=tuple(source.residuals[i] for i in kept),
    )


def _shape_groups(source: FittedModel) -> list[str]:
    """Of each row that a model was fitted on."""
    names, points = list(source.length_scales), np.array(source.points)
    kind = form_facts(source.form).kind

    def sizes(name: str) -> NDArray[np.float64]:
        # What did not vary is no feature: the hull has it.
        octaves = points[:, names.index(name)] if name in names else source.hull[name][0]
        return np.broadcast_to(np.round(2.0**octaves), len(points))

    return [
        group_name(source.form, kind, *(int(size) for size in row))
        for row in zip(sizes("m"), sizes("k"), sizes("n"))
    ]

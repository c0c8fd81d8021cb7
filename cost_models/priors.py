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

from cost_models.features import form_facts, group_name
from cost_models.fitted_model import FittedModel, changed
from cost_models.latency_table import LatencyTable
from cost_models.models import LearnedLatency
from cost_models.transfer import carried_model, left_out_errors
from kernels.workload import Workload
from profiler.device import DeviceInfo

# Of the logarithm of the latency, on average.
_LARGEST_ERROR = math.log(1.25)
# So many are of widths enough.
_ENOUGH_ROWS = 100

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

    That is carried over by the rows at hand, of several the one that is least wrong about those
    whose widths it was not given, and none that is off by more than a quarter there.

    Args:
        model: Fitted on the two that follow.
        workloads, latency_ms: Of this device.
        priors: Models of the same kernel on others, by name.

    Returns:
        Whose model it is; None where none will do, or none is needed.
    """
    if len(workloads) >= _ENOUGH_ROWS:
        return None
    measured, least = np.asarray(latency_ms, dtype=float), _LARGEST_ERROR
    chosen = None
    for name, source in priors.items():
        left_out = left_out_errors(partial(without, source), model.device, workloads, measured)
        error = float(np.abs(left_out[0]).mean())
        if error < least:
            least, chosen, best = error, name, (source, left_out)
    if chosen is not None:
        source, left_out = best
        beyond = carried_model(source, model.device, workloads, measured, left_out)
        model.fitted_ = changed(model.fitted_, beyond=beyond)
    return chosen


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

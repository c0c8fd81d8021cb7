"""What rows of a core that another guest worked on as well still teach of the whole core.

A shared core is slower, by 1.2 to 1.8 times as its kernels compute or wait, but in an orderly way:
models of such rows are as right about others of them as those of a whole core are about theirs. So
they are carried over to the whole core, as from one device to another.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone

from cost_models.features import shape_groups, sizes_of
from cost_models.fitted_model import FittedModel
from cost_models.models import LearnedLatency, refitted
from cost_models.training_rows import Row
from cost_models.transfer import carried_model, left_out_errors
from kernels.workload import Workload

# With fewer, or fewer than of the whole core, they say little that those do not.
_LEAST_SHARED = 20


def learn_from_shared_(
    model: LearnedLatency,
    workloads: Sequence[Workload],
    latency_ms: Sequence[float],
    shared: Sequence[Row],
) -> bool:
    """Gives a fitted model what rows of a shared core teach, unless that makes it worse.

    That is by errors on rows of the whole core whose widths were left out of both. Of two models
    that these cannot tell apart the one that has seen more is taken.

    Args:
        model: Fitted on the two that follow.
        workloads, latency_ms: Of the whole core.
        shared: Of the shared one.

    Returns:
        Whether it did.
    """
    if len(shared) < max(_LEAST_SHARED, len(workloads)):
        return False
    shared_workloads, shared_ms = [r.workload for r in shared], [r.latency_ms for r in shared]
    measured, groups = np.asarray(latency_ms, dtype=float), shape_groups(workloads)
    there, theirs = sizes_of(shared_workloads), np.asarray(shared_ms, dtype=float)
    their_groups = shape_groups(shared_workloads)
    source = clone(model).fit(shared_workloads, shared_ms).fitted_

    def source_without(left: NDArray[np.str_]) -> FittedModel:
        kept = np.flatnonzero(~np.isin(their_groups, left))
        return refitted(source, there.take(kept), theirs[kept])

    left_out = left_out_errors(source_without, model.device, workloads, measured)
    if _clearly_worse(np.abs(left_out[0]) - np.abs(model.errors_), groups):
        return False
    model.fitted_ = carried_model(source, model.device, workloads, measured, left_out)
    model.errors_ = left_out[0]
    return True


def _clearly_worse(excess: NDArray[np.float64], groups: NDArray[np.str_]) -> bool:
    """Whether errors grow by more than one standard error of their mean over groups.

    Source: Breiman et al., Classification and Regression Trees, 1984, section 3.4.3.
    """
    means = np.array([excess[groups == group].mean() for group in dict.fromkeys(groups)])
    doubt = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else np.inf
    return bool(means.mean() > doubt)

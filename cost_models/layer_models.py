"""Latency of whole layers and models from that of their kernels, and what the kernels leave out.

A layer is the sum of its kernels, as a latency table has them, and an overhead: launches through
Python, routing, and what is no product. The overhead is fitted on measured layers and models (rows
of kind ``layer`` and ``model``), deployed models and torch originals apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from scipy.optimize import nnls

from cost_models.latency_table import LatencyTable, TableError
from cost_models.overheads import LayerOverhead
from cost_models.training_rows import at_full_clock
from cost_models.work import COUNTS, Work, WorkError
from profiler.store import Measurement, full_clock

# An overhead is fitted on all models but one.
_ENOUGH_MODELS = 3

# Whose kernel computes a product of a row; None for the fastest of ours.
KERNEL_OF: dict[str, str | None] = {"deployed": None, "torch": "torch.fp32"}


@dataclass(frozen=True)
class Predicted:
    """A measured layer or model and what is predicted of it.

    Attributes:
        row: What was measured, at the CPU's full clock.
        model: Its model.
        work: What it does.
        kernel_ms: Sum over its products, from the table.
        predicted_ms: With an overhead fitted on other models; None if there is only this one.
    """

    row: Measurement
    model: str
    work: Work
    kernel_ms: float
    predicted_ms: float | None = None


def kernel_ms(work: Work, lowering: str, table: LatencyTable) -> float:
    """Sum over the products of a layer or model.

    Args:
        work: What it does.
        lowering: In KERNEL_OF: whose kernels do it.
        table: Of the device.

    Raises:
        TableError: If the table cannot answer for one of them.
    """
    lookup = partial(table.lookup, lowering=KERNEL_OF[lowering])
    return sum(number * found.latency_ms for number, found in work.kernels(lookup))


def predict_left_out(
    measurements: Iterable[Measurement], table: LatencyTable
) -> tuple[list[Predicted], dict[str, str]]:
    """Predicts each measured layer and model of a device from the rows of the other models.

    Args:
        measurements: Rows of any kind and device.
        table: Of the device that counts.

    Returns:
        The predictions, and by subject why a row has none. Rows of a core that another guest used
        are left out, where there are enough others.
    """
    groups: dict[tuple[str, str], list[Predicted]] = {}
    skipped: dict[str, str] = {}
    own = [row for row in measurements if row.device.fingerprint == table.device.fingerprint]
    full = full_clock(own)
    for measured in own:
        row = at_full_clock(measured, full)
        if row.kind == "primitive":
            continue
        if row.lowering not in KERNEL_OF or row.latency_ms is None:
            continue
        try:
            work = Work.of_details(row.details)
            found = Predicted(
                row,
                str(row.details.get("model", row.subject)),
                work,
                kernel_ms(work, row.lowering, table),
            )
        except (WorkError, TableError) as error:
            skipped[row.subject] = str(error)
        else:
            groups.setdefault((row.kind, row.lowering), []).append(found)
    whole = {key: _of_whole_cores(rows) for key, rows in groups.items()}
    for key, rows in groups.items():
        if shared := len(rows) - len(whole[key]):
            what = " ".join(key)
            skipped[f"{what}: {shared} of {len(rows)} rows"] = (
                "another guest of the host used the core as well"
            )
    return [one for rows in whole.values() for one in _left_out(rows)], skipped


def _of_whole_cores(rows: list[Predicted]) -> list[Predicted]:
    """As ``cost_models.training_rows`` does with kernels, where enough models are left."""
    own = [one for one in rows if not one.row.on_shared_core]
    return own if len({one.model for one in own}) >= _ENOUGH_MODELS else rows


def _left_out(rows: Sequence[Predicted]) -> list[Predicted]:
    found = []
    for name in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == name]
        others = [row for row in rows if row.model != name]
        if others:
            overhead = _overhead(others)
            own = [
                replace(one, predicted_ms=overhead.latency_ms(one.kernel_ms, one.work.counts))
                for one in own
            ]
        found += own
    return found


def fit_overheads(predicted: Sequence[Predicted]) -> tuple[LayerOverhead, ...]:
    """One overhead for each kind and lowering, with its error on left-out models."""
    groups: dict[tuple[str, str], list[Predicted]] = {}
    for one in predicted:
        groups.setdefault((one.row.kind, one.row.lowering), []).append(one)
    return tuple(
        _overhead(rows).model_copy(update={"mape": mape(rows)})
        for _, rows in sorted(groups.items())
    )


def mape(predicted: Sequence[Predicted]) -> float | None:
    """Mean absolute error in percent of what is predicted; None if nothing is."""
    errors = [
        abs(one.predicted_ms / one.row.latency_ms - 1)
        for one in predicted
        if one.predicted_ms is not None and one.row.latency_ms is not None
    ]
    return float(100 * np.mean(errors)) if errors else None


def _overhead(rows: Sequence[Predicted]) -> LayerOverhead:
    """Non-negative least squares on the relative error of the latency of one kind and lowering."""
    kind, lowering = rows[0].row.kind, rows[0].row.lowering
    measured = np.array([row.row.latency_ms for row in rows], dtype=float)
    # The weights of a layer that is launched over and over stay near, as far as there is room.
    other = "far_weight_bytes" if kind == "model" else "weight_bytes"
    names = [name for name in COUNTS if name != other]
    counts = np.array([[row.work.counts.get(name, 0.0) for name in names] for row in rows])
    kernels = np.array([row.kernel_ms for row in rows])
    # Between two launches of a layer nothing else passes through the caches.
    slower = kernels if kind == "model" else np.zeros_like(kernels)
    relative = np.column_stack([counts, slower]) / measured[:, None]
    scale = np.maximum(relative.max(axis=0), 1e-300)
    *costs, more = nnls(relative / scale, 1 - kernels / measured)[0] / scale
    return LayerOverhead(
        kind=kind,
        lowering=lowering,
        kernel_factor=1.0 + more,
        costs_ms={name: float(cost) for name, cost in zip(names, costs) if cost > 0},
        rows=len(rows),
        models=len({row.model for row in rows}),
        mape=None,
    )

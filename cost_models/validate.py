"""How well the latency models do on rows they have not seen."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from cost_models.fit_result import LoweringFit, Point
from cost_models.fitted_model import Prediction
from cost_models.models import (
    MIN_ROWS,
    LatencyEstimator,
    LearnedLatency,
    NearestNeighbour,
    Roofline,
)
from kernels.workload import Workload
from profiler.device import DeviceInfo

TEST_SHARE = 0.25
# From this many rows on, at least MIN_TEST_ROWS are held out.
ROWS_FOR_A_TEST = 8
MIN_TEST_ROWS = 2


def split_position(group: str, seed: int) -> float:
    """Where a group of rows falls between 0 and 1, by its content alone."""
    digest = hashlib.sha256(f"{seed}|{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def held_out(groups: Sequence[str], seed: int) -> list[bool]:
    """Which rows are held out: those whose group falls below TEST_SHARE.

    A group's place depends on nothing but its key and the seed, so measuring more rows does not
    move it; only where that holds out too few, the next groups follow, and where it leaves too few
    to fit on, the last ones come back. Rows of one group stay together.

    Args:
        groups: Key of each row's group.
        seed: Another seed, another split.

    Returns:
        One flag a row, True for a held-out row.
    """
    order = sorted(set(groups), key=lambda group: split_position(group, seed))
    wanted = MIN_TEST_ROWS if len(groups) >= ROWS_FOR_A_TEST else 0
    test: set[str] = set()
    rows = 0
    for group in order:
        size = groups.count(group)
        if split_position(group, seed) >= TEST_SHARE and rows >= wanted:
            break
        if len(groups) - rows - size < MIN_ROWS:
            break
        test.add(group)
        rows += size
    return [group in test for group in groups]


def mape(predicted: Sequence[Prediction], measured_ms: Sequence[float]) -> float | None:
    """Mean absolute percentage error, in percent; None without rows."""
    return float(100 * _relative(predicted, measured_ms).mean()) if predicted else None


def within_10_percent(
    predicted: Sequence[Prediction], measured_ms: Sequence[float]
) -> float | None:
    """Share of rows predicted within ±10 %, in percent; None without rows."""
    return float(100 * (_relative(predicted, measured_ms) <= 0.1).mean()) if predicted else None


def interval_coverage(
    predicted: Sequence[Prediction], measured_ms: Sequence[float]
) -> float | None:
    """Share of rows inside their 90 % interval, in percent; None without rows."""
    inside = [p.low_ms <= latency <= p.high_ms for p, latency in zip(predicted, measured_ms)]
    return float(100 * np.mean(inside)) if inside else None


def _relative(predicted: Sequence[Prediction], measured_ms: Sequence[float]) -> np.ndarray:
    latencies = np.array([prediction.latency_ms for prediction in predicted])
    return np.abs(latencies / np.asarray(measured_ms, dtype=float) - 1)


def validate(
    model: LearnedLatency,
    workloads: Sequence[Workload],
    latency_ms: Sequence[float],
    seed: int,
) -> LoweringFit:
    """Fits on the training part and reports the errors on the held-out part.

    Args:
        model: The main model, unfitted; it is fitted on the training part.
        workloads: Measured workloads of one form and lowering, at least MIN_ROWS.
        latency_ms: Their latencies.
        seed: Of the split.
    """
    flags = held_out([workload.key for workload in workloads], seed)
    rows = list(zip(workloads, latency_ms, flags))
    train = [(workload, latency) for workload, latency, test in rows if not test]
    test = [(workload, latency) for workload, latency, test in rows if test]
    unseen, truth = [workload for workload, _ in test], [latency for _, latency in test]

    def predictions(estimator: LatencyEstimator) -> list[Prediction]:
        return estimator.fit([w for w, _ in train], [t for _, t in train]).predict(unseen)

    main = predictions(model)
    return LoweringFit(
        form=model.form,
        lowering=model.lowering,
        is_baseline=model.is_baseline,
        rows_train=len(train),
        rows_test=len(test),
        mape=mape(main, truth),
        within_10_percent=within_10_percent(main, truth),
        interval_coverage=interval_coverage(main, truth),
        mape_roofline=mape(predictions(Roofline()), truth),
        mape_nearest=mape(predictions(NearestNeighbour()), truth),
        points=[
            Point(
                label=workload.label,
                split="test" if is_test else "train",
                measured_ms=latency,
                predicted_ms=prediction.latency_ms,
                low_ms=prediction.low_ms,
                high_ms=prediction.high_ms,
            )
            for (workload, latency, is_test), prediction in zip(rows, model.predict(workloads))
        ],
    )


def error_table(fits: Sequence[LoweringFit], device: DeviceInfo) -> Table:
    """The held-out errors for people, one line a form and lowering."""
    table = Table(
        title=f"Held-out errors of the latency models, {escape(device.label)}",
        caption="within: rows within ±10 %; covered: rows inside their 90 % interval; roofline and "
        "nearest: MAPE of a fitted roofline and of the nearest measured shape; * baseline",
        box=SIMPLE,
        padding=0,
    )
    table.add_column("form", no_wrap=True)
    table.add_column("lowering", no_wrap=True)
    for heading in ("train", "test", "MAPE", "within", "covered", "roofline", "nearest"):
        table.add_column(heading, justify="right", no_wrap=True)
    for fit in fits:
        figures = (
            fit.mape,
            fit.within_10_percent,
            fit.interval_coverage,
            fit.mape_roofline,
            fit.mape_nearest,
        )
        table.add_row(
            escape(fit.form),
            escape(fit.lowering) + ("*" if fit.is_baseline else ""),
            str(fit.rows_train),
            str(fit.rows_test),
            *("-" if figure is None else f"{figure:.1f}%" for figure in figures),
        )
    return table

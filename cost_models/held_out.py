"""How well the latency models do on rows they have not seen: the split, the errors, the tables."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from cost_models.features import shape_group
from cost_models.fit_result import LoweringFit, PartErrors, Point
from cost_models.fitted_model import FittedModel, Predictions
from cost_models.models import MIN_ROWS, LearnedLatency
from cost_models.priors import extrapolate_by_, without
from cost_models.rivals import RIVALS
from cost_models.shared_cores import learn_from_shared_
from cost_models.training_rows import Row
from kernels.workload import Workload
from profiler.device import DeviceInfo

TEST_SHARE = 0.25
# From this many rows on, at least MIN_TEST_ROWS are held out.
ROWS_FOR_A_TEST = 8
MIN_TEST_ROWS = 2
# With fewer widths than this, rows are held out one by one.
LEAST_GROUPS = 3


def split_position(group: str) -> float:
    """Where a group of rows falls between 0 and 1, by its name alone and for good."""
    digest = hashlib.sha256(f"0|{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def is_locked(workload: Workload) -> bool:
    """Whether a workload is of the test part: no model ever learns from it."""
    return split_position(shape_group(workload)) < TEST_SHARE


def held_out(groups: Sequence[str]) -> list[bool]:
    """Which rows are held out: those whose group falls below TEST_SHARE.

    A group's place depends on nothing but its name, so measuring more rows does not move it; only
    where that holds out too few, the next groups follow, and where it leaves too few to fit on, the
    last ones come back. Rows of one group stay together.

    Args:
        groups: Name of each row's group.

    Returns:
        One flag a row, True for a held-out row.
    """
    order = sorted(set(groups), key=split_position)
    wanted = MIN_TEST_ROWS if len(groups) >= ROWS_FOR_A_TEST else 0
    test: set[str] = set()
    rows = 0
    for group in order:
        size = groups.count(group)
        if split_position(group) >= TEST_SHARE and rows >= wanted:
            break
        if len(groups) - rows - size < MIN_ROWS:
            break
        test.add(group)
        rows += size
    return [group in test for group in groups]


def split_keys(workloads: Sequence[Workload]) -> list[str]:
    """What each row is held out by: its widths, or itself where there are too few widths."""
    groups = [shape_group(workload) for workload in workloads]
    return groups if len(set(groups)) >= LEAST_GROUPS else [w.key for w in workloads]


def mape(predicted_ms: ArrayLike, measured_ms: ArrayLike) -> float | None:
    """Mean absolute percentage error, in percent; None without rows."""
    errors = _relative(predicted_ms, measured_ms)
    return float(100 * errors.mean()) if len(errors) else None


def within_10_percent(predicted_ms: ArrayLike, measured_ms: ArrayLike) -> float | None:
    """Share of rows predicted within ±10 %, in percent; None without rows."""
    errors = _relative(predicted_ms, measured_ms)
    return float(100 * (errors <= 0.1).mean()) if len(errors) else None


def interval_coverage(
    low_ms: ArrayLike, high_ms: ArrayLike, measured_ms: ArrayLike
) -> float | None:
    """Share of rows inside their 90 % interval, in percent; None without rows."""
    measured = np.asarray(measured_ms, dtype=float)
    inside = (np.asarray(low_ms) <= measured) & (measured <= np.asarray(high_ms))
    return float(100 * inside.mean()) if len(measured) else None


def _relative(predicted_ms: ArrayLike, measured_ms: ArrayLike) -> NDArray[np.float64]:
    return np.abs(np.asarray(predicted_ms, dtype=float) / np.asarray(measured_ms, dtype=float) - 1)


def noise_floor(rows: Sequence[Row]) -> float | None:
    """Median noise floor of the rows' sweeps, in percent; None where none was measured."""
    found = [floor for row in rows if (floor := row.measurement.noise_floor) is not None]
    return float(100 * np.median(found)) if found else None


def validate(
    model: LearnedLatency,
    rows: Sequence[Row],
    shared: Sequence[Row] = (),
    priors: Mapping[str, FittedModel] = MappingProxyType({}),
) -> LoweringFit:
    """Fits on the training part and reports the errors on the held-out part.

    Args:
        model: The main model, unfitted; it is fitted on the training part.
        rows: Of one form and lowering, at least MIN_ROWS.
        shared: Rows of a shared core, which nothing is tested on; the model may learn from those
            that are of no held-out widths.
        priors: Models of the same kernel on other devices, by name, that may answer outside, by
            what they know of other widths than the held-out ones.
    """
    flags = held_out(split_keys([row.workload for row in rows]))
    train = [row for row, test in zip(rows, flags) if not test]
    test = [row for row, test in zip(rows, flags) if test]
    known, seen = [row.workload for row in train], [row.latency_ms for row in train]
    unseen, truth = [row.workload for row in test], [row.latency_ms for row in test]
    model.fit(known, seen)
    locked = {shape_group(workload) for workload in unseen}
    hints = [
        row
        for row in shared
        if shape_group(row.workload) not in locked and not is_locked(row.workload)
    ]
    learned = learn_from_shared_(model, known, seen, hints)
    others = {name: without(prior, locked) for name, prior in priors.items()}
    beyond = extrapolate_by_(model, known, seen, others)
    main = model.predict_interval(unseen)
    rivals = {
        f"mape_{name}": mape(rival().fit(known, seen).predict(unseen), truth) if test else None
        for name, rival in RIVALS.items()
    }
    return LoweringFit(
        form=model.form,
        lowering=model.lowering,
        is_baseline=model.is_baseline,
        rows_train=len(train),
        rows_test=len(test),
        rows_shared=len(shared),
        learned_from_shared=learned,
        beyond=beyond,
        mape=mape(main.latency_ms, truth),
        within_10_percent=within_10_percent(main.latency_ms, truth),
        interval_coverage=interval_coverage(main.low_ms, main.high_ms, truth),
        inside=_part(main, truth, main.octaves_outside == 0),
        outside=_part(main, truth, main.octaves_outside > 0),
        noise_floor=noise_floor(rows),
        points=_points(rows, flags, model.predict_interval([row.workload for row in rows])),
        **rivals,
    )


def _part(
    predicted: Predictions, measured_ms: Sequence[float], some: NDArray[np.bool_]
) -> PartErrors | None:
    measured = np.asarray(measured_ms, dtype=float)[some]
    error = mape(predicted.latency_ms[some], measured)
    covered = interval_coverage(predicted.low_ms[some], predicted.high_ms[some], measured)
    if error is None or covered is None:
        return None
    return PartErrors(rows=len(measured), mape=error, interval_coverage=covered)


def _points(rows: Sequence[Row], flags: Sequence[bool], predicted: Predictions) -> list[Point]:
    return [
        Point(
            label=row.workload.label,
            split="test" if is_test else "train",
            measured_ms=row.latency_ms,
            predicted_ms=float(latency),
            low_ms=float(low),
            high_ms=float(high),
            octaves_outside=float(octaves),
        )
        for row, is_test, latency, low, high, octaves in zip(
            rows,
            flags,
            predicted.latency_ms,
            predicted.low_ms,
            predicted.high_ms,
            predicted.octaves_outside,
        )
    ]


def error_table(fits: Sequence[LoweringFit], device: DeviceInfo) -> Table:
    """The held-out errors for people, one line a form and lowering."""
    table = Table(
        title=f"Held-out errors of the latency models, {escape(device.label)}",
        caption="inside: MAPE on those inside the sizes that were learned from; within: ±10 %; "
        "covered: inside their 90 % interval; noise: MAPE in noise floors of the sweep; then the "
        "MAPE of latency in proportion to the work, of a fitted roofline and of the nearest "
        "measured shape; * baseline" + _shared(fits) + _carried(fits),
        box=SIMPLE,
        padding=0,
    )
    # Where a terminal is narrow the name takes two lines; a figure that is cut says nothing.
    table.add_column("form, lowering", overflow="fold")
    for heading in ("train", "test", "MAPE", "inside", "within", "covered", "noise", *RIVALS):
        table.add_column(heading, justify="right", no_wrap=True)
    for fit in fits:
        rivals = (fit.mape_flops, fit.mape_roofline, fit.mape_nearest)
        of_noise = "-"
        if fit.mape is not None and fit.noise_floor:
            of_noise = f"{fit.mape / fit.noise_floor:.1f}×"
        table.add_row(
            escape(f"{fit.form} {fit.lowering}")
            + "*" * fit.is_baseline
            + "†" * fit.learned_from_shared
            + "‡" * (fit.beyond is not None),
            str(fit.rows_train),
            str(fit.rows_test),
            _percent(fit.mape, 1),
            _percent(fit.inside.mape if fit.inside else None, 1),
            *map(_percent, (fit.within_10_percent, fit.interval_coverage)),
            of_noise,
            *map(_percent, rivals),
        )
    return table


def _shared(fits: Sequence[LoweringFit]) -> str:
    number = sum(fit.rows_shared for fit in fits)
    if not number:
        return ""
    some = "; models with † learn from them as of another device"
    carried = some * any(fit.learned_from_shared for fit in fits)
    return f"; {number} rows of a core shared with another guest are left out{carried}"


def _carried(fits: Sequence[LoweringFit]) -> str:
    names = dict.fromkeys(fit.beyond for fit in fits if fit.beyond)
    return f"; ‡ outside by that of {' or '.join(names)}, carried over" if names else ""


def _percent(figure: float | None, decimals: int = 0) -> str:
    return "-" if figure is None else f"{figure:.{decimals}f}%"

"""What a latency model must beat: work alone, a roofline, the nearest measured shape.

All estimators share one interface, scikit-learn's: ``fit(workloads, latency_ms) -> self`` and
``predict(workloads) -> latency_ms``, attributes learned in ``fit`` ending in an underscore.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from sklearn.base import BaseEstimator

from cost_models.features import form_facts, macs, points_of, sizes_of, traffic_bytes
from kernels.workload import Workload

# Sharpness of the bend between the compute and the memory roof: 9 % above the roofs' corner.
_BEND = 8


class LatencyEstimator(Protocol):
    """What validation asks of a model of one form and lowering on one device."""

    def fit(self, workloads: Sequence[Workload], latency_ms: Sequence[float]) -> LatencyEstimator:
        """Learns from measured workloads and returns itself."""
        ...

    def predict(self, workloads: Sequence[Workload]) -> NDArray[np.float64]:
        """Latency of each workload in ms, ``(rows,)``."""
        ...


def _work(workloads: Sequence[Workload]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    sizes, facts = sizes_of(workloads), form_facts(workloads[0].form)
    return macs(sizes, facts), traffic_bytes(sizes, facts)


class FlopsProportional(BaseEstimator):
    """Latency in proportion to the multiply-accumulates, by the median rate.

    Attributes:
        macs_per_ms_: After ``fit``: that rate.
    """

    def fit(self, workloads: Sequence[Workload], latency_ms: Sequence[float]) -> FlopsProportional:
        """Takes the median rate of the rows."""
        self.macs_per_ms_ = float(np.median(_work(workloads)[0] / np.asarray(latency_ms)))
        return self

    def predict(self, workloads: Sequence[Workload]) -> NDArray[np.float64]:
        """Work over rate, ``(rows,)``."""
        return _work(workloads)[0] / self.macs_per_ms_


class Roofline(BaseEstimator):
    """Launch overhead, compute roof and memory roof: ``launch + max(macs / rate, bytes / rate)``.

    Attributes:
        launch_ms_, macs_per_ms_, bytes_per_ms_: After ``fit``.

    Source: Williams, Waterman, Patterson: Roofline, CACM 52(4), 2009; with a launch overhead.
    """

    def fit(self, workloads: Sequence[Workload], latency_ms: Sequence[float]) -> Roofline:
        """Robust least squares on log latency, from a launch-bound and a throughput-bound start."""
        measured = np.asarray(latency_ms, dtype=float)
        work, traffic = _work(workloads)
        least, rates = measured.min(), [(work / measured).max(), (traffic / measured).max()]

        def errors(logs: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.log(_roofline(np.exp(logs), work, traffic)) - np.log(measured)

        bounds = np.log([[least * 1e-3, *(r / 4 for r in rates)], [least * 1.2, *_times(rates)]])
        starts = [np.log([least * share, *(r * 1.1 for r in rates)]) for share in (0.9, 0.1)]
        found = [
            least_squares(errors, start, bounds=bounds, loss="soft_l1", f_scale=0.2)
            for start in starts
        ]
        best = min(found, key=lambda result: result.cost)
        self.launch_ms_, self.macs_per_ms_, self.bytes_per_ms_ = map(float, np.exp(best.x))
        return self

    def predict(self, workloads: Sequence[Workload]) -> NDArray[np.float64]:
        """The roofline's latency, ``(rows,)``; its two roofs are joined by a smooth maximum."""
        parameters = np.array([self.launch_ms_, self.macs_per_ms_, self.bytes_per_ms_])
        return _roofline(parameters, *_work(workloads))


def _times(rates: Sequence[float]) -> list[float]:
    return [rate * 1e3 for rate in rates]


def _roofline(
    parameters: NDArray[np.float64], work: NDArray[np.float64], traffic: NDArray[np.float64]
) -> NDArray[np.float64]:
    launch, macs_rate, bytes_rate = parameters
    compute, memory = work / macs_rate, traffic / bytes_rate
    peak = np.maximum(compute, memory)
    return launch + peak * ((compute / peak) ** _BEND + (memory / peak) ** _BEND) ** (1 / _BEND)


class NearestNeighbour(BaseEstimator):
    """The nearest measured shape in octaves of b, m, k and n, scaled by the work.

    Attributes:
        points_, macs_, latency_ms_: After ``fit``: what was measured.
    """

    def fit(self, workloads: Sequence[Workload], latency_ms: Sequence[float]) -> NearestNeighbour:
        """Remembers the rows."""
        self.points_, self.macs_ = points_of(sizes_of(workloads)), _work(workloads)[0]
        self.latency_ms_ = np.asarray(latency_ms, dtype=float)
        return self

    def predict(self, workloads: Sequence[Workload]) -> NDArray[np.float64]:
        """The neighbour's latency per multiply-accumulate times the workload's, ``(rows,)``."""
        points = points_of(sizes_of(workloads))
        nearest = ((points[:, None] - self.points_) ** 2).sum(axis=-1).argmin(axis=1)
        return self.latency_ms_[nearest] * _work(workloads)[0] / self.macs_[nearest]


# Set beside the main model wherever errors are shown.
RIVALS: dict[str, type[LatencyEstimator]] = {
    "flops": FlopsProportional,
    "roofline": Roofline,
    "nearest": NearestNeighbour,
}
